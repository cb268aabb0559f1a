"""Room for ranks: the nodes that take them, and what is said where none does."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from actors.nodes import cluster_nodes, unreachable
from actors.setup import rank_demand
from elastic.placement import NodeSnapshot, PlacementPlan, Shortage, plan_partly, plan_placement
from raycore.config import PoolConfig
from raycore.errors import CapacityError

logger = logging.getLogger(__name__)

_POLL_S = 0.25
Plan = TypeVar("Plan", PlacementPlan, PlacementPlan | Shortage)


class Capacity:
    """The cluster as one pool's ranks would fill it; asked on the controller's event loop."""

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._demand = rank_demand(config)

    async def nodes(self, count: int) -> Sequence[str]:
        """Nodes for `count` more ranks. With `Timeouts.new_nodes_s`, UNPLANNED for those that must wait for a node to come."""
        if not self._config.timeouts.new_nodes_s:
            return await self.present_nodes(count)
        strategy = self._config.node_strategy
        plan = await asyncio.to_thread(self._on_reachable, lambda nodes: plan_partly(nodes, self._demand, count, strategy))
        return plan.nodes

    async def present_nodes(self, count: int) -> Sequence[str]:
        """The same of nodes that are there. What can never fit is refused at once; a busy cluster is waited for until the limit."""
        until_s = time.monotonic() + self._config.timeouts.capacity_s
        while True:
            plan = await self._plan(count)
            if isinstance(plan, PlacementPlan):
                return plan.nodes
            if plan.is_infeasible or time.monotonic() >= until_s:
                raise CapacityError(plan.text)
            await asyncio.sleep(_POLL_S)

    async def no_node_came(self) -> CapacityError:
        """What to say of a rank whose group waited in vain."""
        plan = await self._plan(1)
        waited = f"no node came within {self._config.timeouts.new_nodes_s:g} s"
        return CapacityError(f"{waited}: {plan.text}" if isinstance(plan, Shortage) else f"{waited} for a placement group to get ready")

    async def _plan(self, count: int) -> PlacementPlan | Shortage:
        strategy = self._config.node_strategy
        return await asyncio.to_thread(self._on_reachable, lambda nodes: plan_placement(nodes, self._demand, count, strategy))

    @staticmethod
    def _on_reachable(plan: Callable[[Sequence[NodeSnapshot]], Plan]) -> Plan:
        """The plan without nodes that are lost and still look alive; only those that it would use are asked."""
        nodes = cluster_nodes()
        were_lost: set[str] = set()
        while True:
            found = plan(nodes)
            if were_lost and isinstance(found, Shortage):
                return dataclasses.replace(found, is_infeasible=False)  # that is Ray's to say, once it knows that they are lost
            used = set(found.nodes) if isinstance(found, PlacementPlan) else set[str]()
            lost = unreachable([node for node in nodes if node.node_id in used])
            if not lost:
                return found
            logger.warning("nodes %s are lost, which Ray has not noticed yet: nothing is placed there", sorted(lost))
            were_lost |= lost
            nodes = [dataclasses.replace(node, alive=node.alive and node.node_id not in lost) for node in nodes]
