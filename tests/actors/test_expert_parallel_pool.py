"""A pool whose ranks share a model's experts: it answers as one engine does, and ends as a whole when a rank is lost."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from actors.control_plane import RayControlPlane, find_actor
from actors.groups import pool_groups
from actors.naming import Role, controller_name, named_actors
from actors.processes import is_gone
from elastic.rebalance import rebalance
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.links import SocketLinks
from raycore.config import HealthConfig, Limits, Timeouts
from raycore.errors import EngineDeadError, ExpertsLostError, NoEngineError, PoolNotFoundError, RaycoreError, ScalingError
from raycore.membership import Membership, MemberState
from raycore.sampling import SamplingParams
from raycore.tokenizer import ByteTokenizer
from tests.actors.pools import PoolMaker, ask_controller, eventually, membership_when

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

LONG = SamplingParams(max_tokens=200, ignore_eos=True)


async def test_ranks_share_the_experts_any_may_leave_and_all_end_together(pools: PoolMaker, tmp_path: Path) -> None:
    from raycore.engines.torch.upcycle import upcycle
    from tests.torch_engine.tiny import GREEDY, driver_of, prompts, save_llama

    dense = save_llama(tmp_path / "dense")
    upcycle(str(dense), str(tmp_path / "moe"))
    asked = prompts(4)
    plain = driver_of(dense)
    access = await pools.open(
        "experts",
        engine="torch",
        model=str(tmp_path / "moe"),
        engine_options={"kv_tokens": 1024, "threads": 1},
        num_cpus_per_engine=0.5,
        timeouts=Timeouts(drain_s=0.2),
        health=HealthConfig(hang_after_s=10.0, first_beat_s=60.0),
    )
    async with EngineCoreClient(access, _control(access), SocketLinks(access, Limits()), tokenizer=ByteTokenizer()) as client:
        streams = [client.generate(prompt, GREEDY, data_parallel_rank=i % 2).collect() for i, prompt in enumerate(asked)]
        texts = [output.token_ids for output in await asyncio.gather(*streams)]
        assert texts == [plain.one(prompt, GREEDY).tokens for prompt in asked]
        load = await client.call_all("collective_rpc", method="expert_load")
        assert all(sum(counts) > 0 for rank in load for counts in load[rank].values())
        sums = await client.call_all("compute_weight_checksums")
        experts = [{name.split(".experts.")[1][0] for name in sums[rank] if ".experts." in name} for rank in (0, 1)]
        assert experts == [{"0", "1"}, {"2", "3"}]
        report = await rebalance(client, max_imbalance=1.0)
        assert report.number > 0
        assert report.after < report.before
        again = [client.generate(prompt, GREEDY, data_parallel_rank=i % 2).collect() for i, prompt in enumerate(asked)]
        assert [output.token_ids for output in await asyncio.gather(*again)] == texts
        (tmp_path / "moe").rename(tmp_path / "elsewhere")
        grown = await client.scale_elastic_ep(3)
        assert (grown.ranks, grown.joined) == ((0, 1, 2), (2,))
        assert grown.weight_bytes > 0
        assert grown.weight_bytes_from_disk == 0
        again = [client.generate(prompt, GREEDY, data_parallel_rank=i % 3).collect() for i, prompt in enumerate(asked)]
        assert [output.token_ids for output in await asyncio.gather(*again)] == texts
        placement = (await client.call_all("collective_rpc", method="expert_placement"))[2]
        assert all(len(rows) == 3 and any(expert >= 0 for expert in rows[2]) for rows in placement.values())
        long = [plain.one(prompt, LONG).tokens for prompt in asked]
        for change, ranks in (
            (lambda: client.remove_ranks([0]), (1, 2)),
            (lambda: client.remove_ranks([1]), (2,)),
            (lambda: client.scale_elastic_ep(2), (0, 2)),
            (lambda: client.scale_elastic_ep(1), (0,)),
            (lambda: client.scale_elastic_ep(2), (0, 1)),
        ):
            running = [client.generate(prompt, LONG) for prompt in asked]
            begun = [(await anext(stream)).token_ids for stream in running]
            streams = [asyncio.ensure_future(stream.collect()) for stream in running]
            assert (await change()).ranks == ranks
            new = [client.generate(prompt, GREEDY, data_parallel_rank=ranks[i % len(ranks)]).collect() for i, prompt in enumerate(asked)]
            assert [output.token_ids for output in await asyncio.gather(*new)] == texts
            ends = [output.token_ids for output in await asyncio.gather(*streams)]
            assert [first + end for first, end in zip(begun, ends, strict=True)] == long
            sums = await client.call_all("compute_weight_checksums")
            held = [name.split(".experts.")[1][0] for rank in sums for name in sums[rank] if ".experts." in name]
            assert set(held) == {"0", "1", "2", "3"}

        stream = asyncio.ensure_future(client.generate(asked[0], LONG, data_parallel_rank=0).collect())
        await eventually(lambda: _runs(client), "the wave runs")
        shrinking = asyncio.ensure_future(client.remove_ranks([0]))
        now = await membership_when("experts", lambda membership: membership.members[0].state is MemberState.LEAVING)
        survivor, victim = (member.pid for member in now.members)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(ExpertsLostError, match="rank 1 is dead") as lost:
            await stream
        assert lost.value.rank == 1
        with pytest.raises(RaycoreError, match=r"rank 1|taken down|no controller"):
            await shrinking
        with pytest.raises(NoEngineError, match="rank 1"):
            await client.generate(asked[1], GREEDY).collect()
        client.check_invariants()
    await eventually(lambda: _is_gone(survivor), "the survivor's process has ended")
    await eventually(_nothing_is_left, "no actor and no placement group is left")


async def test_a_joiner_lost_between_the_decision_and_the_release_takes_all_back_and_a_member_ends_the_pool(
    pools: PoolMaker, tmp_path: Path
) -> None:
    from raycore.engines.torch.upcycle import upcycle
    from tests.torch_engine.tiny import GREEDY, driver_of, prompts, save_llama

    dense = save_llama(tmp_path / "dense")
    upcycle(str(dense), str(tmp_path / "moe"))
    asked, plain, hold = prompts(4), driver_of(dense), tmp_path / "hold"
    long = [plain.one(prompt, LONG).tokens for prompt in asked]
    ranks = {"0": {"rank": 0}, "1": {"rank": 1}, "2": {"rank": 2, "is_joining": True}, "3": {"rank": 3, "is_joining": True}}
    held_ranks = {rank: {**own, "hold": str(hold if rank == "2" else tmp_path / "never")} for rank, own in ranks.items()}
    access = await pools.open(
        "experts",
        engine="tests.actors.engines:holds_its_switch",
        model=str(tmp_path / "moe"),
        engine_options={"kv_tokens": 1024, "threads": 1, "per_rank": held_ranks},
        num_cpus_per_engine=0.5,
        timeouts=Timeouts(drain_s=0.2),
        health=HealthConfig(hang_after_s=20.0, first_beat_s=60.0),
    )
    async with EngineCoreClient(access, _control(access), SocketLinks(access, Limits()), tokenizer=ByteTokenizer()) as client:

        async def begin_held(target: int) -> tuple[Any, Membership, list[Any]]:
            """Requests run, and the operation is decided: all are told to go, and rank 2 does not go over."""
            hold.touch()
            (tmp_path / "2 is held").unlink(missing_ok=True)
            growing = asyncio.ensure_future(client.scale_elastic_ep(target))
            await eventually(lambda: _exists(tmp_path / "2 is held"), "rank 2 is to switch", limit_s=120.0)
            streams = [
                asyncio.ensure_future(client.generate(prompt, LONG, data_parallel_rank=i % 2).collect()) for i, prompt in enumerate(asked)
            ]
            now = await membership_when("experts", lambda membership: len(membership.members) == target)
            return growing, now, streams

        placed = await client.call_all("collective_rpc", method="expert_placement")
        growing, now, streams = await begin_held(4)
        os.kill(now.members[2].pid, signal.SIGKILL)
        with pytest.raises(ScalingError, match=r"was undone: commit: rank 2 .* died"):
            await growing
        assert client.ranks() == (0, 1)
        assert [output.token_ids for output in await asyncio.gather(*streams)] == long
        assert await client.call_all("collective_rpc", method="expert_placement") == placed
        names = [name for name in named_actors("experts") if name.role is Role.ENGINE]
        assert (len(names), len(pool_groups("experts"))) == (2, 2), "the other joiner is put away too"

        hold.unlink()
        await client.operations.pause_scheduler(mode="keep")  # so that the rebalancing waits
        moved = {"placement": {"*": [[2, 3], [0, 1]]}, "bytes_per_step": 1}
        await client.call_all("collective_rpc", method="rebalance_experts", kwargs=moved)
        growing = asyncio.ensure_future(client.scale_elastic_ep(3))
        await eventually(_is_preparing, "the operation has to wait for the rebalancing", limit_s=120.0)
        await client.operations.resume_scheduler()
        assert (await growing).ranks == (0, 1, 2)
        again = [client.generate(prompt, GREEDY, data_parallel_rank=i % 3).collect() for i, prompt in enumerate(asked)]
        assert [output.token_ids for output in await asyncio.gather(*again)] == [plain.one(prompt, GREEDY).tokens for prompt in asked]
        assert (await client.scale_elastic_ep(2)).ranks == (0, 1)

        growing, now, streams = await begin_held(3)
        os.kill(now.members[0].pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*streams, return_exceptions=True)
        assert [outcome.rank for outcome in outcomes if isinstance(outcome, EngineDeadError)] == [0] * len(asked)
        assert all(isinstance(outcome, ExpertsLostError) for outcome in outcomes[1::2]), "those of rank 1, which lives"
        with pytest.raises(RaycoreError, match=r"rank 0|taken down|no controller"):
            await growing
    await eventually(_nothing_is_left, "no actor and no placement group is left")


async def _is_preparing() -> bool:
    return (await ask_controller("experts", "status"))["operations"][0]["phase"] == "prepare"


async def _exists(path: Path) -> bool:
    return await asyncio.to_thread(path.exists)


def _control(access: PoolAccess) -> RayControlPlane:
    return RayControlPlane("experts", access.timeouts)


async def _runs(client: EngineCoreClient) -> bool:
    return any((await client.call_all("dp_engines_running")).values())


async def _is_gone(pid: int) -> bool:
    return is_gone(pid)


async def _nothing_is_left() -> bool:
    try:
        await find_actor(controller_name("experts"))
    except PoolNotFoundError:
        left = {name.role for name in named_actors("experts")}
        return left <= {Role.SENTINEL} and not pool_groups("experts")  # the sentinel is the driver's
    return False
