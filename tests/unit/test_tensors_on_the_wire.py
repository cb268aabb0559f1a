"""Tensors through the codec: every dtype and layout, each way of travelling, and headers that lie."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.codec import FrameDecoder, FrameEncoder
from raycore.errors import FrameError
from raycore.tensors import EXTENSION_CODE, SHARED_MEMORY_DIRECTORY, SharedMemoryFiles, TensorReader, can_read, sweep

POOL = f"unit-{os.getpid()}"
INLINE, SHARED = 64, 4096


class Box(msgspec.Struct, frozen=True, array_like=True):
    value: Any


def shm_files(pool: str = POOL) -> list[Path]:
    return list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool}-*"))


@pytest.fixture(autouse=True)
def _no_file_is_left() -> Iterator[None]:
    yield
    left = shm_files()
    for file in left:
        file.unlink()
    assert not left


def through(value: Any, *, shared: bool = False) -> tuple[Any, int]:
    """The value after a round trip, and how many buffers the message had."""
    encoder = FrameEncoder(inline_bytes=INLINE, shared_memory_bytes=SHARED)
    if shared:
        encoder.share_memory(SharedMemoryFiles(POOL))
    message = encoder.encode(Box(value))
    # as after a socket: other memory, read-only
    received = [bytes(message[0]), *(memoryview(bytes(part)) for part in message[1:])]
    return FrameDecoder(Box, TensorReader(POOL)).decode(received).value, len(message) - 1


def same(a: Any, b: np.ndarray) -> bool:
    return isinstance(a, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


NUMPY_DTYPES = ["?", "i1", "u1", "<i2", ">i2", "<u4", "<i8", "f2", "<f4", ">f8", "g", "F", "D", "G", "S5", "<U3", "<M8[ns]", "<m8[s]"]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (7, 5), (40, 41), (1,) * 20], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["frames", "shared"])
def test_numpy_arrays_of_every_dtype_and_shape_arrive_as_they_were(dtype: str, shape: tuple[int, ...], shared: bool) -> None:
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    source = np.frombuffer(bytes(range(48, 58)) * (count * kind.itemsize // 10 + 1), np.uint8)[: count * kind.itemsize]
    array = (
        (source & 1).astype(bool)
        if dtype == "?"
        else np.frombuffer(source.tobytes(), kind)
        if kind.kind != "U"
        else np.full(count, "aé", kind)
    )
    array = array.reshape(shape)
    assert same(through(array, shared=shared)[0], array)


@pytest.mark.parametrize(
    "array",
    [np.arange(60).reshape(6, 10)[::2, ::3], np.arange(60).reshape(6, 10).T, np.arange(9)[::-1], np.broadcast_to(np.arange(3), (4, 3)),
     np.asfortranarray(np.arange(12.0).reshape(3, 4))],
    ids=["strided", "transposed", "reversed", "broadcast", "fortran"],
)  # fmt: skip
def test_numpy_arrays_of_any_layout_arrive_with_equal_elements(array: np.ndarray) -> None:
    got, _ = through(array)
    assert np.array_equal(got, array)
    assert got.dtype == array.dtype


def test_an_array_with_fields_keeps_them_or_is_refused() -> None:
    array = np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "<i4"), ("b", "<f8")])
    try:
        got, _ = through(array)
    except TypeError:
        return
    assert same(got, array)


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array(["x", None], dtype=object), object(), lambda: 1], ids=["object", "none", "any", "function"]
)
def test_what_cannot_be_sent_raises_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        through(value)


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", {1: object()}], ids=["object", "int", "text", "nested"])
def test_a_part_that_cannot_be_sent_leaves_nothing_in_the_next_message(value: Any) -> None:
    encoder = FrameEncoder(inline_bytes=INLINE, shared_memory_bytes=SHARED)
    array = np.arange(100)
    with pytest.raises(TypeError):
        encoder.encode_part(Box([array, value]))
    message = encoder.encode(Box([array, array + 1]))
    assert len(message) == 3
    first, second = FrameDecoder(Box, TensorReader(POOL)).decode(message).value
    assert same(first, array)
    assert same(second, array + 1)


@pytest.mark.parametrize(
    ("size", "shared", "buffers", "files"),
    [
        (0, True, 0, 0),
        (INLINE, True, 0, 0),
        (INLINE + 1, True, 1, 0),
        (SHARED - 1, True, 1, 0),
        (SHARED, True, 0, 1),
        (SHARED, False, 1, 0),
    ],
)
def test_the_size_decides_how_a_tensor_travels(size: int, shared: bool, buffers: int, files: int) -> None:
    array = np.zeros(size, np.uint8)
    encoder = FrameEncoder(inline_bytes=INLINE, shared_memory_bytes=SHARED)
    if shared:
        encoder.share_memory(SharedMemoryFiles(POOL))
    message = encoder.encode(Box(array))
    assert (len(message) - 1, len(shm_files())) == (buffers, files)
    assert same(FrameDecoder(Box, TensorReader(POOL)).decode(message).value, array)
    assert not shm_files()


def test_a_shared_file_is_for_this_user_only_and_gone_once_mapped() -> None:
    files = SharedMemoryFiles(POOL)
    encoder = FrameEncoder(inline_bytes=INLINE, shared_memory_bytes=SHARED)
    encoder.share_memory(files)
    message = encoder.encode(Box(np.ones(SHARED, np.uint8)))
    (file,) = shm_files()
    assert file.stat().st_mode & 0o777 == 0o600
    value = FrameDecoder(Box, TensorReader(POOL)).decode(message).value
    assert not shm_files()
    assert value.sum() == SHARED
    value[:] = 2
    assert value.sum() == 2 * SHARED


def test_64_mib_arrive_either_way() -> None:
    array = np.arange(16 << 20, dtype=np.uint32)
    assert through(array)[0][-1] == (16 << 20) - 1
    assert np.array_equal(through(array, shared=True)[0], array)


def test_a_full_shared_memory_falls_back_to_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any) -> int:
        raise OSError(28, "No space left on device")

    array = np.arange(SHARED)
    monkeypatch.setattr("raycore.tensors.os.write", full)
    got, buffers = through(array, shared=True)
    assert buffers == 1
    assert same(got, array)


def test_many_tensors_of_every_kind_in_one_message_keep_their_places() -> None:
    arrays = [np.full(size, size % 251, np.uint8) for size in (0, 1, INLINE, INLINE + 1, SHARED, 3 * SHARED, 5, SHARED - 1)]
    got, _ = through({"a": arrays, "b": [arrays[::-1]]}, shared=True)
    assert all(same(x, y) for x, y in zip(got["a"], arrays, strict=True))
    assert all(same(x, y) for x, y in zip(got["b"][0], arrays[::-1], strict=True))


# -- torch


def torch_cases() -> list[Any]:
    names = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64"]
    names += ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]
    return [pytest.param(name, shape, id=f"{name}-{shape}") for name, shape in itertools.product(names, [(), (0,), (3,), (2, 0), (33, 35)])]


@pytest.mark.parametrize(("name", "shape"), torch_cases())
@pytest.mark.parametrize("shared", [False, True], ids=["frames", "shared"])
def test_torch_tensors_of_every_dtype_arrive_bit_for_bit(name: str, shape: tuple[int, ...], shared: bool) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    count = int(np.prod(shape))
    raw = torch.arange(count * dtype.itemsize).remainder(2 if name == "bool" else 100).to(torch.uint8)
    tensor = (raw.view(dtype) if count else torch.empty(0, dtype=dtype)).reshape(shape)
    got, _ = through(tensor, shared=shared)
    assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
    if count:
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "needs grad", "conjugate", "negative"])
def test_torch_tensors_of_any_layout_arrive_with_equal_elements(layout: str) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensor = {
        "transposed": lambda: base.T,
        "strided": lambda: base[::2, 1::2],
        "expanded": lambda: base[:, :1].expand(4, 5),
        "needs grad": lambda: base.clone().requires_grad_(),
        "conjugate": lambda: torch.complex(base, base).conj(),
        "negative": lambda: torch.complex(base, base).conj().imag,
    }[layout]()
    got, _ = through(tensor)
    assert torch.equal(got, tensor.detach().resolve_conj())


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_torch_tensors_without_plain_memory_raise_type_error(kind: str) -> None:
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.ones(3).to_sparse() if kind == "sparse" else torch.ones(3, device="meta")
    with pytest.raises(TypeError):
        through(tensor)


# -- headers that lie


def extension(**fields: Any) -> bytes:
    values: dict[str, Any] = {"library": "numpy", "dtype": "<i4", "shape": (2,), "inline": None, "buffer": -1, "file": "", **fields}
    header = [values[name] for name in ("library", "dtype", "shape", "inline", "buffer", "file")]
    return msgspec.msgpack.encode([msgspec.msgpack.Ext(EXTENSION_CODE, msgspec.msgpack.encode(header))])


def refused(payload: bytes, *buffers: bytes) -> str:
    with pytest.raises(FrameError) as caught:
        FrameDecoder(Box, TensorReader(POOL)).decode([payload, *buffers])
    return str(caught.value)


EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    "fields",
    [
        {"inline": b"\0" * 7},
        {"inline": b"\0" * 9},
        {"inline": b""},
        {},
        {"buffer": 0},
        {"buffer": 1},
        {"buffer": 2**40},
        {"shape": (-2,), "inline": EIGHT},
        {"shape": (-1, -2), "inline": EIGHT},
        {"shape": (0, -1), "inline": b""},
        {"shape": (2**62, 2**62), "inline": EIGHT},
        {"shape": (2**63 - 1,), "inline": EIGHT},
        {"shape": (1,) * 70, "dtype": "<i8", "inline": EIGHT},
        {"shape": (0, 2**63), "inline": b""},
        {"shape": (0, *(2**62,) * 5), "inline": b""},
        {"shape": "ab", "inline": EIGHT},
        {"shape": (1.5,), "inline": EIGHT},
        {"dtype": "O", "shape": (1,), "inline": EIGHT},
        {"dtype": "|O8", "shape": (1,), "inline": EIGHT},
        {"dtype": "i4,O", "shape": (1,), "inline": b"\0" * 12},
        {"dtype": "T", "shape": (1,), "inline": b"\0" * 16},
        {"dtype": "nonsense", "inline": EIGHT},
        {"dtype": "", "inline": EIGHT},
        {"dtype": "V0", "inline": b""},
        {"dtype": "(2,f4", "inline": EIGHT},
        {"dtype": "i4,(", "inline": EIGHT},
        {"dtype": ",", "inline": EIGHT},
        {"dtype": "a", "inline": b""},
        {"dtype": "(2,)i4", "shape": (1,), "inline": EIGHT},
        {"dtype": "\0", "inline": EIGHT},
        {"dtype": 5, "inline": EIGHT},
        {"library": "pickle", "inline": EIGHT},
        {"library": "os", "dtype": "system", "inline": EIGHT},
        {"library": "torch", "dtype": "nn", "inline": EIGHT},
        {"library": "torch", "dtype": "load", "inline": EIGHT},
        {"library": "torch", "dtype": "int32", "shape": (0, 2**63), "inline": b""},
        {"library": "torch", "dtype": "int32", "shape": (0, 2**62, 2**62), "inline": b""},
        {"library": "torch", "dtype": "int32", "shape": (2**62, 2**62), "inline": EIGHT},
        {"library": "torch", "dtype": "int32", "inline": b"\0" * 7},
    ],
    ids=lambda fields: ",".join(f"{k}={str(v)[:24]!a}" for k, v in fields.items()) or "nowhere",
)
def test_a_header_that_does_not_fit_its_bytes_is_a_frame_error(fields: dict[str, Any]) -> None:
    refused(extension(**fields))


def test_a_buffer_of_another_size_is_a_frame_error() -> None:
    assert "bytes" in refused(extension(buffer=0), b"\0" * 12)


@pytest.mark.parametrize("dtype", ["quint8", "qint8", "qint32", "quint4x2", "quint2x4"])
def test_a_quantised_dtype_is_refused_and_does_not_crash_the_process(dtype: str) -> None:
    pytest.importorskip("torch")
    script = f"""
