"""Tensors on the wire: inline, as a buffer of the message, or through a file in shared memory.

A tensor in a message becomes a msgpack extension that holds a `TensorHeader`; torch and numpy arrays of any dtype, shape and layout
travel, also empty ones
and bfloat16. torch is imported only when a torch tensor is handed over.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from raycore.errors import FrameError
from raycore.transport.endpoints import is_process_alive

EXTENSION_CODE = 1
_NAMES_KEPT = 256
_MAX_DIMENSION = 1 << 40
SHARED_MEMORY_DIRECTORY = Path("/dev/shm")
"""Files there are 0600, made with O_EXCL, and named by pool and process."""
_FILE_NAME = re.compile(r"raycore-([A-Za-z0-9_.-]+)-(\d+)-(\d+)")


class TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    """Describes one tensor; exactly one of `inline`, `buffer` and `file` says where its bytes are."""

    library: str
    dtype: str
    shape: tuple[int, ...]
    inline: bytes | None = None
    buffer: int = -1
    file: str = ""


_NUMPY_DTYPE = re.compile(r"[<>|=][biufcmM]\d+(\[\w+\])?|[<>|=][SU]\d+")
"""Plain dtypes only: numpy evaluates other spellings."""
_TORCH_DTYPES = frozenset(
    [
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex32",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ]
)
"""Plain dtypes only: a view as a quantised one reads what is not there."""

_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(TensorHeader)


class SharedMemoryFiles:
    """The shared-memory files that one process wrote for peers of one pool and that may not have been taken yet."""

    def __init__(self, pool: str) -> None:
        self._prefix = f"raycore-{pool}-{os.getpid()}-"
        self._names: set[str] = set()

    def write(self, data: memoryview) -> str:
        """Copy `data` into a new file of mode 0600; returns its name. OSError when there is no room."""
        name = f"{self._prefix}{next(_file_numbers)}"
        descriptor = os.open(SHARED_MEMORY_DIRECTORY / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        self._names.add(name)
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
        except OSError:
            self.discard(name)
            raise
        finally:
            os.close(descriptor)
        return name

    def discard(self, name: str) -> None:
        """Remove a file if nobody has taken it."""
        self._names.discard(name)
        with contextlib.suppress(OSError):
            (SHARED_MEMORY_DIRECTORY / name).unlink()

    @property
    def has_names(self) -> bool:
        """Whether something was written since the last `take_names`."""
        return bool(self._names)

    def take_names(self) -> tuple[str, ...]:
        """Names written since the last call; the caller discards them when their request or call ends."""
        names = tuple(self._names)
        self._names.clear()
        return names

    def prune(self) -> None:
        """Forget the names of files that their readers have taken, once there are many."""
        if len(self._names) > _NAMES_KEPT:
            self._names = {name for name in self._names if (SHARED_MEMORY_DIRECTORY / name).exists()}

    def discard_all(self) -> None:
        """Remove every file of which nobody has taken the name."""
        for name in list(self._names):
            self.discard(name)


_file_numbers = itertools.count()


def map_file(name: str, pool: str, size: int) -> mmap.mmap:
    """Map a peer's file and unlink it: from here on the mapping is the only reference. FrameError when it is not what it claims to be."""
    match = _FILE_NAME.fullmatch(name)
    if match is None or match[1] != pool:
        msg = f"not a shared-memory file of pool {pool!r}: {name!r}"
        raise FrameError(msg)
    path = SHARED_MEMORY_DIRECTORY / name
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        msg = f"cannot open shared-memory file {name!r}: {error.strerror}"
        raise FrameError(msg) from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_size < size:
            msg = f"shared-memory file {name!r} is not a file of ours of at least {size} bytes"
            raise FrameError(msg)
        mapped = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    with contextlib.suppress(OSError):
        path.unlink()
    return mapped


def can_read(name: str, pool: str) -> bool:
    """Whether a peer's probe file is visible here, i.e. both processes see the same shared memory. Takes the file."""
    try:
        map_file(name, pool, 1).close()
    except (FrameError, OSError, ValueError):
        return False
    return True


def sweep(pool: str) -> int:
    """Remove the shared-memory files of this pool whose process is gone; returns how many."""
    removed = 0
    try:
        names = os.listdir(SHARED_MEMORY_DIRECTORY)
    except OSError:
        return 0
    for name in names:
        match = _FILE_NAME.fullmatch(name)
        if match is None or match[1] != pool or is_process_alive(int(match[2])):
            continue
        with contextlib.suppress(OSError):
            (SHARED_MEMORY_DIRECTORY / name).unlink()
            removed += 1
    return removed


def as_bytes(tensor: Any) -> tuple[TensorHeader, memoryview]:
    """A tensor's header (without a place) and its elements in C order as bytes; copies only what is not contiguous on the host."""
    if isinstance(tensor, np.ndarray):
        contiguous = np.ascontiguousarray(tensor)
        if not _NUMPY_DTYPE.fullmatch(contiguous.dtype.str):
            msg = f"an array of dtype {contiguous.dtype} cannot be sent"
            raise TypeError(msg)
        return TensorHeader("numpy", contiguous.dtype.str, tensor.shape), contiguous.reshape(-1).view(np.uint8).data
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        host = _plain(tensor)
        flat = host.reshape(-1).view(torch.uint8).numpy() if host.numel() else np.empty(0, np.uint8)
        return TensorHeader("torch", str(host.dtype).removeprefix("torch."), tuple(host.shape)), flat.data
    msg = f"cannot send an object of type {type(tensor).__name__}"
    raise TypeError(msg)


