"""Expert-parallel ranks that leave: their experts go over with the switch of groups, on real engines and Gloo groups, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from raycore.core.grouping import GroupKeeper
from raycore.engines.torch import expert_slots
from raycore.errors import LockstepError, ScalingError
from raycore.groups import ProcessGroup
from raycore.ids import Epoch, GroupStamp, Term
from raycore.membership import Handover
from raycore.sampling import SamplingParams
from tests.support.lockstep import LockstepPool, client_of, lockstep_pool
from tests.support.waiting import LIMIT_S, until
from tests.torch_engine.tiny import driver_of, prompts, save_mixture

PROMPTS = prompts(4)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
ALL = {"0", "1", "2", "3"}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("handover"))


@pytest.fixture(scope="module")
def expected(mixture: Path) -> list[list[int]]:
    plain = driver_of(mixture.parent / "dense")
    return [plain.one(prompt, LONG).tokens for prompt in PROMPTS]


@pytest.fixture
def three(mixture: Path) -> Iterator[LockstepPool]:
    with lockstep_pool(3, mixture=mixture) as pool:
        yield pool


def experts(pool: LockstepPool, *ranks: int) -> list[dict[str, str]]:
    """The checksums of the experts that each of these ranks holds."""
    engines = [pool.hosts[rank].core._engine for rank in ranks]
    found = [engine.utilities()["compute_weight_checksums"]() for engine in engines]
    return [{name: checksum for name, checksum in sums.items() if ".experts." in name} for sums in found]


def held(pool: LockstepPool, *ranks: int) -> set[str]:
    return {name.split(".experts.")[1][0] for sums in experts(pool, *ranks) for name in sums}


async def begin(pool: LockstepPool, client: Any) -> tuple[list[list[int]], list[asyncio.Task[Any]]]:
    """A long request on each member, with its first tokens."""
    members = [member.engine.rank for member in pool.membership.members]
    streams = [client.generate(prompt, LONG) for prompt, _ in zip(PROMPTS, members, strict=False)]
    begun = [(await anext(stream)).token_ids for stream in streams]
    assert all(pool.hosts[rank].core.requests for rank in members), "each member has one"
    return begun, [asyncio.ensure_future(stream.collect()) for stream in streams]


async def ends(begun: list[list[int]], streams: list[asyncio.Task[Any]]) -> list[list[int]]:
    return [first + rest.token_ids for first, rest in zip(begun, await asyncio.gather(*streams), strict=True)]


@pytest.mark.parametrize("leaver", [0, 2])
async def test_any_rank_may_leave_while_requests_run_and_its_own_move(three: LockstepPool, expected: list[list[int]], leaver: int) -> None:
    stay = [rank for rank in range(3) if rank != leaver]
    whole = {name: checksum for sums in experts(three, 0, 1, 2) for name, checksum in sums.items()}
    async with client_of(three, 0, 1, 2) as client:
        begun, streams = await begin(three, client)
        then = await asyncio.to_thread(three.prepare, *stay)
        three.go(then)
        await asyncio.to_thread(three.confirmed, then)
        assert await ends(begun, streams) == expected[:3]
        assert (await client.generate(PROMPTS[3], LONG).collect()).token_ids == expected[3]
    assert {name: checksum for sums in experts(three, *stay) for name, checksum in sums.items()} == whole


async def test_all_ranks_may_be_replaced_by_others_at_once(mixture: Path, expected: list[list[int]]) -> None:
    with lockstep_pool(2, mixture=mixture, joiners=2) as pool:
        async with client_of(pool, 0, 1) as client:
            begun, streams = await begin(pool, client)
            then = await asyncio.to_thread(pool.prepare, 2, 3)
            pool.go(then)
            await asyncio.to_thread(pool.confirmed, then)
            assert await ends(begun, streams) == expected[:2]
            assert (await client.generate(PROMPTS[2], LONG, data_parallel_rank=3).collect()).token_ids == expected[2]
            assert held(pool, 2, 3) == ALL
            # and the next one finds nothing left over of this one
            then = await asyncio.to_thread(pool.prepare, 3)
            pool.go(then)
            await asyncio.to_thread(pool.confirmed, then)
            assert (await client.generate(PROMPTS[3], LONG).collect()).token_ids == expected[3]
        assert held(pool, 3) == ALL


async def test_an_undone_handover_leaves_every_expert_where_it_was(three: LockstepPool, expected: list[list[int]]) -> None:
    before = experts(three, 0, 1, 2)
    async with client_of(three, 0, 1, 2) as client:
        begun, streams = await begin(three, client)
        await asyncio.to_thread(three.prepare, 1, 2, operation="first")
        for rank in range(3):
            three.hosts[rank].reconfigurer.undo("first", Term(1))
        await until(lambda: not any(three.lockstep(rank).wave.standby for rank in range(3)), "all is dropped")
        assert await ends(begun, streams) == expected[:3]
        assert experts(three, 0, 1, 2) == before
        three.skip_epoch()
        then = await asyncio.to_thread(three.prepare, 1, operation="second")
        three.go(then, operation="second")
        await asyncio.to_thread(three.confirmed, then)
        assert (await client.generate(PROMPTS[3], LONG).collect()).token_ids == expected[3]


async def test_an_expert_that_arrives_damaged_undoes_and_the_old_ranks_serve(
    three: LockstepPool, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = expert_slots.LayerSlots.read

    def flipped(slots: Any, expert: int) -> Any:
        sent = read(slots, expert)
        sent[3] ^= 1
        return sent

    before = experts(three, 0, 1, 2)
    async with client_of(three, 0, 1, 2) as client:
        begun, streams = await begin(three, client)
        with monkeypatch.context() as patched:
            patched.setattr(expert_slots.LayerSlots, "read", flipped)
            with pytest.raises(LockstepError, match="did not arrive as it was sent"):
                await asyncio.to_thread(three.prepare, 1, 2, operation="first")
        for rank in range(3):
            three.hosts[rank].reconfigurer.undo("first", Term(1))
        assert await ends(begun, streams) == expected[:3]
        assert experts(three, 0, 1, 2) == before
        three.skip_epoch()
        then = await asyncio.to_thread(three.prepare, 1, 2, operation="second")
        three.go(then, operation="second")
        await asyncio.to_thread(three.confirmed, then)
    assert held(three, 1, 2) == ALL


async def test_ranks_that_wait_for_a_leaver_which_does_not_come_are_freed_by_the_undo(
    three: LockstepPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting: list[Handover] = []
    form = GroupKeeper.form_handover

    def noted(groups: GroupKeeper, handover: Handover) -> ProcessGroup:
        waiting.append(handover)
        return form(groups, handover)

    monkeypatch.setattr(GroupKeeper, "form_handover", noted)
    with ThreadPoolExecutor(1) as threads:
        building = threads.submit(three.prepare, 1, 2, absent=(0,))
        await until(lambda: len(waiting) == 2, "both wait for the leaver")
        for rank in range(3):
            three.hosts[rank].reconfigurer.undo("op", Term(1))
        with pytest.raises((LockstepError, ScalingError)):
            await asyncio.to_thread(building.result, LIMIT_S)
    assert held(three, 0, 1, 2) == ALL


async def test_a_leaver_that_dies_after_the_decision_has_handed_its_experts_over(three: LockstepPool, expected: list[list[int]]) -> None:
    async with client_of(three, 0, 1, 2) as client:
        begun, streams = await begin(three, client)
        then = await asyncio.to_thread(three.prepare, 1, 2)
        three.go(then, without=(0,))
        # what it had has moved; an engine core that is stopped, as here for a dead one, would say that it aborts it
        await until(lambda: 0 not in client.ranks(), "the client knows that rank 0 is no member")
        three.end(0)
        await asyncio.to_thread(three.confirmed, then)
        assert await ends(begun, streams) == expected[:3]
        assert held(three, 1, 2) == ALL
        then = await asyncio.to_thread(three.prepare, 2, operation="next")
        three.go(then, operation="next")
        await asyncio.to_thread(three.confirmed, then)
        assert (await client.generate(PROMPTS[3], LONG).collect()).token_ids == expected[3]


async def test_a_joiner_lost_at_the_switch_takes_the_others_back_to_their_groups_and_experts(
    mixture: Path, expected: list[list[int]]
) -> None:
    with lockstep_pool(2, mixture=mixture, joiners=2) as pool:
        before, had = pool.membership, experts(pool, 0, 1)
        async with client_of(pool, 0, 1) as client:
            begun, streams = await begin(pool, client)
            then = await asyncio.to_thread(pool.prepare, 0, 1, 2)
            pool.end(2)
            pool.go(then)
            assert before.group is not None
            assert then.group is not None
            switched = then.group.stamp
            await until(lambda: pool.lockstep(0).wave.stamp == switched, "rank 0 has switched")
            back = msgspec.structs.replace(before.group, stamp=GroupStamp(Epoch(then.epoch + 1), Term(1)), goes_back=True)
            pool.membership = msgspec.structs.replace(before, epoch=back.stamp.epoch, group=back)
            for rank in (0, 1):
                pool.hosts[rank].set_membership(pool.membership)
            for rank in (0, 1):
                await asyncio.to_thread(pool.hosts[rank].groups.formed(back.stamp).result, LIMIT_S)
            assert experts(pool, 0, 1) == had
            assert await ends(begun, streams) == expected[:2]
            then = await asyncio.to_thread(pool.prepare, 0, 1, 3, operation="next")
            pool.go(then, operation="next")
            await asyncio.to_thread(pool.confirmed, then)
            assert (await client.generate(PROMPTS[2], LONG, data_parallel_rank=3).collect()).token_ids == expected[2]
        assert held(pool, 0, 1, 3) == ALL