import warnings; warnings.simplefilter("ignore")
from raycore.codec import FrameDecoder
from raycore.errors import FrameError
from raycore.tensors import TensorReader
import msgspec
class Box(msgspec.Struct, array_like=True):
    value: object
header = msgspec.msgpack.encode(["torch", "{dtype}", [8], b"\\0" * (32 if "{dtype}" == "qint32" else 8)])
frame = msgspec.msgpack.encode([msgspec.msgpack.Ext({EXTENSION_CODE}, header)])
try:
    FrameDecoder(Box, TensorReader("p")).decode([frame])
except FrameError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr[-500:]


@pytest.mark.parametrize("code", [0, 2, -1, 127])
def test_another_extension_is_a_frame_error(code: int) -> None:
    refused(msgspec.msgpack.encode([msgspec.msgpack.Ext(code, b"abc")]))


@pytest.mark.parametrize(
    "header", [b"", b"\xc1", b"\x90", msgspec.msgpack.encode({"library": "numpy"}), b"\xdd\xff\xff\xff\xff", b"\x91" * 3000]
)
def test_a_header_that_does_not_decode_is_a_frame_error(header: bytes) -> None:
    refused(msgspec.msgpack.encode([msgspec.msgpack.Ext(EXTENSION_CODE, header)]))


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "raycore-../x-1-1",
        "raycore-POOL-1-1/../../x",
        "raycore-POOL-1",
        "raycore-POOL-1-x",
        "raycore-POOL-1-1\0",
        "raycore-POOL-1-1\n",
        "raycore-POOL-99999999-1",
        "passwd",
        " raycore-POOL-1-1",
        "raycore-POOL-" + "9" * 300 + "-1",
    ],
    ids=repr,  # without the process's number, which differs where tests are shared out
)
def test_a_file_name_that_is_none_of_ours_is_a_frame_error(name: str) -> None:
    name = name.replace("POOL", POOL)
    refused(extension(file=name, shape=(1,)))
    assert not can_read(name, POOL)


