"""How far the weights of this process's engine are loaded: written by whoever loads them, read by whoever shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import msgspec


class LoadProgress(msgspec.Struct, frozen=True):
    """Tensors loaded of how many; 0 of 0 before loading begins."""

    done: int = 0
    total: int = 0


class WeightProgress(msgspec.Struct, frozen=True):
    """Bytes of weights that came from peers, of how many, and how fast; and those that were read from disk."""

    bytes: int = 0
    of_bytes: int = 0
    bytes_per_s: float = 0.0
    from_disk_bytes: int = 0


def added(parts: Iterable[WeightProgress]) -> WeightProgress:
    """Of several engines together."""
    rows = list(parts)
    return WeightProgress(
        sum(row.bytes for row in rows),
        sum(row.of_bytes for row in rows),
        sum(row.bytes_per_s for row in rows),
        sum(row.from_disk_bytes for row in rows),
    )


class _Holder:
    """Replaced as a whole, so that another thread reads one consistent value."""

    def __init__(self) -> None:
        self.progress = LoadProgress()


_HERE = _Holder()


def load_progress() -> LoadProgress:
    """Of this process; an engine process has one engine."""
    return _HERE.progress


def counted(items: Iterable[Any]) -> Iterator[Any]:
    """The same items; each one taken is one more that is loaded."""
    total = len(items) if isinstance(items, Sized) else 0
    _HERE.progress = LoadProgress(0, total)
    for done, item in enumerate(items, start=1):
        yield item
        _HERE.progress = LoadProgress(done, max(total, done))


class WeightMeter:
    """Counts what comes from peers; written by the thread that takes it, read by any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = 0.0
        self.progress = WeightProgress()

    def begin(self, of_bytes: int) -> None:
        """So much is to come."""
        self._begun_s = self._clock()
        self.progress = WeightProgress(0, of_bytes)

    def add(self, nbytes: int) -> None:
        """So much more has come."""
        before = self.progress
        done = before.bytes + nbytes
        passed_s = self._clock() - self._begun_s
        self.progress = WeightProgress(done, before.of_bytes, done / passed_s if passed_s > 0 else 0.0)

    def loaded(self, from_disk_bytes: int) -> None:
        """The engine is there, and read so much from disk; what came from peers in vain counts no more."""
        if from_disk_bytes:
            self.progress = WeightProgress(from_disk_bytes=from_disk_bytes)
