"""What a client needs of the control plane, as a Protocol: Ray behind it in a pool, nothing behind it in process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from raycore.config import HealthConfig, Limits, Timeouts
from raycore.ids import EngineId
from raycore.membership import Membership


class PoolAccess(msgspec.Struct, frozen=True, kw_only=True):
    """What a client is given to reach a pool: its members, and the keys for TCP. Travels over Ray only."""

    membership: Membership
    client_public_key: str = ""
    client_secret_key: str = ""
    model: str | None = None
    engine: str = ""
    on_engine_death: str = "fail"
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    health: HealthConfig = HealthConfig()

    def __repr__(self) -> str:
        return f"PoolAccess(pool={self.membership.pool!r}, epoch={self.membership.epoch})"


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

    async def shutdown_pool(self, drain_s: float) -> None:
        """Ask the controller to end the pool; returns when nothing of it is left."""
        ...

    async def close(self) -> None:
        """Release watches, tasks and handles; the pool goes on."""
        ...
