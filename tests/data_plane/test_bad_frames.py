"""What arrives on the socket and is none of ours: counted, answered where it can be, and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import socket as sockets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from raycore.engine import FinishReason
from raycore.messages import (
    Abort,
    Add,
    Attached,
    AttachRefused,
    BadFrame,
    Call,
    CallResult,
    ClientFrame,
    Detach,
    Refused,
    Renew,
    SessionExpired,
    StepColumns,
)
from raycore.sampling import SamplingParams
from raycore.tensors import EXTENSION_CODE
from tests.support.engine_process import CoreState, Pool, client_of, expected
from tests.support.raw_peer import RawPeer
from tests.support.waiting import until, wait_until

PROMPT = np.array([1, 2, 3], np.uint32).tobytes()


def add(slot: int = 0, **sampling: Any) -> Add:
    return Add(slot, f"raw-{slot}", PROMPT, SamplingParams(**sampling))  # type: ignore[arg-type]


@pytest.fixture
def peer(pool: Pool) -> Any:
    sessions = pool.engine.state().sessions
    with RawPeer(pool.engine.member, pool.name) as raw:
        raw.attach()
        assert raw.item(Attached)
        yield raw
        raw.send(Detach())
        wait_until(lambda: pool.engine.state().sessions <= sessions, "the session is over")


@asynccontextmanager
async def served_meanwhile(pool: Pool) -> AsyncIterator[CoreState]:
    """A good client whose streams must be exact all the while; yields the counters before."""
    async with client_of(pool) as client:
        before = pool.engine.state()
        stop = asyncio.Event()
        served: list[int] = []

        async def serve(number: int) -> None:
            while not stop.is_set():
                output = await client.generate([number, 7], SamplingParams(max_tokens=20)).collect()
                assert (output.token_ids, output.replayed) == (expected([number, 7], 20), False)
                served.append(number)

        tasks = [asyncio.create_task(serve(300 + number)) for number in range(8)]
        try:
            yield before
            at = len(served)
            await until(lambda: len(served) > at + 8, "the good client is served still")
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def test_500_random_messages_are_counted_and_disturb_nobody(pool: Pool) -> None:
    generator = random.Random(7)
    async with served_meanwhile(pool) as before:
        for round_ in range(1, 6):
            with RawPeer(pool.engine.member, pool.name) as stranger:
                for _ in range(100):
                    stranger.send_raw(*(generator.randbytes(generator.choice([0, 1, 7, 80, 4000])) for _ in range(generator.randint(1, 3))))
                    await asyncio.sleep(0)
                assert await asyncio.to_thread(stranger.item, BadFrame), "a bad frame is answered"
                due = before.bad_frames + before.stale_frames + 100 * round_
                await until(lambda due=due: bad(pool) + stale(pool) >= due, "each is counted")
    assert pool.engine.state().known_peers <= before.known_peers, "strangers are forgotten"


def bad(pool: Pool) -> int:
    return pool.engine.state().bad_frames


def stale(pool: Pool) -> int:
    return pool.engine.state().stale_frames


def good_payload() -> bytes:
    return msgspec.msgpack.encode(ClientFrame(1, [Renew(), add(max_tokens=3), Abort(b""), Call(1, "profile", msgspec.Raw(b"\x80"))]))  # type: ignore[arg-type]


def header(*fields: Any) -> bytes:
    item = [1, 0, "raw", PROMPT, SamplingParams(), b"", 0, {"x": msgspec.msgpack.Ext(EXTENSION_CODE, msgspec.msgpack.encode(fields))}]
    return msgspec.msgpack.encode([1, [item]])


BROKEN: dict[str, Callable[[], list[bytes]]] = {
    "truncated": lambda: [good_payload()[:-9]],
    "empty": lambda: [b""],
    "empty parts": lambda: [b"", b"", b""],
    "a byte too many": lambda: [good_payload() + b"\0"],
    "an array of 2**30": lambda: [b"\x92\x01\xdd\x40\x00\x00\x00"],
    "an array of 2**32": lambda: [b"\xdd\xff\xff\xff\xff"],
    "a map of 2**32": lambda: [b"\x92\x01\xdf\xff\xff\xff\xff"],
    "nested 100,000 deep": lambda: [b"\x92\x01\x91" + b"\x91" * 100_000],
    "a frame of an engine": lambda: [msgspec.msgpack.encode([1, 0, [0, 0, 0, 0], 0, []])],
    "another type": lambda: [msgspec.msgpack.encode({"seq": 1})],
    "a number of 2**64": lambda: [b"\x92\xcf" + b"\xff" * 8 + b"\x90"],
    "a second attach of another version": lambda: [msgspec.msgpack.encode([1, [[0, 99, "x"]]])],
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_frame_that_cannot_be_read_ends_its_session_at_once_and_no_other(pool: Pool, peer: RawPeer, name: str) -> None:
    async with served_meanwhile(pool) as before:
        peer.send_raw(*BROKEN[name]())
        answer = await asyncio.to_thread(peer.frame)
        while answer is not None and not answer.items:  # a report of the engine's load
            answer = await asyncio.to_thread(peer.frame)
        assert answer is not None, "the client is told without having to ask"
        assert isinstance(answer.items[0], (SessionExpired, BadFrame))
        assert bad(pool) + stale(pool) > before.bad_frames + before.stale_frames


HOSTILE_HEADERS: dict[str, tuple[Any, ...]] = {
    "a claim of 8 EiB": ("numpy", "|u1", (2**63 - 1,), None, 0, ""),
    "objects": ("numpy", "|O8", (1,), b"\0" * 8, -1, ""),
    "a dtype that is code": ("numpy", "(2,f4", (1,), b"\0" * 8, -1, ""),
    "a quantised tensor": ("torch", "quint8", (8,), b"\0" * 8, -1, ""),
    "an impossible tensor": ("torch", "int32", (0, 2**62, 2**62), b"", -1, ""),
    "a file elsewhere": ("numpy", "|u1", (1,), None, -1, "../../etc/passwd"),
    "a file that is not": ("numpy", "|u1", (1,), None, -1, "raycore-POOL-1-1"),
    "a buffer that is not": ("numpy", "|u1", (1,), None, 5, ""),
}


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
async def test_a_request_with_a_tensor_that_lies_is_refused_alone(pool: Pool, peer: RawPeer, name: str) -> None:
    async with served_meanwhile(pool):
        peer.send_raw(header(*HOSTILE_HEADERS[name]))
        refused = await asyncio.to_thread(peer.item, Refused)
        assert (refused.slot, refused.error.type) == (0, "InvalidRequestError")
        peer.seq += 1
        peer.send(add(1, max_tokens=2))
        assert (await ends(peer)) == {1: FinishReason.LENGTH}


async def ends(peer: RawPeer) -> dict[int, FinishReason]:
    while columns := await asyncio.to_thread(peer.item, StepColumns):
        if columns.finished:
            slots = np.frombuffer(columns.finished, np.uint32).tolist()
            return {slot: FinishReason(reason) for slot, reason in zip(slots, columns.reasons, strict=True)}
    pytest.fail("no end came")


async def test_one_bad_item_in_a_good_frame_is_answered_and_the_rest_is_served(pool: Pool, peer: RawPeer) -> None:
    async with served_meanwhile(pool) as before:
        bad_add = [1, 0, "raw-0", "not bytes", SamplingParams(), b"", 0, None]
        peer.send_raw(msgspec.msgpack.encode([peer.seq, [bad_add, add(1, max_tokens=1), [3, 9, "profile"]]]))
        items: list[Any] = []
        while not any(isinstance(item, StepColumns) and item.finished for item in items):
            frame = await asyncio.to_thread(peer.frame)
            assert frame is not None
            items += frame.items
        assert [item.slot for item in items if isinstance(item, Refused)] == [0]
        assert [item.call_id for item in items if isinstance(item, CallResult)] == [9]
        assert bad(pool) == before.bad_frames + 1


async def test_sampling_that_no_client_lets_through_is_refused_by_the_engine(pool: Pool, peer: RawPeer) -> None:
    async with served_meanwhile(pool):
        wrong = [{"max_tokens": 0}, {"max_tokens": -5}, {"temperature": -1.0}, {"top_p": 7.0}, {"min_tokens": 9, "max_tokens": 3}]
        peer.send(*(add(slot, **values) for slot, values in enumerate(wrong)))
        refused: list[int] = []
        while len(refused) < len(wrong):
            frame = await asyncio.to_thread(peer.frame)
            assert frame is not None
            refused += [item.slot for item in frame.items if isinstance(item, Refused)]
        assert refused == list(range(len(wrong)))


@pytest.mark.parametrize("seq", [0, 7, 2**63])
async def test_a_gap_in_the_numbers_is_told_at_once(pool: Pool, peer: RawPeer, seq: int) -> None:
    async with served_meanwhile(pool) as before:
        peer.send(add(max_tokens=100_000))
        assert await asyncio.to_thread(peer.item, StepColumns)
        peer.send(Renew(), seq=seq)
        assert await asyncio.to_thread(peer.item, SessionExpired), "the client is told without having to ask"
        assert pool.engine.state().ended_sessions == before.ended_sessions + 1


@pytest.mark.parametrize("changes", [{"pool": "other"}, {"incarnation": "old"}, {"version": 99}, {"lease_s": -1.0}], ids=str)
async def test_a_stranger_that_does_not_fit_is_refused_and_forgotten(pool: Pool, changes: dict[str, Any]) -> None:
    before = pool.engine.state()
    with RawPeer(pool.engine.member, pool.name) as stranger:
        stranger.attach(**changes)
        assert (await asyncio.to_thread(stranger.item, AttachRefused)).reason
        after = pool.engine.state()
        assert (after.sessions, after.known_peers) == (before.sessions, before.known_peers)


@pytest.mark.parametrize("size", [1 << 30, (1 << 63) - 1])
async def test_a_peer_that_claims_a_gigabyte_is_cut_off(pool: Pool, size: int) -> None:
    path = pool.engine.member.endpoints.requests_ipc.removeprefix("ipc://")
    async with served_meanwhile(pool):
        reader, writer = await asyncio.open_unix_connection(path)
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
        writer.write(greeting)
        await asyncio.wait_for(reader.readexactly(64), 10)
        ready = b"\x05READY\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
        writer.write(b"\x04" + bytes([len(ready)]) + ready)
        writer.write(b"\x02" + size.to_bytes(8, "big") + b"x" * 1000)
        await writer.drain()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1 << 20), 20)
        writer.close()


async def test_bytes_that_are_no_zeromq_at_all_disturb_nobody(pool: Pool) -> None:
    path = pool.engine.member.endpoints.requests_ipc.removeprefix("ipc://")
    generator = random.Random(3)
    async with served_meanwhile(pool):
        for _ in range(30):
            with sockets.socket(sockets.AF_UNIX) as raw:
                raw.connect(path)
                try:
                    raw.sendall(generator.randbytes(generator.randint(1, 3000)))
                except (BrokenPipeError, ConnectionResetError):
                    continue
            await asyncio.sleep(0)