@pytest.fixture
def own_file() -> Iterator[Path]:
    file = SHARED_MEMORY_DIRECTORY / f"raycore-{POOL}-{os.getpid()}-990001"
    yield file
    file.unlink(missing_ok=True)


def test_a_file_of_another_pool_is_left_alone(own_file: Path) -> None:
    other = SHARED_MEMORY_DIRECTORY / f"raycore-{POOL}x-{os.getpid()}-1"
    other.write_bytes(EIGHT)
    try:
        refused(extension(file=other.name))
        assert not can_read(other.name, POOL)
        assert other.exists()
    finally:
        other.unlink()


def test_a_symbolic_link_is_not_followed(own_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_bytes(EIGHT)
    own_file.symlink_to(target)
    refused(extension(file=own_file.name))
    assert not can_read(own_file.name, POOL)
    assert target.read_bytes() == EIGHT


@pytest.mark.parametrize("content", [b"", b"\0" * 7])
def test_a_file_shorter_than_its_claim_is_a_frame_error(own_file: Path, content: bytes) -> None:
    own_file.write_bytes(content)
    refused(extension(file=own_file.name))


def test_a_pipe_or_a_directory_in_place_of_a_file_is_a_frame_error_and_blocks_nobody(own_file: Path) -> None:
    os.mkfifo(own_file)
    refused(extension(file=own_file.name))
    own_file.unlink()
    own_file.mkdir()
    refused(extension(file=own_file.name))
    own_file.rmdir()


def test_sweep_takes_the_files_of_dead_processes_of_its_pool_only() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f"raycore-{POOL}-{dead.pid}-0": True,
        f"raycore-{POOL}-{os.getpid()}-990002": False,
        f"raycore-{POOL}.b-{dead.pid}-0": False,
        f"raycore-{POOL}-b-{dead.pid}-0": False,
    }
    for name in names:
        (SHARED_MEMORY_DIRECTORY / name).write_bytes(b"x")
    try:
        assert sweep(POOL) == 1
        assert {name: not (SHARED_MEMORY_DIRECTORY / name).exists() for name in names} == names
    finally:
        for name in names:
            (SHARED_MEMORY_DIRECTORY / name).unlink(missing_ok=True)
