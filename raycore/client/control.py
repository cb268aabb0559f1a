"""What a client needs of the control plane, as a Protocol: Ray behind it in a pool, nothing behind it in process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from raycore.config import DEFAULT_ROUTER, HealthConfig, Limits, Timeouts
from raycore.ids import EngineId
from raycore.membership import Endpoints, Membership

LOOP_ENDED = "its step loop ended"
"""The cause of a process that ended by itself, as one does that leaves the pool."""


class PoolAccess(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is given to reach a pool: its members, and the keys for TCP. Travels over Ray only."""

    membership: Membership
    client_public_key: str = ""
    client_secret_key: str = ""
    model: str | None = None
    engine: str = ""
    on_engine_death: str = "fail"
    allow_pickle: bool = False
    router: str = DEFAULT_ROUTER
    router_options: dict[str, Any] = {}
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    health: HealthConfig = HealthConfig()
    metrics: bool = False
    """Whether clients report what they measure, where the control plane has somewhere to report it to."""

    def __repr__(self) -> str:
        return f"PoolAccess(pool={self.membership.pool!r}, epoch={self.membership.epoch})"


class ScalingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a scaling operation did. `phases_s`: seconds that each phase took, in order."""

    operation: str
    ranks: tuple[int, ...]
    """Who serves now."""
    joined: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    phases_s: dict[str, float] = {}
    weight_bytes: int = 0
    """That joiners took from their peers; experts of an expert-parallel model, which move with the plan, not counted."""
    weight_bytes_from_disk: int = 0


class ControlPlane(Protocol):
    """Death notices, suspicions and the pool's membership; every method is called on the client's event loop."""

    def watch(self, engine: EngineId, on_death: Callable[[EngineId, str], None]) -> None:
        """Call `on_death(engine, cause)` once on the event loop when the engine's process ends for any reason."""
        ...

    def forget(self, engine: EngineId) -> None:
        """Stop watching."""
        ...

    async def report_suspect(self, engine: EngineId, cause: str) -> None:
        """Tell the controller that this engine looks hung from here; never raises, never waits for long."""
        ...

    async def refresh(self) -> Membership | None:
        """The newest membership that can be had, from the controller or else from any named engine; None when nobody answers in time."""
        ...

    async def scale(self, target: int) -> ScalingReport:
        """Have `target` ranks serve; see `EngineCoreClient.scale_elastic_ep`."""
        ...

    async def remove_ranks(self, ranks: tuple[int, ...]) -> ScalingReport:
        """Have these ranks leave."""
        ...

    async def coordinator(self) -> Endpoints | None:
        """Where the pool's coordinator publishes; None when there is none, or it does not answer in time."""
        ...

    async def shutdown_pool(self, drain_s: float) -> None:
        """Ask the controller to end the pool; returns when nothing of it is left."""
        ...

    async def close(self) -> None:
        """Release watches, tasks and handles; the pool goes on."""
        ...
