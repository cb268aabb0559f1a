"""Where ranks go: nodes and demands in, a plan or a shortage in words out. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

NodeStrategy = Literal["pack", "spread", "strict"]

UNPLANNED = ""
"""In place of a node's id: Ray finds the rank a node, or its autoscaler adds one."""
_EPSILON = 1e-4
"""Ray counts resources in ten-thousandths."""
_UNBOUNDED = 1 << 30
"""Ranks that fit where a rank needs nothing."""
_SET = re.compile(r"(!?)in\((.*)\)")


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """One node at one moment, as Ray reports it."""

    node_id: str
    ip: str
    total: Mapping[str, float]
    available: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    alive: bool = True
    port: int = 0
    """Where its part of Ray listens; 0: not known."""
    is_draining: bool = False
    """Ray takes it away soon, and starts nothing on it."""

    @property
    def takes_ranks(self) -> bool:
        """Whether anything may be placed here."""
        return self.alive and not self.is_draining


@dataclass(frozen=True, slots=True)
class RankDemand:
    """What one rank takes: the bundles of its placement group, and the node labels that they need."""

    bundles: tuple[Mapping[str, float], ...]
    strategy: str = "STRICT_PACK"
    label_selector: Mapping[str, str] = field(default_factory=dict)

    def total(self) -> dict[str, float]:
        """The sum over the bundles; resources of which nothing is asked are left out."""
        names = {name for bundle in self.bundles for name in bundle}
        sums = {name: sum(bundle.get(name, 0.0) for bundle in self.bundles) for name in sorted(names)}
        return {name: amount for name, amount in sums.items() if amount > 0}


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """The node id of every rank, in order of ranks; UNPLANNED for those that no node takes yet."""

    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why there is no plan. `is_infeasible`: not even an idle cluster would do, so that waiting is of no use."""

    is_infeasible: bool
    text: str


def plan_placement(nodes: Sequence[NodeSnapshot], demand: RankDemand, count: int, node_strategy: NodeStrategy) -> PlacementPlan | Shortage:
    """A node for each of `count` ranks: `pack` fills nodes in order, `spread` levels them, `strict` uses every used node equally."""
    eligible = [node for node in nodes if node.takes_ranks and matches(node.labels, demand.label_selector)]
    need = demand.total()
    now = _distribute([(n.node_id, _room(n.available, need)) for n in eligible], count, node_strategy)
    if now is not None:
        return PlacementPlan(now)
    ever = _distribute([(n.node_id, _room(n.total, need)) for n in eligible], count, node_strategy)
    return Shortage(is_infeasible=ever is None, text=_explain(nodes, demand, count, node_strategy, is_infeasible=ever is None))


def plan_partly(nodes: Sequence[NodeSnapshot], demand: RankDemand, count: int, node_strategy: NodeStrategy) -> PlacementPlan:
    """A node for as many of the ranks as there is room for now; the last ones wait for nodes that are to come."""
    eligible = [node for node in nodes if node.takes_ranks and matches(node.labels, demand.label_selector)]
    rooms = [(node.node_id, _room(node.available, demand.total())) for node in eligible]
    now = min(count, sum(room for _, room in rooms))
    return PlacementPlan((*(_distribute(rooms, now, node_strategy) or ()), *([UNPLANNED] * (count - now))))


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector of Ray's grammar: `x`, `!x`, `in(a,b)`, `!in(a,b)`."""
    return all(_accepts(wanted, labels.get(key)) for key, wanted in selector.items())


def _accepts(wanted: str, actual: str | None) -> bool:
    listed = _SET.fullmatch(wanted.strip())
    if listed is not None:
        among = actual in {value.strip() for value in listed[2].split(",")}
        return among != bool(listed[1])
    if wanted.startswith("!"):
        return actual != wanted[1:]
    return actual == wanted


def _room(has: Mapping[str, float], need: Mapping[str, float]) -> int:
    return min((math.floor((has.get(name, 0.0) + _EPSILON) / amount) for name, amount in need.items()), default=_UNBOUNDED)


def _distribute(rooms: Sequence[tuple[str, int]], count: int, node_strategy: NodeStrategy) -> tuple[str, ...] | None:
    match node_strategy:
        case "pack":
            return _pack(rooms, count)
        case "spread":
            return _spread(rooms, count)
        case "strict":
            return _strict(rooms, count)


def _pack(rooms: Sequence[tuple[str, int]], count: int) -> tuple[str, ...] | None:
    chosen: list[str] = []
    for node_id, room in rooms:
        chosen += [node_id] * min(room, count - len(chosen))
    return tuple(chosen) if len(chosen) == count else None


def _spread(rooms: Sequence[tuple[str, int]], count: int) -> tuple[str, ...] | None:
    given = dict.fromkeys((node_id for node_id, _ in rooms), 0)
    for _ in range(count):
        open_nodes = [node_id for node_id, room in rooms if given[node_id] < room]
        if not open_nodes:
            return None
        given[min(open_nodes, key=given.__getitem__)] += 1
    # Ranks of one node get neighbouring numbers, so that groups of neighbours stay inside a node.
    return tuple(node_id for node_id, _ in rooms for _ in range(given[node_id]))


def _strict(rooms: Sequence[tuple[str, int]], count: int) -> tuple[str, ...] | None:
    for per_node in range(count, 0, -1):
        if count % per_node:
            continue
        roomy = [node_id for node_id, room in rooms if room >= per_node]
        if len(roomy) * per_node >= count:
            return tuple(node_id for node_id in roomy[: count // per_node] for _ in range(per_node))
    return None


def _explain(nodes: Sequence[NodeSnapshot], demand: RankDemand, count: int, node_strategy: NodeStrategy, *, is_infeasible: bool) -> str:
    need = demand.total()
    head = f"{count} rank{'s' if count != 1 else ''} of {_amounts(need)} each ({node_strategy})"
    verdict = "do not fit this cluster, even if it were idle" if is_infeasible else "do not fit now: other work holds the resources"
    lines = [f"{head} {verdict}"]
    lines += [f"  {_describe(node, need, demand.label_selector)}" for node in nodes]
    if not nodes:
        lines.append("  the cluster has no nodes")
    elif demand.label_selector and not any(n.takes_ranks and matches(n.labels, demand.label_selector) for n in nodes):
        lines.append(f"  no node that lives has the labels {dict(demand.label_selector)}")
    return "\n".join(lines)


def _describe(node: NodeSnapshot, need: Mapping[str, float], selector: Mapping[str, str]) -> str:
    name = f"node {node.ip} ({node.node_id[:8]})"
    if not node.alive:
        return f"{name}: dead"
    if node.is_draining:
        return f"{name}: Ray is taking it away"
    wrong = [key for key in selector if not _accepts(selector[key], node.labels.get(key))]
    if wrong:
        found = ", ".join(f"{key}={node.labels.get(key, 'unset')} (wanted {selector[key]})" for key in wrong)
        return f"{name}: labels do not match: {found}"
    scarce = min(need, key=lambda name: _room(node.available, {name: need[name]}), default=None)
    facts = "; ".join(f"{key} {_number(node.available.get(key, 0.0))} free of {_number(node.total.get(key, 0.0))}" for key in need)
    limit = f", short of {scarce}" if scarce is not None else ""
    return f"{name}: room for {_room(node.available, need)} now, {_room(node.total, need)} when idle{limit} ({facts})"


def _amounts(need: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {_number(amount)}" for key, amount in need.items()) or "nothing"


def _number(amount: float) -> str:
    return f"{amount:g}" if amount < 1e6 else f"{amount:.4g}"  # noqa: PLR2004 -- bytes would drown the text
