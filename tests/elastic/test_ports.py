"""Which groups a topology has, and what each of their listeners is for: the reference's counts."""

from __future__ import annotations

import pytest

from elastic.ports import Listener, allocate_stateless_group_ports, stores_of_leader
from raycore.groups import EPOCH_KINDS, GroupKind


def test_with_one_process_a_rank_there_is_one_group_of_each_kind() -> None:
    groups = allocate_stateless_group_ports(4)
    assert [group.kind for group in groups] == [GroupKind.WORLD, GroupKind.DP, GroupKind.EP, GroupKind.EPLB]
    assert {group.members for group in groups} == {(0, 1, 2, 3)}
    assert [len(group.listeners) for group in groups] == [3, 5, 3, 3]


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 1), (2, 4), (3, 2)])
def test_the_counts_are_the_references(dp: int, tp: int) -> None:
    groups = allocate_stateless_group_ports(dp, tp)
    counts = {kind: sum(group.kind is kind for group in groups) for kind in EPOCH_KINDS}
    world = dp * tp
    assert counts == {GroupKind.WORLD: 1, GroupKind.DP: world // dp, GroupKind.EP: world // (dp * tp), GroupKind.EPLB: world // (dp * tp)}
    assert sum(len(group.listeners) for group in groups) == 3 * len(groups) + 2
    shards = [group.members for group in groups if group.kind is GroupKind.DP]
    assert sorted(rank for shard in shards for rank in shard) == list(range(world))
    assert all(len(shard) == dp for shard in shards)


def test_what_nobody_uses_is_not_bound() -> None:
    dp = allocate_stateless_group_ports(2)[1]
    assert dp.bound("cpu") == (Listener.CPU,)
    assert dp.bound("cuda") == (Listener.CPU, Listener.DEVICE)
    assert stores_of_leader(allocate_stateless_group_ports(2), "cpu") == EPOCH_KINDS
    assert stores_of_leader(allocate_stateless_group_ports(2, 2), "cpu", world_rank=1) == (GroupKind.DP,)


def test_a_topology_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 data-parallel"):
        allocate_stateless_group_ports(0)
