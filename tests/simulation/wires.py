"""Process groups of simulated ranks: a collective is complete when every member began it, and fails when one is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from raycore.errors import LockstepError
from raycore.groups import Int64s
from raycore.ids import EngineId, GroupStamp

HOP_S = 0.0002


class Wire:
    """One group: its collectives in order. Members that are not in the same one are found out by what they sum."""

    def __init__(self, stamp: GroupStamp, kind: str, members: tuple[EngineId, ...]) -> None:
        self.stamp = stamp
        self.kind = kind
        self.members = members
        self.ends: dict[EngineId, WireEnd] = {}
        self.rounds: dict[int, dict[EngineId, Work]] = {}
        self.is_cut = False

    def put(self, engine: EngineId, number: int, work: Work) -> None:
        if self.is_cut:
            work.fail()
            return
        here = self.rounds.setdefault(number, {})
        here[engine] = work
        if len(here) == len(self.members):
            del self.rounds[number]
            total = sum(each.values for each in here.values())
            for each in here.values():
                each.complete(total)

    def cut(self) -> None:
        """A member closed its end, or died: whoever waits fails, and so does whoever comes."""
        if self.is_cut:
            return
        self.is_cut = True
        for here in self.rounds.values():
            for work in here.values():
                work.fail()
        self.rounds.clear()


class Work:
    """One member's part in one collective."""

    def __init__(self, values: Int64s) -> None:
        self.values = values.copy()
        self._into = values
        self._state = "pending"
        self._on_end: list[Callable[[], None]] = []

    def complete(self, total: Int64s) -> None:
        asyncio.get_running_loop().call_later(HOP_S, self._end, "done", total)

    def fail(self) -> None:
        asyncio.get_running_loop().call_later(HOP_S, self._end, "failed", None)

    def wait(self, timeout_s: float) -> bool:
        del timeout_s
        if self._state == "failed":
            raise LockstepError("a member is gone")
        return self._state == "done"

    def notify(self, on_end: Callable[[], None]) -> None:
        self._on_end.append(on_end)
        if self._state != "pending":
            on_end()

    def _end(self, state: str, total: Int64s | None) -> None:
        if self._state != "pending":
            return
        if total is not None:
            self._into[:] = total
        self._state = state
        for on_end in self._on_end:
            on_end()


class WireEnd:
    """A `ProcessGroup` of one simulated rank."""

    def __init__(self, wire: Wire, engine: EngineId) -> None:
        self.wire = wire
        self.stamp = wire.stamp
        self.rank = wire.members.index(engine)
        self.size = len(wire.members)
        self._engine = engine
        self.begun = 0
        self.is_closed = False
        wire.ends[engine] = self

    def begin_sum(self, values: Int64s) -> Work:
        if self.is_closed:
            raise LockstepError("the group was left")
        work = Work(values)
        self.wire.put(self._engine, self.begun, work)
        self.begun += 1
        return work

    def sum(self, values: Int64s) -> None:
        raise NotImplementedError("simulated ranks do not block")

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.wire.cut()
