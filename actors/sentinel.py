"""The sentinel of a scoped pool: an actor that its driver owns, so that Ray ends it with the driver."""

from __future__ import annotations

import asyncio
import os

import ray


@ray.remote(num_cpus=0, max_restarts=0)
class SentinelActor:
    """Does nothing; its death is the message."""

    async def hold(self) -> None:
        """Never returns; fails for the controller within milliseconds of the driver's death."""
        await asyncio.get_running_loop().create_future()

    async def pid(self) -> int:
        """Its process."""
        return os.getpid()
