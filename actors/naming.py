"""Names in the Ray cluster: actors `pool/role/rank/incarnation`, placement groups the same behind a prefix."""

from __future__ import annotations

import enum
import re
from typing import Any, NamedTuple

import ray.util

from raycore.ids import EngineId, Incarnation, Rank

NAMESPACE = "raycore"
"""Ray's namespace of all named actors of raycore."""

GROUP_PREFIX = "raycore:"
"""Ray puts a placement group into its job's anonymous namespace, so its name has to say by itself whose it is."""

_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,47})/(controller|sentinel|engine)/(\d+)/([A-Za-z0-9]+)")


class Role(enum.StrEnum):
    """What a named actor is to its pool."""

    CONTROLLER = "controller"
    SENTINEL = "sentinel"
    ENGINE = "engine"


class ActorName(NamedTuple):
    """A parsed name."""

    pool: str
    role: Role
    rank: Rank
    incarnation: Incarnation

    def __str__(self) -> str:
        return f"{self.pool}/{self.role}/{self.rank}/{self.incarnation}"

    @property
    def engine(self) -> EngineId:
        """Identity of the engine core that has this name."""
        return EngineId(self.rank, self.incarnation)


def controller_name(pool: str) -> str:
    """The controller is found by the pool's name alone: it has no other rank or incarnation."""
    return str(ActorName(pool, Role.CONTROLLER, Rank(0), Incarnation("0")))


def sentinel_name(pool: str) -> str:
    """The actor whose life is the driver's (scoped pools)."""
    return str(ActorName(pool, Role.SENTINEL, Rank(0), Incarnation("0")))


def engine_name(pool: str, engine: EngineId) -> str:
    """The actor of one engine core."""
    return str(ActorName(pool, Role.ENGINE, engine.rank, engine.incarnation))


def group_name(pool: str, engine: EngineId) -> str:
    """The placement group of one engine core."""
    return GROUP_PREFIX + engine_name(pool, engine)


def parse_name(text: str) -> ActorName | None:
    """The parts of an actor's or placement group's name; None when it is not ours."""
    match = _NAME.fullmatch(text.removeprefix(GROUP_PREFIX))
    if match is None:
        return None
    return ActorName(match[1], Role(match[2]), Rank(int(match[3])), Incarnation(match[4]))


def named_actors(pool: str | None = None) -> list[ActorName]:
    """Live named actors of one pool, or of all; one blocking call to Ray's GCS."""
    rows: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    found = (parse_name(row["name"]) for row in rows if row["namespace"] == NAMESPACE)
    return sorted(name for name in found if name is not None and pool in {None, name.pool})
