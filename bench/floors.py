"""Floors: what bare pyzmq + msgspec, a plain copy, and one Ray actor call cost here and now, with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from raycore.engine import EngineLoad
from raycore.ids import CallId, RequestId, Slot
from raycore.messages import Add, Call, ClientFrame, EngineFrame, StepColumns, ToEngine
from raycore.sampling import SamplingParams

_STOP = b"stop"
_PROMPT = array("I", range(1, 17)).tobytes()
_SAMPLING = SamplingParams(max_tokens=1)
_NOTHING = msgspec.Raw(msgspec.msgpack.encode({}))


def _answer(endpoint: str, cpu: int | None, ready: Any) -> None:
    """A blocking ROUTER that decodes the product's client frames and answers each with `seq` step frames of the product's shapes."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    ready.set()
    decode = msgspec.msgpack.Decoder(ClientFrame).decode
    encode = msgspec.msgpack.Encoder().encode
    load = EngineLoad(1, 0, 16, 0)
    while True:
        identity, payload = socket.recv_multipart()
        if payload == _STOP:
            break
        frame = decode(payload)
        rows = max(1, len(frame.items))
        column = b"\0" * (4 * rows)
        for step in range(frame.seq):
            slots = column if step == 0 else b""
            ends = (column, b"\0" * rows) if step == frame.seq - 1 else (b"", b"")
            socket.send_multipart([identity, encode(EngineFrame(step, 0, load, rows, [StepColumns(slots, column, b"", *ends, 1 << 50)]))])
    context.destroy(linger=0)


class BarePair:
    """A DEALER here and a ROUTER in another process, on the same kind of socket as the product's."""

    def __init__(self, *, cpu: int | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="rcb")
        endpoint = f"ipc://{Path(self._directory.name) / 'f'}"
        spawn = multiprocessing.get_context("spawn")
        ready = spawn.Event()
        self._process = spawn.Process(target=_answer, args=(endpoint, cpu, ready), daemon=True)
        self._process.start()
        ready.wait(30)
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.connect(endpoint)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EngineFrame).decode

    def exchange(self, requests: int, replies: int) -> None:
        """One frame up with so many requests as the product sends them; so many step frames down, in the product's shapes."""
        adds: list[ToEngine] = [Add(Slot(slot), RequestId(f"client-12345-abcdef-{slot}"), _PROMPT, _SAMPLING) for slot in range(requests)]
        self.socket.send(self._encode(ClientFrame(replies, adds)))
        for _ in range(replies):
            self._decode(self.socket.recv())

    def call(self, calls: int) -> None:
        """One frame up with so many utility calls, one frame down."""
        items: list[ToEngine] = [Call(CallId(number), "is_scheduler_paused", _NOTHING) for number in range(calls)]
        self.socket.send(self._encode(ClientFrame(1, items)))
        self._decode(self.socket.recv())

    def seconds(self, requests: int, replies: int, rounds: int) -> list[float]:
        """The time of each of `rounds` exchanges."""
        return _timed(lambda: self.exchange(requests, replies), rounds)

    def call_seconds(self, calls: int, rounds: int) -> list[float]:
        """The time of each of `rounds` frames of calls."""
        return _timed(lambda: self.call(calls), rounds)

    def close(self) -> None:
        """End the other process."""
        self.socket.send(_STOP)
        self._process.join(5)
        self._context.destroy(linger=0)
        self._directory.cleanup()


def _timed(work: Callable[[], None], rounds: int) -> list[float]:
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return times


def ray_call_seconds(rounds: int) -> list[float]:
    """The time of each of `rounds` calls of an empty method of a Ray actor; in a local Ray of its own where there is none."""
    import ray

    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")

    @ray.remote(num_cpus=0)
    class Empty:
        def call(self) -> None:
            return None

    try:
        actor = Empty.remote()
        ray.get(actor.call.remote())
        return _timed(lambda: ray.get(actor.call.remote()), rounds)
    finally:
        if is_ours:
            ray.shutdown()


def copy_seconds(size: int, rounds: int) -> list[float]:
    """The time of one copy of `size` bytes into a fresh shared-memory file."""
    data = memoryview(bytearray(os.urandom(1 << 20) * (size >> 20)))
    times: list[float] = []
    path = Path(f"/dev/shm/raycore-bench-{os.getpid()}-0")
    for _ in range(rounds):
        begin = time.perf_counter()
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        written = 0
        while written < size:
            written += os.write(descriptor, data[written:])
        os.close(descriptor)
        times.append(time.perf_counter() - begin)
        path.unlink()
    return times
