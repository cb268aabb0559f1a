"""Membership: which engine cores form the pool in one epoch, and which of two views is newer."""

from __future__ import annotations

import enum

import msgspec

from raycore.engine import EngineInfo
from raycore.ids import EngineId, Epoch, Rank, Term


class MemberState(enum.IntEnum):
    """What clients may do with a member."""

    SERVING = 0
    """Takes new requests."""
    LEAVING = 1
    """Finishes what it has; takes nothing new."""


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


class Membership(msgspec.Struct, frozen=True, array_like=True):
    """The members of one epoch as one controller life (term) decided them."""

    pool: str
    epoch: Epoch = Epoch(0)
    term: Term = Term(0)
    members: tuple[Member, ...] = ()
    departed: tuple[Departure, ...] = ()
    """Engines that left not by choice, newest last, so that a client can name the cause; at most the last 16."""

    def supersedes(self, other: Membership) -> bool:
        """Whether this view replaces `other`: the higher (term, epoch) wins."""
        return (self.term, self.epoch) > (other.term, other.epoch)

    def member(self, rank: Rank) -> Member | None:
        """The member that holds `rank`."""
        return next((m for m in self.members if m.engine.rank == rank), None)

    def has(self, engine: EngineId) -> bool:
        """Whether this very incarnation is a member."""
        return any(m.engine == engine for m in self.members)


class Departure(msgspec.Struct, frozen=True, array_like=True):
    """An engine that was fenced, and why."""

    engine: EngineId
    cause: str
