"""The two channels within a host: unix streams, which clients take by themselves, and ZeroMQ over ipc; and strangers on a stream."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct

import msgspec
import pytest

from raycore.client.client import EngineCoreClient
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import Limits
from raycore.messages import PROTOCOL_VERSION, Attach, ClientFrame
from raycore.sampling import SamplingParams
from raycore.transport.framing import frame
from tests.support.engine_process import Pool, client_of, expected
from tests.support.waiting import until

PROMPT = [5, 6, 7]


async def check_served(client: EngineCoreClient) -> None:
    outputs = await asyncio.gather(*(client.generate(PROMPT, SamplingParams(max_tokens=60)).collect() for _ in range(20)))
    assert all(output.token_ids == expected(PROMPT, 60) for output in outputs)


def stranger(pool: Pool) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(20)
    peer.connect(pool.engine.member.endpoints.requests_stream)
    return peer


def is_hung_up(peer: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while peer.recv(4096):
            pass
    return True


@pytest.mark.parametrize("channel", ["stream", "zeromq"])
async def test_either_channel_serves(pool: Pool, channel: str) -> None:
    links = SocketLinks(pool.access, Limits(), local_channel=channel)  # type: ignore[arg-type]
    async with EngineCoreClient(pool.access, NoControlPlane(), links) as client:
        await check_served(client)
        client.check_invariants()


async def test_random_bytes_on_a_stream_end_that_connection_alone(pool: Pool) -> None:
    generator = random.Random(3)
    async with client_of(pool) as client:
        for _ in range(50):
            with stranger(pool) as peer:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    peer.sendall(b"\x01" * 16 + b"\xff" * 4 + generator.randbytes(generator.randint(4, 3000)))
                assert await asyncio.to_thread(is_hung_up, peer)
        await check_served(client)


async def test_a_claim_of_a_gibibyte_ends_the_connection(pool: Pool) -> None:
    async with client_of(pool) as client:
        with stranger(pool) as peer:
            peer.sendall(b"\x02" * 16 + struct.pack("<II", 1, 1 << 30))
            assert await asyncio.to_thread(is_hung_up, peer)
        await check_served(client)


async def test_a_stranger_that_says_nothing_or_half_a_thing_disturbs_nobody(pool: Pool) -> None:
    async with client_of(pool) as client:
        with stranger(pool), stranger(pool) as half:
            half.sendall(b"\x03" * 16 + struct.pack("<II", 1, 1000) + b"half")
            await check_served(client)


async def test_the_session_of_another_connection_cannot_be_taken_over(pool: Pool) -> None:
    member = pool.engine.member
    attach = Attach(PROTOCOL_VERSION, pool.name, member.engine.incarnation, "first", 30.0)
    hello = b"".join(frame([msgspec.msgpack.encode(ClientFrame(0, [attach]))]))
    with stranger(pool) as first, stranger(pool) as second:
        first.sendall(b"\x04" * 16 + hello)
        assert first.recv(4096)
        second.sendall(b"\x04" * 16 + hello)
        assert await asyncio.to_thread(is_hung_up, second)
        first.sendall(b"".join(frame([msgspec.msgpack.encode(ClientFrame(1, []))])))
        assert first.recv(4096)
    await until(lambda: pool.engine.state().sessions == 0, "the session has ended with its connection")
