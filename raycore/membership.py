"""Membership: which engine cores form the pool in one epoch, and which of two views is newer."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from raycore.engine import EngineInfo
from raycore.ids import EngineId, Epoch, GroupStamp, Rank, Term


class MemberState(enum.IntEnum):
    """What clients may do with a member."""

    SERVING = 0
    """Takes new requests."""
    LEAVING = 1
    """Finishes what it has and takes nothing new; serves again when the operation is undone."""
    RETIRING = 2
    """Likewise, and it is decided: it will be gone."""


class Endpoints(msgspec.Struct, frozen=True, array_like=True):
    """Where one engine core listens. `host` tells whether `ipc` paths mean anything here."""

    host: str
    requests_ipc: str
    beats_ipc: str
    requests_tcp: str = ""
    beats_tcp: str = ""
    server_key: str = ""
    """CURVE public key (Z85) of the pool's servers; needed for the TCP endpoints only."""
    requests_stream: str = ""
    """Path of the unix-stream socket for processes of this host."""


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One engine core of an epoch."""

    engine: EngineId
    endpoints: Endpoints
    info: EngineInfo
    pid: int
    state: MemberState = MemberState.SERVING


class GroupAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where the members of an epoch meet to form their process groups (ranks in lockstep): the stores that its group rank 0 serves.

    `ports`: of each kind of group (`raycore/groups.py: GroupKind`). `goes_back`: nothing is formed; the members go back to the groups that
    they kept at the last switch.
    """

    stamp: GroupStamp
    host: str
    ports: dict[str, int]
    goes_back: bool = False


class Membership(msgspec.Struct, frozen=True, array_like=True):
    """The members of one epoch as one controller life (term) decided them."""

    pool: str
    epoch: Epoch = Epoch(0)
    term: Term = Term(0)
    members: tuple[Member, ...] = ()
    departed: tuple[Departure, ...] = ()
    """Engines that left not by choice, newest last, so that a client can name the cause; at most the last 16."""
    group: GroupAddress | None = None
    """The members' process group, where they step in lockstep; a later term keeps an earlier one's while the members stay the same."""
    joining: tuple[Member, ...] = ()
    """Engine cores that are about to become members: they get no requests, and every call that changes the engines of all ranks."""

    def supersedes(self, other: Membership) -> bool:
        """Whether this view replaces `other`: the higher (term, epoch) wins."""
        return (self.term, self.epoch) > (other.term, other.epoch)

    def member(self, rank: Rank) -> Member | None:
        """The member that holds `rank`."""
        return next((m for m in self.members if m.engine.rank == rank), None)

    def serves(self, engine: EngineId) -> bool:
        """Whether this very incarnation is a member that takes new requests."""
        return any(m.engine == engine and m.state is MemberState.SERVING for m in self.members)

    @property
    def is_in_lockstep(self) -> bool:
        """Whether the members must step together."""
        return any(m.info.sync_interval for m in self.members)

    @property
    def is_expert_parallel(self) -> bool:
        """Whether each member holds experts that the others need."""
        return any(m.info.is_expert_parallel for m in self.members)

    def lost_with(self, engine: EngineId) -> Rank | None:
        """The rank whose loss took this engine with it, if one did."""
        return next((departure.lost_with for departure in self.departed if departure.engine == engine), None)

    def lost_with_another(self) -> bool:
        """Whether the pool is over because one rank was lost that all others need."""
        return not self.members and any(departure.lost_with is not None for departure in self.departed)

    def group_rank(self, engine: EngineId) -> int | None:
        """Position among the members, which are kept in the order of their ranks; None when it is no member."""
        return next((index for index, m in enumerate(self.members) if m.engine == engine), None)

    def has(self, engine: EngineId) -> bool:
        """Whether this very incarnation is a member."""
        return any(m.engine == engine for m in self.members)

    def is_joining(self, engine: EngineId) -> bool:
        """Whether this very incarnation is about to become a member."""
        return any(m.engine == engine for m in self.joining)


class Departure(msgspec.Struct, frozen=True, array_like=True):
    """An engine that was fenced, and why."""

    engine: EngineId
    cause: str
    lost_with: Rank | None = None
    """It went because this rank was lost, whose cause this is: no rank of an expert-parallel pool can go on without the others."""


class RankType(enum.StrEnum):
    """What a rank is after a reconfiguration."""

    KEEP = "keep_current_rank"
    """A member: one that stays, or one that joins."""
    SHUTDOWN = "shutdown_current_rank"
    """It leaves: it votes for the switch with the others, and is in no group after it."""


class Handover(msgspec.Struct, frozen=True):
    """Where old and new members meet, so that what a leaver alone holds gets to who stays; group rank = position in `ranks`."""

    address: GroupAddress
    ranks: tuple[Rank, ...]


class ReconfigureDistributedRequest(msgspec.Struct, frozen=True):
    """Prepare for a topology that may come to be, while the present one serves.

    `membership`: the next one as a whole: epoch, members, where their groups meet (`ports`); `before`: the ranks that step together now.
    """

    operation: str
    term: Term
    rank_type: RankType
    membership: Membership
    before: tuple[Rank, ...] = ()
    expert_plan: Any = None
    handover: Handover | None = None
