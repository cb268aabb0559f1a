"""What `raycore doctor` says of Ray: whether there is a cluster to be found from here, what it has, and what pools left in it."""

from __future__ import annotations

import os
from pathlib import Path

import ray

from actors.groups import pool_groups
from actors.local_ray import ensure_ray, release_ray
from actors.naming import Role, named_actors
from raycore.doctor import Finding, Verdict
from raycore.errors import PoolNotFoundError

_CURRENT = Path("/tmp/ray/ray_current_cluster")
"""Where `ray start` says which cluster this machine belongs to."""


def examine_ray() -> list[Finding]:
    """Findings about the cluster that `launch` and `connect` would use here."""
    if not os.environ.get("RAY_ADDRESS") and not _CURRENT.exists():
        return [Finding("ray cluster", Verdict.OK, "none runs here: launch starts a local one, which ends with its process")]
    try:
        ensure_ray()
    except (PoolNotFoundError, ConnectionError, RuntimeError) as error:
        advice = "start it with `ray start --head`, or unset RAY_ADDRESS"
        return [Finding("ray cluster", Verdict.FAIL, str(error), advice)]
    try:
        return [_nodes(), *_pools()]
    finally:
        release_ray()


def _nodes() -> Finding:
    alive = [node for node in ray.nodes() if node["Alive"]]
    total, free = ray.cluster_resources(), ray.available_resources()
    rows = [f"{len(alive)} nodes"]
    rows += [f"{free.get(name, 0):g} of {total[name]:g} {name} free" for name in ("CPU", "GPU") if name in total]
    if not free.get("CPU"):
        return Finding("ray cluster", Verdict.WARN, ", ".join(rows), "engines need a free CPU each, or num_cpus_per_engine=0")
    return Finding("ray cluster", Verdict.OK, ", ".join(rows))


def _pools() -> list[Finding]:
    """Pools that run, and what is there of others whose controller is not."""
    names = named_actors()
    running = {name.pool for name in names if name.role is Role.CONTROLLER}
    others = ({name.pool for name in names} | {group.name.pool for group in pool_groups()}) - running
    findings = [Finding(f"pool {pool}", Verdict.OK, "runs") for pool in sorted(running)]
    findings += [
        Finding(f"pool {pool}", Verdict.WARN, "has actors or placement groups, and no controller", f"raycore cleanup {pool}")
        for pool in sorted(others)
    ]
    return findings
