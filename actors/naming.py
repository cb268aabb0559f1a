"""Names in the Ray cluster: actors `pool/role/rank/incarnation` or `pool/client/name`, placement groups the same behind a prefix."""

from __future__ import annotations

import enum
import re
from typing import Any, NamedTuple

import ray.util

from raycore.errors import ConfigurationError
from raycore.ids import EngineId, Incarnation, Rank

NAMESPACE = "raycore"
"""Ray's namespace of all named actors of raycore."""

GROUP_PREFIX = "raycore:"
"""Ray puts a placement group into its job's anonymous namespace, so its name has to say by itself whose it is."""

_POOL = r"([A-Za-z0-9][A-Za-z0-9_.-]{0,47})"
_NAME = re.compile(_POOL + r"/(controller|coordinator|sentinel|engine|standby)/(\d+)/([A-Za-z0-9]+)")
_CLIENT_NAME = re.compile(_POOL + r"/client/([A-Za-z0-9][A-Za-z0-9_.-]{0,63})")


class Role(enum.StrEnum):
    """What a named actor is to its pool."""

    CONTROLLER = "controller"
    COORDINATOR = "coordinator"
    SENTINEL = "sentinel"
    ENGINE = "engine"
    STANDBY = "standby"
    """An engine core without a rank; one that was promoted keeps the name, and is found by its incarnation."""
    CLIENT = "client"


class ActorName(NamedTuple):
    """A parsed name. A client actor's has the client's own name instead of rank and incarnation."""

    pool: str
    role: Role
    rank: Rank = Rank(0)
    incarnation: Incarnation = Incarnation("0")
    client: str = ""

    def __str__(self) -> str:
        if self.role is Role.CLIENT:
            return f"{self.pool}/{self.role}/{self.client}"
        return f"{self.pool}/{self.role}/{self.rank}/{self.incarnation}"

    @property
    def engine(self) -> EngineId:
        """Identity of the engine core that has this name."""
        return EngineId(self.rank, self.incarnation)


def controller_name(pool: str) -> str:
    """The controller is found by the pool's name alone: it has no other rank or incarnation."""
    return str(ActorName(pool, Role.CONTROLLER))


def coordinator_name(pool: str) -> str:
    """There is one; Ray makes it anew under its name when it dies."""
    return str(ActorName(pool, Role.COORDINATOR))


def sentinel_name(pool: str) -> str:
    """The actor whose life is the driver's (scoped pools)."""
    return str(ActorName(pool, Role.SENTINEL))


def client_name(pool: str, client: str) -> str:
    """The client actor of this name. ConfigurationError for a name that cannot be one."""
    name = str(ActorName(pool, Role.CLIENT, client=client))
    if not _CLIENT_NAME.fullmatch(name):
        msg = f"a client's name has 1 to 64 of [A-Za-z0-9_.-] and starts with a letter or digit, not {client!r}"
        raise ConfigurationError(msg)
    return name


def engine_name(pool: str, engine: EngineId) -> str:
    """The actor of one engine core."""
    return str(ActorName(pool, Role.ENGINE, engine.rank, engine.incarnation))


def standby_name(pool: str, incarnation: Incarnation) -> str:
    """The actor of an engine core that began as a standby, whatever rank it has now."""
    return str(ActorName(pool, Role.STANDBY, incarnation=incarnation))


def group_name(actor: str) -> str:
    """The placement group of the engine core whose actor has this name."""
    return GROUP_PREFIX + actor


def parse_name(text: str) -> ActorName | None:
    """The parts of an actor's or placement group's name; None when it is not ours."""
    text = text.removeprefix(GROUP_PREFIX)
    match = _NAME.fullmatch(text)
    if match is None:
        client = _CLIENT_NAME.fullmatch(text)
        return None if client is None else ActorName(client[1], Role.CLIENT, client=client[2])
    return ActorName(match[1], Role(match[2]), Rank(int(match[3])), Incarnation(match[4]))


def named_actors(pool: str | None = None) -> list[ActorName]:
    """Live named actors of one pool, or of all; one blocking call to Ray's GCS."""
    rows: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    found = (parse_name(row["name"]) for row in rows if row["namespace"] == NAMESPACE)
    return sorted(name for name in found if name is not None and pool in {None, name.pool})
