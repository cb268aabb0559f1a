"""Frames that are none: every one becomes FrameError, whatever the bytes."""

from __future__ import annotations

import random

import msgspec
import pytest

from raycore.codec import FrameDecoder, FrameEncoder
from raycore.errors import FrameError
from raycore.messages import Abort, Add, Call, ClientFrame, EngineFrame, Renew
from raycore.sampling import SamplingParams
from raycore.tensors import TensorReader

GOOD = ClientFrame(
    3,
    [Renew(), Add(1, "r", b"\1\0\0\0", SamplingParams(stop=("a",))), Abort(b"\1\0\0\0"), Call(1, "profile", msgspec.Raw(b"\x80"))],  # type: ignore[arg-type]
)


def payload() -> bytes:
    return bytes(FrameEncoder().encode(GOOD)[0])


def decode(data: bytes) -> ClientFrame | None:
    try:
        return FrameDecoder(ClientFrame, TensorReader("p")).decode([data])
    except FrameError:
        return None


def test_the_good_frame_decodes() -> None:
    assert decode(payload()) == GOOD


def test_every_truncation_is_a_frame_error() -> None:
    data = payload()
    assert all(decode(data[:length]) is None for length in range(len(data)))


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_and_flipped_bits_raise_nothing_but_frame_error(seed: int) -> None:
    generator = random.Random(seed)
    data = payload()
    for _ in range(3000):
        broken = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            broken[generator.randrange(len(broken))] ^= 1 << generator.randrange(8)
        decode(bytes(broken))
        decode(generator.randbytes(generator.randrange(80)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x92\x00\xdd\x40\x00\x00\x00",
        b"\x92\x00\xdd\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x00\xdf\xff\xff\xff\xff",
        b"\x92\x00\xc6\xff\xff\xff\xff",
        b"\x92\x00\x91" + b"\x91" * 100_000,
        b"\x92\x00\x91\x94\x03\x01\xa1a" + b"\x91" * 100_000,
        b"\x92\xcf" + b"\xff" * 8 + b"\x90",
        b"\x92\x00\x91\x91\x63",
        b"\x92\x00\x91\x92\x05\x00\x00",
        b"",
        b"\xc1",
        b"\x80",
        b"\x92\x00\x91\xc7\x05\x01abcde",
    ],
    ids=lambda data: data[:12].hex(),
)
def test_a_claim_that_the_bytes_do_not_hold_is_a_frame_error_or_a_number(data: bytes) -> None:
    frame = decode(data)
    assert frame is None or frame.items == [] or frame.seq == 0


def test_a_frame_for_the_other_side_is_a_frame_error() -> None:
    with pytest.raises(FrameError):
        FrameDecoder(EngineFrame, TensorReader("p")).decode([payload()])
