"""Placement groups: one per rank, made, found and removed by id, since Ray finds them by name only within a job's namespace."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from actors.naming import ActorName, group_name, parse_name
from actors.nodes import NODE_LABEL
from actors.remote import remote_call
from elastic.placement import UNPLANNED, RankDemand
from raycore.ids import EngineId

_POLL_S = 0.02


class GroupRow(NamedTuple):
    """A placement group of ours that is not removed."""

    name: ActorName
    group_id: str
    state: str


async def create_group(actor: str, demand: RankDemand, node_id: str) -> PlacementGroup:
    """Ask for the group of this actor on the planned node, or on any where it is UNPLANNED; it may not be ready yet."""
    pinned = {} if node_id == UNPLANNED else {NODE_LABEL: node_id}
    selector = {**demand.label_selector, **pinned}
    return await asyncio.to_thread(
        placement_group,
        [dict(bundle) for bundle in demand.bundles],
        strategy=demand.strategy,
        name=group_name(actor),
        lifetime="detached",
        bundle_label_selector=[selector] * len(demand.bundles),
    )


async def wait_ready(group: PlacementGroup, *, limit_s: float, engine: EngineId, node_id: str = UNPLANNED) -> None:
    """Wait until the group's resources are held; DeadlineError after `limit_s`, which names the node where there is one."""
    where = "" if node_id == UNPLANNED else f" on node {node_id}"
    await remote_call(group.ready(), limit_s=limit_s, what=f"{engine}: its placement group{where}")


async def node_of(group: PlacementGroup) -> str:
    """The node of a ready group's first bundle."""
    row = await asyncio.to_thread(placement_group_table, group)
    return row["bundles_to_node_id"][0]


def pool_groups(pool: str | None = None) -> list[GroupRow]:
    """The pool's (or every pool's) groups that hold or want resources; one blocking call to Ray's GCS."""
    rows = ((parse_name(row["name"]), group_id, row["state"]) for group_id, row in placement_group_table().items())
    return [GroupRow(name, group_id, state) for name, group_id, state in rows if name and state != "REMOVED" and pool in {None, name.pool}]


async def remove_group(group_id: str, *, limit_s: float) -> bool:
    """Remove a group and see it go; whether it went. One that is gone already is fine."""
    group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id)))
    await asyncio.to_thread(remove_placement_group, group)
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        row = await asyncio.to_thread(placement_group_table, group)
        if row.get("state", "REMOVED") == "REMOVED":
            return True
        await asyncio.sleep(_POLL_S)
    return False
