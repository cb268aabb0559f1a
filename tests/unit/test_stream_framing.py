"""Messages on a byte stream: whole, in pieces, together, and claimed by a liar."""

from __future__ import annotations

import random
import struct

import pytest

from raycore.errors import FrameError
from raycore.transport.framing import FrameParser, frame

LIMIT = 1 << 20


def on_the_wire(message: list[bytes]) -> bytes:
    return b"".join(bytes(part) for part in frame(message))


def random_messages(seed: int) -> list[list[bytes]]:
    generator = random.Random(seed)
    return [
        [generator.randbytes(generator.choice([0, 1, 7, 300, 70_000])) for _ in range(generator.choice([1, 1, 1, 2, 5]))]
        for _ in range(generator.randint(1, 12))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_messages_cut_anywhere_come_out_whole_and_in_order(seed: int) -> None:
    messages = random_messages(seed)
    wire = b"".join(map(on_the_wire, messages))
    generator = random.Random(seed + 1)
    parser = FrameParser(LIMIT)
    received: list[list[bytes]] = []
    at = 0
    while at < len(wire):
        size = generator.choice([1, 3, 8, 100, 5000, len(wire)])
        received += [[bytes(part) for part in message] for message in parser.feed(wire[at : at + size])]
        at += size
    assert received == messages


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<II", 0, 5),
        struct.pack("<II", 1, 1 << 30),
        struct.pack("<II", 1 << 31, 1),
        struct.pack("<III", 2, LIMIT, LIMIT),
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_a_claim_that_cannot_be_is_refused_before_anything_is_kept(header: bytes) -> None:
    with pytest.raises(FrameError, match="announced"):
        FrameParser(LIMIT).feed(header + b"x" * 16)


def test_what_is_incomplete_gives_nothing() -> None:
    parser = FrameParser(LIMIT)
    wire = on_the_wire([b"abc", b"defg"])
    assert parser.feed(wire[:-1]) == []
    assert [bytes(part) for part in parser.feed(wire[-1:])[0]] == [b"abc", b"defg"]
