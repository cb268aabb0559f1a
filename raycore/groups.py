"""Process groups of ranks in lockstep, as Protocols: what waves and engines need of the collectives below them. No torch."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Protocol, final, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from raycore.errors import LockstepError
from raycore.ids import GroupStamp, Rank

Int64s = NDArray[np.int64]


class GroupKind(enum.StrEnum):
    """The process groups of ranks in lockstep. With one process a rank, all of an epoch have the same members, each its own connections."""

    WORLD = "world"
    """Every process: weights that go to joiners."""
    DP = "dp"
    """The data-parallel ranks: the rounds of the waves."""
    EP = "ep"
    """The expert-parallel ranks: tokens to experts and back, in every step."""
    EPLB = "eplb"
    """The same ranks, for experts that move while steps go on."""
    HANDOVER = "handover"
    """Old and new members together, where an expert-parallel rank leaves: its experts go to the others in it, before the switch."""


EPOCH_KINDS = (GroupKind.WORLD, GroupKind.DP, GroupKind.EP, GroupKind.EPLB)
"""Those that every epoch has; a handover group is there between two."""


class Collective(Protocol):
    """One all-reduce in flight."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it is complete, after at most so long. LockstepError when it failed."""
        ...

    def notify(self, on_end: Callable[[], None]) -> None:
        """Call `on_end` once from any thread when it has ended, also when it has already."""
        ...


class ProcessGroup(Protocol):
    """The members of one group stamp, seen from one of them, on one thread. All must begin the same collectives in the same order."""

    @property
    def stamp(self) -> GroupStamp:
        """The epoch and term in which it was formed."""
        ...

    @property
    def rank(self) -> int:
        """This member's group rank, dense from 0."""
        ...

    @property
    def size(self) -> int:
        """How many members there are."""
        ...

    def begin_sum(self, values: Int64s) -> Collective:
        """Begin to sum int64 `values` [n] over all members, in place; they must not be touched until it has ended."""
        ...

    def sum(self, values: Int64s) -> None:
        """The same, blocking; LockstepError when it fails or takes longer than the group's limit."""
        ...

    def all_to_all(self, received: Any, sent: Any, received_rows: list[int], sent_rows: list[int]) -> None:
        """Give each member its rows of `sent`, and take each one's rows into `received`, both in the members' order; blocking.

        Contiguous tensors of the engine whose first dimension counts rows; `received` is written in place. LockstepError as for `sum`.
        """
        ...

    def close(self) -> None:
        """Leave; never waits for the others. Idempotent."""
        ...


@final
class GroupSet:
    """The groups of one stamp, seen from one member; closed together."""

    def __init__(self, stamp: GroupStamp, groups: Mapping[GroupKind, ProcessGroup]) -> None:
        self.stamp = stamp
        self._groups = dict(groups)

    def __getitem__(self, kind: GroupKind) -> ProcessGroup:
        return self._groups[kind]

    def with_group(self, kind: GroupKind, group: ProcessGroup) -> GroupSet:
        """These and one more."""
        return GroupSet(self.stamp, {**self._groups, kind: group})

    def leave(self, kind: GroupKind) -> None:
        """Close one of them, if it is among them. Idempotent."""
        group = self._groups.pop(kind, None)
        if group is not None:
            group.close()

    def get(self, kind: GroupKind) -> ProcessGroup | None:
        """One of them, or None: a rank that leaves has none of the next epoch's."""
        return self._groups.get(kind)

    def warm_up(self) -> None:
        """One collective on each group: connections are made and buffers exist. Blocks; LockstepError when a member is missing."""
        for kind, group in self._groups.items():
            ones = np.ones(1, np.int64)
            group.sum(ones)
            if ones[0] != group.size:
                msg = f"the {kind} group of {self.stamp} sums {ones[0]} ones over {group.size} members"
                raise LockstepError(msg)

    def close(self) -> None:
        """Leave all of them. Idempotent."""
        for group in self._groups.values():
            group.close()


class Reconfiguration(msgspec.Struct, frozen=True):
    """What an engine is told of the epoch that it prepares for: group rank = position in `ranks`."""

    stamp: GroupStamp
    ranks: tuple[Rank, ...]
    """The members, lowest rank first."""
    before: tuple[Rank, ...]
    """The members until then."""
    expert_plan: Any = None
    handover: tuple[Rank, ...] = ()
    """The ranks of the handover group, lowest first: `before` and `ranks` together, where an expert-parallel rank leaves."""


class LockstepEngine(Protocol):
    """What an engine with `info.sync_interval` > 0 has beside `Engine`."""

    def set_group(self, group: ProcessGroup | None) -> None:
        """Use this group for the collectives of coming steps; None: there is none, and no step comes. Called between steps.

        A `step` or `idle_step` whose collective fails raises LockstepError and must leave its sequences as they were before it.
        """
        ...


@runtime_checkable
class ElasticEngine(Protocol):
    """What an engine may have beside `set_group`, to take part in a switch of groups. One that has none is only given its new group.

    `prepare` runs on a thread of its own while steps go on, everything else on the step thread, between steps.
    """

    def prepare(self, reconfiguration: Reconfiguration, groups: GroupSet) -> None:
        """Build everything for the new epoch beside the old: connect, copy, warm. Blocks; what it raises undoes the operation."""
        ...

    def switch(self) -> None:
        """Go over to what was prepared; the old stays. Pointers move, nothing is built."""
        ...

    def switch_back(self) -> None:
        """A joiner was lost: the old again; what was prepared is let go."""
        ...

    def release(self) -> None:
        """Every member has confirmed: the old is let go."""
        ...

    def drop(self) -> None:
        """The operation was undone, perhaps in the middle of `prepare`: what was prepared is let go. Idempotent."""
        ...


@final
class Complete:
    """A collective that has ended."""

    def wait(self, timeout_s: float) -> bool:
        """It is complete."""
        del timeout_s
        return True

    def notify(self, on_end: Callable[[], None]) -> None:
        """It has ended already."""
        on_end()


def first_line(error: BaseException) -> str:
    """What torch says of a failure; stack traces follow it."""
    return str(error).strip().splitlines()[0][:300]


@final
class LocalGroup:
    """A group of one: what its member puts in is the sum."""

    def __init__(self, stamp: GroupStamp) -> None:
        self.stamp = stamp
        self.rank = 0
        self.size = 1
        self._is_closed = False

    def begin_sum(self, values: Int64s) -> Collective:
        """Nothing to add."""
        self.sum(values)
        return Complete()

    def sum(self, values: Int64s) -> None:
        """Nothing to add."""
        del values
        self._check()

    def all_to_all(self, received: Any, sent: Any, received_rows: list[int], sent_rows: list[int]) -> None:
        """Everything goes to oneself."""
        del received_rows, sent_rows
        self._check()
        received.copy_(sent)

    def _check(self) -> None:
        if self._is_closed:
            msg = "the group was left"
            raise LockstepError(msg)

    def close(self) -> None:
        """Leave."""
        self._is_closed = True


def as_lockstep(engine: Any) -> LockstepEngine:
    """The engine's lockstep side. TypeError when it declares lockstep and has none."""
    if not callable(getattr(engine, "set_group", None)):
        msg = f"engine {engine.info.engine!r} declares a sync_interval of {engine.info.sync_interval} and has no set_group"
        raise TypeError(msg)
    return engine
