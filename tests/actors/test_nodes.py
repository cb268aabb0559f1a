"""A second node that Ray drains, or that is lost: its ranks move, or are replaced, and the pool goes on.

Ray 2.60 puts an actor that asks for no resource on a random node, whatever node it prefers (`NodeAffinitySchedulingStrategy(soft=True)`);
it heeds a preference of one that asks for something, and a node that an actor must have. A sentinel that went to the second node
died with it, which meant that the driver was dead: the pool ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray._private.worker as ray_worker
from ray._private import state
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from actors.groups import pool_groups
from actors.launch import connect
from actors.naming import controller_name, sentinel_name
from raycore.config import HealthConfig
from raycore.sampling import SamplingParams
from tests.actors.mixture import START_S, Mixture
from tests.actors.pools import LIMIT_S, PoolMaker, ask_controller, eventually, warm
from tests.support.engine_process import expected

pytestmark = pytest.mark.ray

SPREAD = {"node_strategy": "spread", "data_parallel_size": 2, "timeouts": {"drain_s": 1.0}}
LONG = SamplingParams(max_tokens=400)
STEPS = {"engine_options": {"base_s": 0.005, "vocab_size": 32_000}}


class SecondNode:
    """Of the session's cluster, on this host."""

    def __init__(self) -> None:
        self._cluster = Cluster(shutdown_at_exit=False)
        head = ray_worker.global_worker.node
        self._cluster.head_node = head
        self._cluster.redis_address = head.redis_address
        options = ray._raylet.GcsClientOptions.create(head.gcs_address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        self._cluster.global_state._initialize_global_state(options)
        self._node = self._cluster.add_node(num_cpus=4, node_ip_address="127.0.0.1")
        self.id = self._node.node_id
        self._is_there = True

    def drain(self) -> None:
        """Tell Ray that it goes, as a cloud's notice does."""
        until_ms = int((time.time() + 600) * 1000)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = GcsClient(address=self._cluster.address)
        is_accepted, why = client.drain_node(self.id, reason, "the test takes it away", until_ms)
        assert is_accepted, why

    def take_away(self) -> None:
        """Without a word, so that Ray notices it late."""
        self._is_there = False
        self._cluster.remove_node(self._node, allow_graceful=False)

    def leave(self) -> None:
        """Ray knows that it is gone when this returns; the next test must not place anything on it."""
        if self._is_there:
            self._is_there = False
            self._cluster.remove_node(self._node, allow_graceful=True)
        until_s = time.monotonic() + LIMIT_S
        while any(row["Alive"] and row["NodeID"] == self.id for row in ray.nodes()):
            assert time.monotonic() < until_s, "Ray still has the node"
            time.sleep(0.05)


@pytest.fixture
def second_node(cluster: str) -> Iterator[SecondNode]:
    del cluster
    node = SecondNode()
    yield node
    node.leave()


async def node_of_each_rank(pool: str) -> dict[int, str]:
    return {member["rank"]: member["node_id"] for member in (await ask_controller(pool, "status"))["members"]}


async def test_controller_and_sentinel_are_on_the_drivers_node(second_node: SecondNode, pools: PoolMaker) -> None:
    here = ray.get_runtime_context().get_node_id()
    assert here != second_node.id
    for number in range(3):  # on random nodes they would be here once in 64 times
        pool = f"here-{number}"
        await pools.open(pool, data_parallel_size=1)
        rows = {row["Name"]: row for row in state.actors().values() if row["State"] == "ALIVE"}
        for name in (controller_name(pool), sentinel_name(pool)):
            assert rows[name]["Address"]["NodeID"] == here
        await pools.close()


async def test_ranks_on_a_node_that_ray_drains_move_and_nothing_is_lost(second_node: SecondNode, pools: PoolMaker) -> None:
    await pools.open("drained", **SPREAD, **STEPS)
    before = await node_of_each_rank("drained")
    assert second_node.id in before.values()
    async with connect("drained") as client:
        streams = [client.generate([5, 6, n], LONG) for n in range(8)]
        second_node.drain()

        async def is_left() -> bool:
            nodes = await node_of_each_rank("drained")
            return len(nodes) == 2 and second_node.id not in nodes.values()

        await eventually(is_left, "no rank is on the node")
        async with asyncio.timeout(LIMIT_S):
            outputs = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [output.token_ids for output in outputs] == [expected([5, 6, n], 400) for n in range(8)]

        async def is_settled() -> bool:
            return [row.state for row in pool_groups("drained")] == ["CREATED"] * 2

        await eventually(is_settled, "two groups are left")


@pytest.mark.timeout(600)
async def test_an_expert_parallel_rank_on_a_node_that_ray_drains_is_replaced_by_a_standby(
    second_node: SecondNode, pools: PoolMaker, tmp_path: Path
) -> None:
    mixture = Mixture(pools, tmp_path, "spread-experts")
    # Four of twelve processors each: one rank on either node, and the standby where one more has room.
    await mixture.open(data_parallel_size=2, standby=1, warm="weights", node_strategy="spread", num_cpus_per_engine=4)
    assert second_node.id in (await node_of_each_rank("spread-experts")).values()
    (standby,) = await warm("spread-experts", 1, START_S)
    assert standby["node_id"] != second_node.id
    async with connect("spread-experts") as client:
        await mixture.check(client)
        second_node.drain()

        async def is_left() -> bool:
            rows = (await ask_controller("spread-experts", "status"))["members"]
            return len(rows) == 2 and standby["pid"] in {row["pid"] for row in rows}

        await eventually(is_left, "the standby serves in place of the rank on the node")
        assert second_node.id not in (await node_of_each_rank("spread-experts")).values()
        await mixture.check(client)


async def test_where_there_is_no_room_as_many_ranks_move_as_there_are_standbys(second_node: SecondNode, pools: PoolMaker) -> None:
    two_each = {"num_cpus_per_engine": 2, "timeouts": {"drain_s": 1.0, "capacity_s": 1.0}}
    await pools.open("four", node_strategy="spread", data_parallel_size=4, standby=1, **two_each)
    (standby,) = await warm("four", 1)
    assert [*(await node_of_each_rank("four")).values()].count(second_node.id) == 2
    await pools.open("filler", data_parallel_size=1, **two_each)
    second_node.drain()

    async def is_left() -> bool:
        status = await ask_controller("four", "status")
        is_over = bool(status["operations"]) and status["operations"][0]["phase"] == "done"
        return is_over and second_node.id not in {row["node_id"] for row in status["members"]}

    await eventually(is_left, "no rank is on the node")
    rows = (await ask_controller("four", "status"))["members"]
    assert len(rows) == 3
    assert standby["pid"] in {row["pid"] for row in rows}


async def test_a_node_that_is_lost_takes_its_rank_and_a_standby_replaces_it(second_node: SecondNode, pools: PoolMaker) -> None:
    health = HealthConfig(hang_after_s=2.0, first_beat_s=6.0)
    await pools.open("lost-node", standby=1, health=health, **SPREAD, **STEPS)
    assert second_node.id in (await node_of_each_rank("lost-node")).values()

    async def is_warm() -> bool:
        return (await ask_controller("lost-node", "status"))["standbys"][0]["state"] == "warm"

    await eventually(is_warm, "there is a standby")
    async with connect("lost-node") as client:
        streams = [client.generate([5, 6, n], LONG) for n in range(8)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await asyncio.to_thread(second_node.take_away)

        async def is_whole() -> bool:
            nodes = await node_of_each_rank("lost-node")
            operations = (await ask_controller("lost-node", "status"))["operations"]
            is_over = all(operation["phase"] in ("done", "undone") for operation in operations)
            return len(nodes) == 2 and second_node.id not in nodes.values() and is_over

        await eventually(is_whole, "two ranks serve on the node that is left")
        async with asyncio.timeout(LIMIT_S):
            outputs = await asyncio.gather(*(stream.collect() for stream in streams))
        assert all(expected([5, 6, n], 400)[-len(output.token_ids) :] == output.token_ids for n, output in enumerate(outputs))
        assert (await client.scale_elastic_ep(1)).ranks[0] in (0, 1)


async def test_nothing_is_placed_on_a_node_that_is_lost_and_looks_alive(second_node: SecondNode, pools: PoolMaker) -> None:
    await pools.open("unnoticed", **{**SPREAD, "data_parallel_size": 1, "timeouts": {"capacity_s": 10.0}}, num_cpus_per_engine=0.5)
    async with connect("unnoticed") as client:
        await asyncio.to_thread(second_node.take_away)
        assert any(row["NodeID"] == second_node.id and row["Alive"] for row in ray.nodes()), "Ray has not noticed"
        assert (await client.scale_elastic_ep(3)).ranks == (0, 1, 2)
        assert second_node.id not in (await node_of_each_rank("unnoticed")).values()
