"""Identifiers: one type per kind of id, so that a rank is never passed where an epoch is meant."""

from __future__ import annotations

from typing import NewType

import msgspec

Rank = NewType("Rank", int)
Incarnation = NewType("Incarnation", str)
Epoch = NewType("Epoch", int)
Term = NewType("Term", int)
RequestId = NewType("RequestId", str)
SessionId = NewType("SessionId", bytes)
CallId = NewType("CallId", int)
Slot = NewType("Slot", int)
Handle = NewType("Handle", int)


class EngineId(msgspec.Struct, frozen=True, array_like=True):
    """One spawned engine core: the rank it holds and which process holds it."""

    rank: Rank
    incarnation: Incarnation

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.incarnation})"


class GroupStamp(msgspec.Struct, frozen=True, array_like=True):
    """Which process group: the epoch and the term in which it was formed. Every message about waves and votes carries it."""

    epoch: Epoch = Epoch(0)
    term: Term = Term(0)

    def __lt__(self, other: GroupStamp) -> bool:
        return (self.term, self.epoch) < (other.term, other.epoch)

    def __le__(self, other: GroupStamp) -> bool:
        return (self.term, self.epoch) <= (other.term, other.epoch)
