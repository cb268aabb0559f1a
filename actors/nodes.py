"""The cluster as Ray sees it: node snapshots for placement, and the processes of actors. Every function blocks for a call to the GCS."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
import ray._private.state as ray_state  # no public API gives free resources per node, or an actor's pid, without the dashboard

from actors.naming import ActorName, parse_name
from elastic.placement import NodeSnapshot

NODE_LABEL = "ray.io/node-id"
"""Ray's own label of every node; a selector on it pins a bundle."""


_CONNECT_S = 3.0
"""A node of the same cluster answers in milliseconds, or in a second where a packet was lost; one that is gone refuses, or is silent."""
_ASKED_AT_ONCE = 32
_REMEMBER_DEAD_S = 60.0
"""A process of an actor that died longer ago is gone, and its pid may be another's."""


class ActorProcess(NamedTuple):
    """The process behind a named actor of ours."""

    name: ActorName
    pid: int
    node_id: str


def cluster_nodes() -> list[NodeSnapshot]:
    """Every node; this process's node first, so that `pack` starts where the caller is, then in order of address."""
    available = ray_state.available_resources_per_node()
    draining = draining_nodes()
    here = ray.get_runtime_context().get_node_id()
    rows = sorted(ray.nodes(), key=lambda row: (row["NodeID"] != here, row["NodeManagerAddress"], row["NodeID"]))
    return [
        NodeSnapshot(
            node_id=row["NodeID"],
            ip=row["NodeManagerAddress"],
            total=row["Resources"],
            available=available.get(row["NodeID"], {}),
            labels=row.get("Labels", {}),
            alive=row["Alive"],
            port=row["NodeManagerPort"],
            is_draining=row["NodeID"] in draining,
        )
        for row in rows
    ]


def unreachable(nodes: Sequence[NodeSnapshot]) -> set[str]:
    """Ids of those whose part of Ray takes no connection: they are lost, which Ray itself notices some 15 s later."""

    def is_lost(node: NodeSnapshot) -> bool:
        try:
            with socket.create_connection((node.ip, node.port), _CONNECT_S):
                return False
        except OSError:
            return True

    asked = [node for node in nodes if node.port]
    if not asked:
        return set()
    with ThreadPoolExecutor(min(len(asked), _ASKED_AT_ONCE)) as threads:
        return {node.node_id for node, lost in zip(asked, threads.map(is_lost, asked), strict=True) if lost}


def draining_nodes() -> set[str]:
    """Ids of nodes that Ray was told to take away soon; it starts nothing new on them."""
    return set(ray_state.state.get_draining_nodes())


def actor_processes(pool: str) -> list[ActorProcess]:
    """Processes of the pool's named actors, those that died just now too: a killed actor's process may linger."""
    found: list[ActorProcess] = []
    rows: dict[str, dict[str, Any]] = ray_state.actors()
    for row in rows.values():
        name = parse_name(row["Name"])
        if name is None or name.pool != pool or not row["Pid"]:
            continue
        if row["State"] != "DEAD" or time.time() - row["EndTime"] / 1000 < _REMEMBER_DEAD_S:
            found.append(ActorProcess(name, row["Pid"], row["Address"]["NodeID"]))
    return found


def is_restarted() -> bool:
    """Whether the calling actor was constructed before, in a process that died."""
    # `was_current_actor_reconstructed` asks the same through a deprecated property and warns into the driver's terminal.
    return bool(ray_state.actors(ray.get_runtime_context().get_actor_id()).get("NumRestarts", 0))