def _plain(tensor: Any) -> Any:
    """A torch tensor as contiguous host memory without lazy flags. TypeError for what has no such memory."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _TORCH_DTYPES or tensor.device.type == "meta" or str(tensor.layout) != "torch.strided":
        msg = f"a tensor of dtype {name}, layout {tensor.layout} on {tensor.device} cannot be sent"
        raise TypeError(msg)
    return tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


class TensorWriter:
    """Turns tensors into extensions while one message is encoded, and collects the message's buffers."""

    def __init__(self, *, inline_bytes: int, shared_memory_bytes: int, files: SharedMemoryFiles | None = None) -> None:
        self.buffers: list[memoryview] = []
        self.files = files
        """Set once the peer is known to see our shared memory."""
        self._inline_bytes = inline_bytes
        self._shared_memory_bytes = shared_memory_bytes

    def extension(self, value: Any) -> msgspec.msgpack.Ext:
        """The encoder's hook for objects that msgpack does not know."""
        header, data = as_bytes(value)
        return msgspec.msgpack.Ext(EXTENSION_CODE, _header_encoder.encode(self._placed(header, data)))

    def _placed(self, header: TensorHeader, data: memoryview) -> TensorHeader:
        if len(data) <= self._inline_bytes:
            return msgspec.structs.replace(header, inline=bytes(data))
        if self.files is not None and len(data) >= self._shared_memory_bytes:
            try:
                return msgspec.structs.replace(header, file=self.files.write(data))
            except OSError:
                self.files = None  # no room: frames carry the rest of this session
        self.buffers.append(data)
        return msgspec.structs.replace(header, buffer=len(self.buffers) - 1)


class TensorReader:
    """Turns extensions back into tensors while one message is decoded; views, not copies, of the message's buffers."""

    def __init__(self, pool: str) -> None:
        self._buffers: Sequence[Any] = ()
        self._message: Sequence[Any] | None = None
        self._mapped: dict[str, mmap.mmap] = {}
        self._pool = pool

    def begin(self, message: Sequence[Any]) -> None:
        """What is decoded next belongs to this message; the files that it names are taken once, however often it is decoded."""
        if message is not self._message:
            self._message = message
            self._buffers = message[1:]
            if self._mapped:
                self._mapped = {}

    def release(self) -> None:
        """The message is done with: what nobody kept of its files is given back to the system now, which takes a while for large ones."""
        if self._mapped:
            self._mapped = {}
        self._message, self._buffers = None, ()

    def tensor(self, code: int, data: memoryview) -> Any:
        """The decoder's hook for extensions. FrameError when the header does not fit its bytes."""
        if code != EXTENSION_CODE:
            msg = f"unknown msgpack extension {code}"
            raise FrameError(msg)
        header = _header_decoder.decode(data)
        dtype = _known_dtype(header)
        if any(not 0 <= n <= _MAX_DIMENSION for n in header.shape):
            msg = f"impossible tensor shape {header.shape}"
            raise FrameError(msg)
        count = math.prod(header.shape)
        source = self._bytes_of(header, count * dtype.itemsize)
        return _torch_view(source, header, dtype, count) if header.library == "torch" else _numpy_view(source, header, dtype, count)

    def _bytes_of(self, header: TensorHeader, size: int) -> Any:
        if header.file:
            mapped = self._mapped.get(header.file)
            if mapped is None:
                mapped = self._mapped[header.file] = map_file(header.file, self._pool, size)
            if len(mapped) != size:
                msg = f"a tensor of {size} bytes came with a file of {len(mapped)}"
                raise FrameError(msg)
            return mapped
        if header.inline is not None:
            source = header.inline
        elif 0 <= header.buffer < len(self._buffers):
            source = self._buffers[header.buffer]
        else:
            msg = f"tensor buffer {header.buffer} is not in the message"
            raise FrameError(msg)
        if memoryview(source).nbytes != size:
            msg = f"a tensor of {size} bytes came with {memoryview(source).nbytes}"
            raise FrameError(msg)
        return source


def _known_dtype(header: TensorHeader) -> Any:
    if header.library == "numpy":
        if not _NUMPY_DTYPE.fullmatch(header.dtype):
            msg = f"unknown dtype {header.dtype!r}"
            raise FrameError(msg)
        return np.dtype(header.dtype)
    dtype = None
    if header.library == "torch" and header.dtype in _TORCH_DTYPES:
        import torch  # only a process that is sent a torch tensor pays for torch

        dtype = getattr(torch, header.dtype, None)
    if dtype is None:
        msg = f"unknown dtype {header.library}.{header.dtype}"
        raise FrameError(msg)
    return dtype


def _numpy_view(source: Any, header: TensorHeader, dtype: Any, count: int) -> Any:
    if count == 0:
        return np.empty(header.shape, dtype)
    return np.frombuffer(source, dtype=dtype, count=count).reshape(header.shape)


def _torch_view(source: Any, header: TensorHeader, dtype: Any, count: int) -> Any:
    import torch

    if count == 0:
        return torch.empty(header.shape, dtype=dtype)
    view = memoryview(source)
    if view.readonly:
        # torch has no read-only tensors; bytes that are not ours to change are copied once
        view = memoryview(bytearray(view))
    return torch.frombuffer(view, dtype=dtype, count=count).reshape(header.shape)
