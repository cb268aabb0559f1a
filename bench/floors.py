"""Floors: what bare pyzmq + msgspec, a plain copy, and one Ray actor call cost here and now, with the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

_STOP = b"stop"


def _answer(endpoint: str, cpu: int | None, ready: Any) -> None:
    """A blocking ROUTER: decode what comes, answer [reply bytes] x [count] as the request says."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(endpoint)
    ready.set()
    decode = msgspec.msgpack.Decoder(tuple[int, int, list[bytes]]).decode
    encode = msgspec.msgpack.Encoder().encode
    while True:
        identity, payload = socket.recv_multipart()
        if payload == _STOP:
            break
        count, size, _ = decode(payload)
        reply = b"\0" * size
        for _ in range(count):
            socket.send_multipart([identity, encode((0, reply))])
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
        self._decode = msgspec.msgpack.Decoder(tuple[int, bytes]).decode

    def exchange(self, requests: list[bytes], replies: int, reply_bytes: int) -> None:
        """One message up that holds all requests; `replies` messages down."""
        self.socket.send(self._encode((replies, reply_bytes, requests)))
        for _ in range(replies):
            self._decode(self.socket.recv())

    def seconds(self, requests: list[bytes], replies: int, reply_bytes: int, rounds: int) -> list[float]:
        """The time of each of `rounds` exchanges."""
        times: list[float] = []
        for _ in range(rounds):
            begin = time.perf_counter()
            self.exchange(requests, replies, reply_bytes)
            times.append(time.perf_counter() - begin)
        return times

    def close(self) -> None:
        """End the other process."""
        self.socket.send(_STOP)
        self._process.join(5)
        self._context.destroy(linger=0)
        self._directory.cleanup()


def ray_call_seconds(rounds: int) -> list[float]:
    """The time of each of `rounds` calls of an empty method of a Ray actor."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level="ERROR")
    try:

        @ray.remote(num_cpus=0)
        class Empty:
            def call(self) -> None:
                return None

        actor = Empty.remote()
        ray.get(actor.call.remote())
        times: list[float] = []
        for _ in range(rounds):
            begin = time.perf_counter()
            ray.get(actor.call.remote())
            times.append(time.perf_counter() - begin)
        return times
    finally:
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
