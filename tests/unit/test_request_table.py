"""The split of a step's columns by session, against a model that keeps a list per request."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from raycore.config import Limits
from raycore.core.requests import RequestTable
from raycore.core.sessions import Session
from raycore.engine import Detail, FinishReason, StepOutput
from raycore.messages import Attach, StepColumns


@dataclass
class Reader:
    """What a client makes of its columns."""

    session: Session
    streams: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, int] = field(default_factory=dict)
    details: dict[int, Detail] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)

    def take(self, columns: StepColumns) -> None:
        for slot, offset in columns.offsets:
            assert self.streams[slot] == list(range(-offset, 0)), "an offset after the first output, or a wrong one"
        self.details.update(columns.details)
        if columns.tokens:
            if columns.slots:
                self.slots = np.frombuffer(columns.slots, np.uint32).tolist()
            tokens = np.frombuffer(columns.tokens, np.uint32).tolist()
            counts = np.frombuffer(columns.counts, np.uint32).tolist() if columns.counts else [1] * len(self.slots)
            assert len(counts) == len(self.slots)
            assert sum(counts) == len(tokens)
            for slot, count in zip(self.slots, counts, strict=True):
                self.streams[slot].extend(tokens[:count])
                del tokens[:count]
        for slot, reason in zip(np.frombuffer(columns.finished, np.uint32).tolist(), columns.reasons, strict=True):
            assert slot not in self.ended
            self.ended[slot] = reason


@dataclass
class Live:
    reader: Reader
    slot: int
    expected: list[int]


class World:
    """An engine, a table and some sessions, driven by a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.table = RequestTable()
        self.readers: list[Reader] = []
        self.live: dict[int, Live] = {}
        self.batch = np.empty(0, np.uint32)
        self.number = 0
        self.checked = 0

    def session(self) -> None:
        self.number += 1
        attach = Attach(1, "p", "i", "c", 30.0)
        self.readers.append(Reader(Session(self.number.to_bytes(16, "big"), attach, Limits(), 0.0)))  # type: ignore[arg-type]

    def add(self) -> None:
        if not self.readers:
            return
        reader = self.random.choice(self.readers)
        slot = self.random.choice([s for s in range(40) if s not in reader.session.handle_of])
        delivered = self.random.choice([0, 0, 0, 3])
        handle = self.table.add(reader.session, slot, f"r{slot}", delivered)
        assert handle not in self.live, "a handle in use was given out"
        reader.streams[slot] = list(range(-delivered, 0))
        reader.ended.pop(slot, None)
        reader.details.pop(slot, None)
        self.live[handle] = Live(reader, slot, list(reader.streams[slot]))
        self.rebuild()

    def remove(self) -> None:
        if self.live:
            handle = self.random.choice(list(self.live))
            one = self.live.pop(handle)
            assert self.table.remove(handle) == (one.reader.session, one.slot)
            assert self.table.remove(handle) is None
            assert one.reader.streams[one.slot] == one.expected
            self.rebuild()

    def leave(self) -> None:
        if len(self.readers) > 1:
            reader = self.readers.pop(self.random.randrange(len(self.readers)))
            for handle in [handle for handle, one in self.live.items() if one.reader is reader]:
                self.table.remove(handle)
                del self.live[handle]
            self.table.forget_session(reader.session)
            self.rebuild()

    def rebuild(self) -> None:
        handles = list(self.live)
        self.random.shuffle(handles)
        self.batch = np.array(handles, np.uint32)

    def step(self) -> None:
        handles = self.batch.tolist()
        ragged = self.random.random() < 0.3
        counts = [self.random.randint(1, 3) if ragged else 1 for _ in handles]
        tokens: list[int] = []
        for handle, count in zip(handles, counts, strict=True):
            new = [self.random.randrange(1 << 32) for _ in range(count)]
            tokens += new
            self.live[handle].expected += new
        ends = [handle for handle in self.live if self.random.random() < 0.08]
        self.random.shuffle(ends)
        reasons = bytes(self.random.choice(list(FinishReason)) for _ in ends)
        details = [(handle, Detail(stop_reason=handle)) for handle in ends if self.random.random() < 0.5]
        output = StepOutput(
            self.batch,
            np.array(tokens, np.uint32),
            np.array(counts, np.uint32) if ragged else None,
            np.array(ends, np.uint32),
            reasons,
            details,
        )
        shares = self.table.columns(output, 1)
        assert len({session.id for session, _ in shares}) == len(shares), "two shares for one session"
        for session, columns in shares:
            next(reader for reader in self.readers if reader.session is session).take(columns)
        for one in self.live.values():
            assert one.reader.streams[one.slot] == one.expected
            self.checked += 1
        said = dict(details)
        for handle, reason in zip(ends, reasons, strict=True):
            one = self.live.pop(handle)
            assert one.reader.ended.pop(one.slot) == reason
            assert one.reader.details.get(one.slot) == said.get(handle)
        if ends:
            self.rebuild()


@pytest.mark.parametrize("seed", range(12))
def test_every_session_gets_its_own_tokens_in_order_and_each_end_once(seed: int) -> None:
    world = World(seed)
    world.session()
    moves = [world.step] * 8 + [world.add] * 5 + [world.remove, world.session, world.leave]
    for _ in range(600):
        world.random.choice(moves)()
        world.table.check_invariants([reader.session for reader in world.readers])
        assert len(world.table) == len(world.live)
    assert world.checked > 500


def test_an_unchanged_batch_leaves_the_slots_out() -> None:
    world = World(0)
    world.session()
    world.session()
    sessions = [reader.session for reader in world.readers]
    handles = np.array([world.table.add(session, slot, "r", 0) for session in sessions for slot in (5, 9)], np.uint32)
    output = StepOutput(handles, np.arange(4, dtype=np.uint32))
    first = dict(world.table.columns(output, 1))
    second = dict(world.table.columns(output, 2))
    assert all(len(first[session].slots) == 8 for session in sessions)
    assert all(second[session].slots == b"" for session in sessions)
    other = dict(world.table.columns(StepOutput(handles.copy(), output.tokens), 3))
    assert all(len(other[session].slots) == 8 for session in sessions)


def test_more_requests_than_the_table_begins_with_are_kept() -> None:
    world = World(0)
    world.session()
    session = world.readers[0].session
    handles = [world.table.add(session, slot, "r", 0) for slot in range(5000)]
    assert len(set(handles)) == 5000
    world.table.check_invariants([session])
    assert all(world.table.remove(handle) == (session, slot) for slot, handle in enumerate(handles))
    assert len(world.table) == 0
