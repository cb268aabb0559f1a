"""Clients in processes of their own, to be frozen and killed."""

from __future__ import annotations

import asyncio
import multiprocessing as mp
import os
import random
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import Limits
from raycore.sampling import SamplingParams


class Story(msgspec.Struct, frozen=True):
    """What became of a client's streams."""

    exact: int
    wrong: tuple[str, ...]
    replayed: int


class ClientProcess:
    """Runs `play(client, say, *arguments)` in a process, which reaches engines over a "stream", "ipc" or "tcp"."""

    def __init__(self, play: Callable[..., Any], access: PoolAccess, limits: Limits, *arguments: Any, over: str = "stream") -> None:
        context = mp.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, play, access, limits, arguments, over), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    async def hear(self, limit_s: float = 60.0) -> Any:
        """What the process says next."""
        heard = await asyncio.to_thread(self.connection.poll, limit_s)
        assert heard, "the client process says nothing"
        return self.connection.recv()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.connection.close()


def links_over(over: str, access: PoolAccess, limits: Limits) -> SocketLinks:
    """How to reach engines."""
    return SocketLinks(access, limits, use_tcp=over == "tcp", local_channel="zeromq" if over == "ipc" else "stream")


def _run(
    connection: Connection, play: Callable[..., Any], access: PoolAccess, limits: Limits, arguments: tuple[Any, ...], over: str
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def main() -> None:
        async with EngineCoreClient(access, NoControlPlane(), links_over(over, access, limits), limits=limits) as client:
            await play(client, connection.send, *arguments)

    asyncio.run(main())


async def read_streams(client: EngineCoreClient, say: Callable[[Any], None], streams: int, tokens: int) -> None:
    """Say "started" when each stream has begun, and a Story at the end."""
    begun: list[int] = []
    wrong: list[str] = []
    replayed: list[int] = []
    exact: list[int] = []

    async def one(number: int) -> None:
        prompt = [1000 + number, *range(1, number % 7 + 2)]
        got: list[int] = []
        outputs = []
        async for output in client.generate(prompt, SamplingParams(max_tokens=tokens)):
            if not outputs:
                begun.append(number)
                if len(begun) == streams:
                    say("started")
            outputs.append(output)
            got += output.token_ids
        due = [prompt[i % len(prompt)] for i in range(tokens)]
        if got == due and outputs[-1].finish_reason == "length":
            exact.append(number)
        else:
            wrong.append(f"stream {number}: {len(got)} tokens, {outputs[-1].finish_reason}, prefix right: {got == due[: len(got)]}")
        if outputs[-1].replayed:
            replayed.append(number)

    await asyncio.gather(*(one(number) for number in range(streams)))
    client.check_invariants()
    say(Story(len(exact), tuple(wrong), len(replayed)))


async def send_tensors(client: EngineCoreClient, say: Callable[[Any], None], size: int) -> None:
    """Send large tensors without end."""
    array = np.zeros(size, np.uint8)
    sent = 0
    while True:
        stream = client.generate([1], SamplingParams(max_tokens=2), tensors={"image": array})
        call = client.call("collective_rpc", rank=0, method="echo", args=[array])
        await asyncio.gather(stream.collect(), call)
        sent += 1
        say(sent)


async def hold_requests(client: EngineCoreClient, say: Callable[[Any], None], running: int, waiting: int) -> None:
    """Stream `running` requests without end, have `waiting` more wait for a call's answer and nothing else, and say "started"."""
    streams = [client.generate([n + 1], SamplingParams(max_tokens=1_000_000)) for n in range(running)]
    calls = [asyncio.ensure_future(client.call("pause_scheduler", rank=0, mode="wait")) for _ in range(waiting)]
    await asyncio.gather(*(anext(stream) for stream in streams))
    say("started")
    await asyncio.gather(*(stream.collect() for stream in streams), *calls)


async def storm(client: EngineCoreClient, say: Callable[[Any], None], seed: int) -> None:
    """Requests, aborts in every way, and calls, without end; says how many rounds are over. Raises where a token is wrong."""
    dice = random.Random(seed)
    rounds = 0

    async def one(number: int) -> None:
        prompt = [1 + number % 200, 2, 3][: dice.randint(1, 3)]
        tokens = dice.choice((1, 5, 50, 400))
        how = dice.choice(("collect", "collect", "break", "abort", "drop", "cancel", "call"))
        got = await _use(client, client.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)), how)
        due = [prompt[i % len(prompt)] for i in range(tokens)]
        if got != due[: len(got)] or (how == "collect" and len(got) != tokens):
            raise AssertionError(f"{how}: {len(got)} tokens of {tokens}, {got[:10]} for {prompt}")

    while True:
        await asyncio.gather(*(one(rounds * 50 + number) for number in range(50)))
        rounds += 1
        client.check_invariants()
        say(rounds)


async def _use(client: EngineCoreClient, stream: Any, how: str) -> list[int]:
    """Read a stream, or leave it in one of the ways there are; the tokens that were read."""
    got: list[int] = []
    match how:
        case "call":
            await client.call_all("is_scheduler_paused")
        case "cancel":
            reading = asyncio.ensure_future(stream.collect())
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        case "abort":
            await client.abort_requests([stream.request_id])
            got += (await stream.collect()).token_ids
        case "collect" | "break":
            async for output in stream:
                got += output.token_ids
                if how == "break":
                    break
        case _:
            pass  # dropped
    return got
