"""A pool's client actors as others see them."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from actors.naming import NAMESPACE, ActorName, Role, named_actors
from actors.remote import remote_call
from raycore.errors import RaycoreError

_STATUS_S = 2.0
"""A client actor that does not answer in this time is shown as such."""


async def client_statuses(pool: str) -> list[dict[str, Any]]:
    """What each client actor of a pool says of itself; one that does not answer is named with the reason."""
    names = [name for name in await asyncio.to_thread(named_actors, pool) if name.role is Role.CLIENT]

    async def ask(name: ActorName) -> dict[str, Any]:
        try:
            actor = await asyncio.to_thread(ray.get_actor, str(name), NAMESPACE)
            return await remote_call(actor.status.remote(), limit_s=_STATUS_S, what=f"{name}")
        except (RaycoreError, ValueError) as error:
            return {"name": name.client, "pool": pool, "error": str(error)}

    return list(await asyncio.gather(*(ask(name) for name in names)))
