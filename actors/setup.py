"""What actors are made from: the pool's configuration and keys, one engine's share of them, and what a rank asks of Ray."""

from __future__ import annotations

from typing import Any

import msgspec

from elastic.placement import RankDemand
from raycore.client.control import PoolAccess
from raycore.config import EngineSpec, PoolConfig
from raycore.ids import EngineId, Incarnation, Rank
from raycore.membership import Membership
from raycore.transport.keys import curve_keys

_RESERVED = ("CPU", "GPU", "memory")
"""Resources that Ray takes by options of their own."""


class PoolKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The pool's two CURVE pairs; over Ray only."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str

    def __repr__(self) -> str:
        return "PoolKeys(…)"

    @classmethod
    def make(cls) -> PoolKeys:
        """New pairs."""
        server, client = curve_keys(), curve_keys()
        return cls(server_public=server[0], server_secret=server[1], client_public=client[0], client_secret=client[1])


class PoolSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller is constructed from; Ray keeps it, so a restarted controller has it too."""

    config: PoolConfig
    keys: PoolKeys
    environment: dict[str, str]

    def __repr__(self) -> str:
        return f"PoolSetup(pool={self.config.pool!r})"

    def access(self, membership: Membership) -> PoolAccess:
        """What a client is given."""
        config = self.config
        return PoolAccess(
            membership=membership,
            client_public_key=self.keys.client_public,
            client_secret_key=self.keys.client_secret,
            model=config.model,
            engine=config.engine,
            on_engine_death=config.on_engine_death,
            allow_pickle=config.allow_pickle,
            router=config.router,
            router_options=config.router_options,
            limits=config.limits,
            timeouts=config.timeouts,
            health=config.health,
            metrics=config.metrics,
        )

    def engine(self, rank: Rank, incarnation: Incarnation, group_id: str, *, is_joining: bool = False) -> EngineSetup:
        """One engine core's share; `is_joining`: the pool runs already."""
        config = self.config
        spec = EngineSpec(
            pool=config.pool,
            rank=rank,
            incarnation=incarnation,
            engine=config.engine,
            model=config.model,
            engine_options=config.engine_options,
            device=config.device,
            tcp=config.tcp,
            limits=config.limits,
            timeouts=config.timeouts,
            health=config.health,
            server_public_key=self.keys.server_public,
            server_secret_key=self.keys.server_secret,
            client_public_key=self.keys.client_public,
            client_secret_key=self.keys.client_secret,
            allow_pickle=config.allow_pickle,
            debug_checks=config.debug_checks,
            warm_weights=config.warm == "weights",
            data_parallel_size=config.data_parallel_size,
            is_joining=is_joining,
        )
        environment = {**self.environment, **_apart(config, incarnation)}
        return EngineSetup(spec=spec, access=self.access(Membership(pool=config.pool)), group_id=group_id, environment=environment)


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine actor is constructed from. `access` has no members yet; `environment`: variables to set where the node has none."""

    spec: EngineSpec
    access: PoolAccess
    group_id: str
    environment: dict[str, str]

    def __repr__(self) -> str:
        return f"EngineSetup({self.spec!r})"

    def as_rank(self, rank: Rank) -> EngineSetup:
        """The same engine core with this rank."""
        return msgspec.structs.replace(self, spec=msgspec.structs.replace(self.spec, rank=rank))

    @property
    def engine(self) -> EngineId:
        """Identity of the engine core."""
        return EngineId(Rank(self.spec.rank), Incarnation(self.spec.incarnation))


def _apart(config: PoolConfig, incarnation: Incarnation) -> dict[str, str]:
    """Ranks that share a GPU: NCCL refuses two of one device unless it takes them for two hosts', which then talk through sockets."""
    is_shared = config.device == "cuda" and rank_demand(config).bundles[0].get("GPU", 0.0) < 1.0
    return {"NCCL_HOSTID": incarnation} if is_shared else {}


def rank_demand(config: PoolConfig) -> RankDemand:
    """The bundles of one rank: one per tensor-parallel worker."""
    wanted = {"CPU": config.num_cpus_per_engine, "GPU": 1.0 if config.device == "cuda" else 0.0, **config.resources_per_engine}
    # Ray refuses an empty bundle; every node has a byte of memory.
    bundle = {name: amount for name, amount in wanted.items() if amount > 0} or {"memory": 1.0}
    return RankDemand(bundles=(bundle,) * config.tensor_parallel_size, label_selector=config.label_selector)


def actor_resources(demand: RankDemand) -> dict[str, Any]:
    """Ray's actor options that take the rank's first bundle."""
    bundle = demand.bundles[0]
    return {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "memory": bundle.get("memory"),
        "resources": {name: amount for name, amount in bundle.items() if name not in _RESERVED},
    }
