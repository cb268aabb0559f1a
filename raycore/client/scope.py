"""How a client balances: over which of the pool's ranks, and by which policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never, get_args

from raycore.errors import ConfigurationError
from raycore.membership import Member
from raycore.routing.router import Router
from raycore.transport.endpoints import this_host

Mode = Literal["internal", "hybrid", "external"]


@dataclass(frozen=True)
class BalancingScope:
    """The ranks within a client's reach: all, those of its node, or one."""

    mode: Mode = "internal"
    rank: int | None = None
    host: str = ""

    def reaches(self, member: Member) -> bool:
        """Whether the client opens a session with this member."""
        match self.mode:
            case "internal":
                return True
            case "hybrid":
                return member.endpoints.host == self.host
            case "external":
                return member.engine.rank == self.rank
            case _:
                assert_never(self.mode)

    def __str__(self) -> str:
        match self.mode:
            case "internal":
                return "any rank"
            case "hybrid":
                return "a rank on this node (mode 'hybrid')"
            case "external":
                return f"rank {self.rank} (mode 'external')"
            case _:
                assert_never(self.mode)


@dataclass(frozen=True)
class Routing:
    """What a client is told of routing beyond what the pool says. `router` None: the pool's, with the pool's options."""

    router: str | Router | None = None
    options: Mapping[str, Any] | None = None
    scope: BalancingScope = BalancingScope()


def balancing_scope(mode: str, *, rank: int | None, local_only: bool) -> BalancingScope:
    """The scope that a caller asks for; ConfigurationError where the wishes contradict each other."""
    if mode not in get_args(Mode):
        msg = f"no balancing mode is called {mode!r}; there are {', '.join(map(repr, get_args(Mode)))}"
        raise ConfigurationError(msg)
    if local_only and mode == "external":
        msg = "local_only is mode 'hybrid'; mode 'external' is bound to one rank wherever it is"
        raise ConfigurationError(msg)
    if (mode == "external") != (rank is not None):
        msg = "mode 'external' needs the rank that this client is bound to" if rank is None else f"rank={rank} needs mode 'external'"
        raise ConfigurationError(msg)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        msg = f"a rank is an integer from 0 on, not {rank!r}"
        raise ConfigurationError(msg)
    if mode == "external":
        return BalancingScope("external", rank)
    if local_only or mode == "hybrid":
        return BalancingScope("hybrid", host=this_host())
    return BalancingScope()
