"""The coordinator actor: a `Coordinator` behind Ray calls; named, detached, restarted by Ray when its process dies."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import ray
import ray.exceptions

from actors.control_plane import pool_access
from actors.coordinator import Coordinator
from actors.naming import NAMESPACE, coordinator_name
from actors.setup import PoolSetup
from raycore.config import log_level
from raycore.logs import log_everything_as
from raycore.membership import Endpoints, Membership
from raycore.messages import Snapshot
from raycore.transport.coordinator_sockets import CoordinatorSockets


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class CoordinatorActor:
    """Ends by `ray.kill` with its pool; nothing waits for it."""

    def __init__(self, setup: PoolSetup) -> None:
        self._setup = setup
        config, keys = setup.config, setup.keys
        log_everything_as(config.pool, "coordinator", log_level(setup.environment))
        sockets = CoordinatorSockets(
            config.pool,
            node_ip=ray.util.get_node_ip_address(),
            tcp=config.tcp,
            server_keys=(keys.server_public, keys.server_secret),
            client_public_key=keys.client_public,
        )
        self._endpoints = sockets.bind()
        client_keys = (keys.client_public, keys.client_secret)
        self._coordinator = Coordinator(Membership(config.pool), sockets, client_keys, self._find)
        # Ray constructs async actors on their running loop, and constructs them again with the same arguments on a restart.
        self._coordinator.start()

    def __repr__(self) -> str:
        return f"coordinator {self._setup.config.pool}"

    async def set_membership(self, membership: Membership) -> None:
        """The controller decided."""
        self._coordinator.set_membership(membership)

    async def membership(self) -> Membership:
        """What it goes by."""
        return self._coordinator.membership

    async def endpoints(self) -> Endpoints:
        """Where it publishes; another place after a restart."""
        return self._endpoints

    async def snapshot(self) -> Snapshot:
        """The board as it is."""
        return self._coordinator.snapshot()

    async def ping(self) -> int:
        """This process's pid."""
        return os.getpid()

    async def _find(self) -> Membership:
        return (await pool_access(self._setup.config.pool)).membership


async def create_coordinator(setup: PoolSetup) -> Any:
    """The pool's coordinator, made where there is none; its handle."""
    options = CoordinatorActor.options(
        name=coordinator_name(setup.config.pool),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy="DEFAULT",
    )
    return await asyncio.to_thread(options.remote, setup)
