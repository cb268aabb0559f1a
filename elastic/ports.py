"""The process groups of a topology and the listeners that each needs: which there are, of whom, and what each listener is for. Pure."""

from __future__ import annotations

import enum

import msgspec

from raycore.groups import GroupKind


class Listener(enum.StrEnum):
    """What a port of a group is for, in the order in which the reference counts them."""

    CPU = "cpu"
    """The store where the Gloo group meets: rounds of the waves, everything on CPU."""
    DEVICE = "device"
    """The store where the NCCL group exchanges its id."""
    MESSAGES = "messages"
    """A store as a mailbox between the members. Ours talk over their sessions and Ray, so it is never bound."""
    SPARE = "spare"
    """The reference has five ports for the data-parallel master and uses the first; these are never bound."""


_EACH = (Listener.CPU, Listener.DEVICE, Listener.MESSAGES)
_DP_MASTER = (*_EACH, Listener.SPARE, Listener.SPARE)
_BOUND = {"cpu": frozenset({Listener.CPU}), "cuda": frozenset({Listener.CPU, Listener.DEVICE})}


class PlannedGroup(msgspec.Struct, frozen=True):
    """One process group: `members` are world ranks, the first of which serves its stores."""

    kind: GroupKind
    members: tuple[int, ...]
    listeners: tuple[Listener, ...]

    def bound(self, device: str) -> tuple[Listener, ...]:
        """The listeners that somebody uses where the engines' device is this one."""
        return tuple(listener for listener in self.listeners if listener in _BOUND[device])


def allocate_stateless_group_ports(data_parallel_size: int, tensor_parallel_size: int = 1) -> tuple[PlannedGroup, ...]:
    """The groups of a topology with the reference's counts of listeners; ValueError for sizes below 1.

    One world group, `world/dp` DP groups, `world/(dp·tp)` EP groups and as many EPLB groups of all ranks; three listeners each, five
    for the DP group of the data-parallel master. World ranks count a data-parallel rank's tensor-parallel ranks together. The plan
    binds nothing: each group's first member does (`GroupKeeper.open_stores`), and says which ports it got.
    """
    if data_parallel_size < 1 or tensor_parallel_size < 1:
        msg = f"a topology of {data_parallel_size} data-parallel and {tensor_parallel_size} tensor-parallel ranks"
        raise ValueError(msg)
    world = tuple(range(data_parallel_size * tensor_parallel_size))
    groups = [PlannedGroup(GroupKind.WORLD, world, _EACH)]
    for shard in range(tensor_parallel_size):
        listeners = _DP_MASTER if shard == 0 else _EACH
        groups.append(PlannedGroup(GroupKind.DP, world[shard::tensor_parallel_size], listeners))
    groups += [PlannedGroup(kind, world, _EACH) for kind in (GroupKind.EP, GroupKind.EPLB)]
    return tuple(groups)


def stores_of_leader(groups: tuple[PlannedGroup, ...], device: str, world_rank: int = 0) -> tuple[GroupKind, ...]:
    """The kinds of the groups whose stores this process serves; with one process a rank, all of them are world rank 0's."""
    return tuple(group.kind for group in groups if group.members[0] == world_rank and group.bound(device))
