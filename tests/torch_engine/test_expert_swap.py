"""Experts change their ranks while the ranks serve: from peers, never from disk, and the text stays what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from elastic.expert_change import plan_change
from raycore.engines.expert_change import ExpertChange
from raycore.engines.torch import expert_loading, expert_rebalance, expert_slots
from raycore.engines.torch import expert_moves as moves
from raycore.engines.torch.expert_map import LayerMap
from raycore.engines.torch.expert_moves import SwapPlan
from raycore.engines.torch.expert_parallel import ExpertParallel
from raycore.errors import ConfigurationError, EngineStateError, InvalidArgumentsError, LockstepError
from raycore.groups import ElasticEngine, GroupKind, GroupSet, ProcessGroup, Reconfiguration
from raycore.ids import Epoch, GroupStamp, Rank, Term
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import Driver
from tests.torch_engine.ranks import Ranks, ranks_on
from tests.torch_engine.tiny import driver_of, engine_on, prompts, save_mixture

PROMPTS = prompts(4)
LONG = SamplingParams(max_tokens=40, ignore_eos=True)
LAYERS = 2
Rows = list[list[int]]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("swap"))


@pytest.fixture(scope="module")
def expected(mixture: Path) -> list[list[int]]:
    plain = driver_of(mixture.parent / "dense")
    return [plain.one(prompt, LONG).tokens for prompt in PROMPTS]


@pytest.fixture
def two(mixture: Path) -> Iterator[Ranks]:
    with ranks_on(mixture, 2) as ranks:
        yield ranks


def plan_of(before: Rows, after: Rows, members: tuple[int, ...] | None = None) -> SwapPlan:
    sides = [{layer: LayerMap(tuple(map(tuple, rows))) for layer in range(LAYERS)} for rows in (before, after)]
    return SwapPlan(sides[0], sides[1], members or tuple(range(len(after))))


def experts_of(ranks: Ranks, rank: int) -> ExpertParallel:
    experts = ranks.engine(rank).experts
    assert experts is not None
    return experts


def begin(ranks: Ranks) -> list[Any]:
    """Prompt i on rank i % 2, a few steps of each."""
    results = [ranks.drivers[i % 2].add(prompt, LONG) for i, prompt in enumerate(PROMPTS)]
    for _ in range(4):
        ranks.on_all(ranks.step)
    return results


def test_a_joiner_gets_its_experts_from_its_peers_and_the_ranks_go_on(
    mixture: Path, two: Ranks, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = begin(two)
    old_groups = two.groups
    after = [[1], [2, 3], [0, 3]]
    rows = [{0: (0, 1), 1: (2, 3)}, dict(zip((0, 1, 7), map(tuple, after), strict=True))]
    change = ExpertChange(*({str(layer): side for layer in range(LAYERS)} for side in rows))
    monkeypatch.setattr(expert_loading._Rows, "__getitem__", _zeros_only(expert_loading._Rows.__getitem__))
    joiner = Driver(engine_on(mixture, rank=7, data_parallel_size=3, is_joining=True))
    with pytest.raises(LockstepError, match="not been given its experts"):
        joiner.engine.idle_step()
    two.replace([*two.drivers, joiner])
    union = two.form()
    for rank in range(3):
        experts_of(two, rank).prepare(moves.plan_of(change, (0, 1, 7), (0, 1, 7)), union[rank], budget_bytes=1)
    carried = 0
    while not all(two.on_all(lambda rank: experts_of(two, rank).advance())):
        carried += 1
        two.on_all(two.step, [0, 1])  # the old group serves between portions
    assert carried == LAYERS * 2 - 1, "one expert at a time"
    for rank in range(3):
        experts_of(two, rank).switch()
    two.take(union)
    for group in old_groups:
        group.close()
    two.on_all(two.step)
    for rank in range(3):
        experts_of(two, rank).drop()
    one_more = two.drivers[2].add(PROMPTS[0], LONG)
    two.run()
    assert [result.tokens for result in results] == expected
    assert one_more.tokens == expected[0]
    moved = [two.engine(rank).rpc_methods()["expert_traffic"]()["moved_bytes"] for rank in range(3)]
    expert = experts_of(two, 0).exchange.layers[0].slots.expert_bytes + expert_slots.CHECKSUM_BYTES
    assert moved == [0, 0, LAYERS * 2 * expert]
    assert two.engine(2).rpc_methods()["expert_placement"]()["0"] == after
    sums = [two.engine(rank).utilities()["compute_weight_checksums"]() for rank in range(3)]
    assert {**sums[0], **sums[1], **sums[2]} == engine_on(mixture).utilities()["compute_weight_checksums"]()


def _zeros_only(read: Any) -> Any:
    def guarded(rows: Any, part: Any) -> torch.Tensor:
        found = read(rows, part)
        assert not found.any(), "a joiner read an expert from disk"
        return found

    return guarded


def test_the_stages_of_a_switch_of_groups_take_the_experts_along(mixture: Path, two: Ranks, expected: list[list[int]]) -> None:
    """As `raycore/core` calls them; the joiner is lost the first time, so that the old group serves again."""
    results = begin(two)
    old_drivers, old_groups = two.drivers, two.groups
    loads = {str(layer): [1.0] * 4 for layer in range(LAYERS)}
    placement = two.engine(0).rpc_methods()["expert_placement"]()
    plan = msgspec.to_builtins(plan_change(placement, loads, (0, 1), (0, 1, 2)))
    for is_lost in (True, False):
        joiner = Driver(engine_on(mixture, rank=2, data_parallel_size=3, is_joining=True))
        two.replace([*old_drivers, joiner])
        groups = [both(ep, eplb) for ep, eplb in zip(two.form(), two.form(), strict=True)]
        switches = [switch_of(two, rank) for rank in range(3)]
        two.on_all(lambda rank, groups=groups: switch_of(two, rank).prepare(next_epoch(plan), groups[rank]))
        two.groups = old_groups
        two.on_all(two.step, [0, 1])
        for switch in switches:
            switch.switch()
        two.groups = [group[GroupKind.EP] for group in groups]
        if is_lost:
            for switch in switches[:2]:
                switch.switch_back()
            joiner.engine.close()
            two.replace(old_drivers)
            two.groups = old_groups
            two.on_all(two.step)
            continue
        two.on_all(two.step)
        for switch in switches:
            switch.release()
    one_more = two.drivers[2].add(PROMPTS[0], LONG)
    two.run()
    assert [result.tokens for result in results] == expected
    assert one_more.tokens == expected[0]
    assert [len(row) for row in two.engine(1).rpc_methods()["expert_placement"]()["0"]] == [2, 2, 2]
    with pytest.raises(ConfigurationError, match="no plan of its experts"):
        switch_of(two, 0).prepare(next_epoch(None), both(two.groups[0], two.groups[0]))
    for group in old_groups:
        group.close()


def next_epoch(plan: Any) -> Reconfiguration:
    return Reconfiguration(GroupStamp(Epoch(9), Term(1)), (Rank(0), Rank(1), Rank(2)), (Rank(0), Rank(1)), plan)


def both(exchange: ProcessGroup, carrier: ProcessGroup) -> GroupSet:
    return GroupSet(exchange.stamp, {GroupKind.EP: exchange, GroupKind.EPLB: carrier})


def switch_of(ranks: Ranks, rank: int) -> ElasticEngine:
    engine = ranks.engine(rank)
    assert isinstance(engine, ElasticEngine)
    return engine


@pytest.mark.parametrize("leaver", [0, 2])
def test_any_rank_may_leave_and_its_experts_stay(mixture: Path, expected: list[list[int]], leaver: int) -> None:
    with ranks_on(mixture, 3) as ranks:
        before = [[0, 1], [2], [3]]
        after = [[], [2, 0], [3, 1]] if leaver == 0 else [[0, 1], [3, 2], []]
        stay = tuple(rank for rank in range(3) if rank != leaver)
        results = [ranks.drivers[rank].add(prompt, LONG) for prompt, rank in zip(PROMPTS, [*stay, *stay], strict=True)]
        for _ in range(3):
            ranks.on_all(ranks.step)
        for rank in range(3):
            experts_of(ranks, rank).prepare(plan_of(before, after, stay), ranks.groups[rank], budget_bytes=1 << 20)
        while not all(ranks.on_all(lambda rank: experts_of(ranks, rank).advance())):
            ranks.on_all(ranks.step)
        for rank in range(3):
            experts_of(ranks, rank).switch()
            experts_of(ranks, rank).drop()
        gone = ranks.replace([ranks.drivers[rank] for rank in stay])[leaver]
        ranks.meet()
        ranks.run()
        assert [result.tokens for result in results] == expected
        gone.engine.close()


def test_a_change_that_is_undone_before_or_after_its_switch_leaves_everything_as_it_was(two: Ranks, expected: list[list[int]]) -> None:
    before, after = [[0, 1], [2, 3]], [[2, 3], [1, 0, 2]]
    sums = [two.engine(rank).utilities()["compute_weight_checksums"]() for rank in range(2)]
    results = begin(two)
    for has_switched in (False, True):
        for rank in range(2):
            experts_of(two, rank).prepare(plan_of(before, after), two.groups[rank], budget_bytes=1)
        two.on_all(lambda rank: experts_of(two, rank).advance())
        if has_switched:
            while not all(two.on_all(lambda rank: experts_of(two, rank).advance())):
                two.on_all(two.step)
            for rank in range(2):
                experts_of(two, rank).switch()
            two.on_all(two.step)
            assert two.engine(0).rpc_methods()["expert_placement"]()["1"] == after
            for rank in range(2):
                experts_of(two, rank).revert()
        for rank in range(2):
            experts_of(two, rank).drop()
            experts_of(two, rank).drop()
        two.on_all(two.step)
        assert two.engine(0).rpc_methods()["expert_placement"]()["1"] == before
        assert [two.engine(rank).utilities()["compute_weight_checksums"]() for rank in range(2)] == sums
    two.run()
    assert [result.tokens for result in results] == expected


def test_a_placement_that_finds_room_in_the_tensors_replaces_none(mixture: Path) -> None:
    with ranks_on(mixture, 2, expert_slots=4) as ranks:
        tensor = ranks.engine(0)._runner.model.model.layers[0].mlp.experts.down_proj
        address = tensor.data_ptr()
        plan = plan_of([[0, 1, 2, 3], [2, 3, 0, 1]], [[3, 0], [1, 2]])
        for rank in range(2):
            experts_of(ranks, rank).prepare(plan, ranks.groups[rank], budget_bytes=1)
            assert experts_of(ranks, rank).advance()
            experts_of(ranks, rank).switch()
            experts_of(ranks, rank).drop()
        assert tensor.data_ptr() == address
        back = plan_of([[3, 0], [1, 2]], [[3, 0, 1], [2, 1]])
        for rank in range(2):
            experts_of(ranks, rank).prepare(back, ranks.groups[rank], budget_bytes=1 << 20)
        while not all(ranks.on_all(lambda rank: experts_of(ranks, rank).advance())):
            pass
        for rank in range(2):
            experts_of(ranks, rank).switch()
        assert tensor.data_ptr() == address, "what comes takes rows that nothing refers to any more"


def test_an_expert_that_arrives_damaged_ends_the_change_and_not_the_serving(
    two: Ranks, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = begin(two)
    read = expert_slots.LayerSlots.read

    def flipped(slots: Any, expert: int) -> torch.Tensor:
        sent = read(slots, expert)
        sent[3] ^= 1
        return sent

    monkeypatch.setattr(expert_slots.LayerSlots, "read", flipped)
    for rank in range(2):
        experts_of(two, rank).prepare(plan_of([[0, 1], [2, 3]], [[0, 1, 2], [2, 3]]), two.groups[rank], budget_bytes=1)
    outcomes = two.on_all(lambda rank: _outcome(experts_of(two, rank)))
    assert outcomes == ["expert 2 did not arrive as it was sent", ""]
    for rank in range(2):
        experts_of(two, rank).drop()
    two.run()
    assert [result.tokens for result in results] == expected


def _outcome(experts: ExpertParallel) -> str:
    try:
        experts.advance()
    except LockstepError as error:
        return str(error)
    return ""


def test_a_plan_that_does_not_fit_and_calls_out_of_order_are_refused(two: Ranks) -> None:
    experts, group = experts_of(two, 0), two.groups[0]
    for before, after, text in (
        ([[1, 0], [2, 3]], [[0, 1], [2, 3]], r"begins with experts \[1, 0\] in layer 0 of rank 0, which has \[0, 1\]"),
        ([[0, 1], [2, 3]], [[0, 1], [2]], "no copy of expert 3"),
        ([[0, 1], [2, 3]], [[0, 1, 2, 3]], "rows for 1 ranks"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            experts.prepare(plan_of(before, after), group, budget_bytes=1)
    for call in (experts.advance, experts.switch, experts.revert):
        with pytest.raises(EngineStateError, match="no change"):
            call()
    plan = plan_of([[0, 1], [2, 3]], [[0, 1, 2], [2, 3]])
    experts.prepare(plan, group, budget_bytes=1)
    with pytest.raises(EngineStateError, match="not all experts have come"):
        experts.switch()
    with pytest.raises(EngineStateError, match="another change"):
        experts.prepare(plan, group, budget_bytes=1)
    with pytest.raises(EngineStateError, match="another change"):
        experts.rebalance_experts({"*": [[0, 1, 2], [2, 3]]})
    experts.drop()


def test_a_rebalancing_goes_on_beside_the_steps_a_layer_at_a_time(two: Ranks, expected: list[list[int]]) -> None:
    results = begin(two)
    wanted = [[0, 2], [1, 3, 0]]
    expert = experts_of(two, 0).exchange.layers[0].slots.expert_bytes + expert_slots.CHECKSUM_BYTES
    numbers = []
    for rank in range(2):  # the ranks hear of it a step apart
        numbers.append(two.engine(rank).rpc_methods()["rebalance_experts"](placement={"*": wanted}, bytes_per_step=expert))
        two.on_all(two.step)
    assert numbers[0] == numbers[1]
    seen = []
    for _ in range(12):
        two.on_all(two.step)
        placed = two.engine(1).rpc_methods()["expert_placement"]()
        seen.append([placed[str(layer)] == wanted for layer in range(LAYERS)])
        assert placed == two.engine(0).rpc_methods()["expert_placement"]()
    assert [False, False] in seen
    assert [True, False] in seen
    assert seen[-1] == [True, True]
    traffic = [two.engine(rank).rpc_methods()["expert_traffic"]() for rank in range(2)]
    assert [found["moved_bytes"] for found in traffic] == [LAYERS * expert, LAYERS * 2 * expert]
    assert not any(found["is_rebalancing"] for found in traffic)
    two.run()
    assert [result.tokens for result in results] == expected


def test_a_pool_without_requests_steps_until_its_experts_have_moved(two: Ranks) -> None:
    wanted = [[0, 3], [1, 2]]
    for rank in range(2):
        two.engine(rank).rpc_methods()["rebalance_experts"](placement={"*": wanted}, bytes_per_step=1)
    assert two.engine(0).has_work()
    two.run()
    assert not two.engine(0).has_work()
    assert two.engine(0).rpc_methods()["expert_placement"]()["1"] == wanted


def test_a_change_that_not_all_know_of_is_given_up(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_rebalance, "_PATIENCE_STEPS", 5)
    two.engine(1).rpc_methods()["rebalance_experts"](placement={"*": [[0, 3], [1, 2]]})
    two.run()
    assert two.engine(1)._steps == 5
    assert two.engine(1).rpc_methods()["expert_placement"]()["1"] == [[0, 1], [2, 3]]
    assert not two.engine(1).rpc_methods()["expert_traffic"]()["is_rebalancing"]


def test_a_peer_that_is_lost_ends_a_rebalancing_and_another_can_follow(two: Ranks, expected: list[list[int]]) -> None:
    results = begin(two)
    ask = [two.engine(rank).rpc_methods()["rebalance_experts"] for rank in range(2)]
    for rank in range(2):
        ask[rank](placement={"*": [[0, 1, 2, 3], [0, 1, 2, 3]]}, bytes_per_step=1)
    for _ in range(3):
        two.on_all(two.step)
    assert two.engine(0).rpc_methods()["expert_traffic"]()["is_rebalancing"]
    two.groups[1].close()
    with pytest.raises(LockstepError):
        two.step(0)
    with pytest.raises(LockstepError):
        two.step(1)
    two.meet()
    assert not two.engine(0).rpc_methods()["expert_traffic"]()["is_rebalancing"]
    for rank in range(2):
        ask[rank](placement={"*": [[2, 3], [0, 1]]})
    two.run()
    assert [result.tokens for result in results] == expected
    assert two.engine(0).rpc_methods()["expert_placement"]()["0"] == [[2, 3], [0, 1]]


def test_ranks_that_differ_in_their_placement_compute_nothing(two: Ranks) -> None:
    experts_of(two, 1).exchange.adopt({0: LayerMap(((1, 0), (2, 3)))}, rank=1, size=2)
    two.drivers[0].add(PROMPTS[0], LONG)
    said = two.on_all(lambda rank: _step_outcome(two, rank))
    assert said == [
        "group rank 1 has another placement of experts than this one, 0",
        "group rank 0 has another placement of experts than this one, 1",
    ]


def _step_outcome(ranks: Ranks, rank: int) -> str:
    with pytest.raises(LockstepError) as failure:
        ranks.step(rank)
    return str(failure.value)


def test_a_wrong_rebalancing_is_refused_by_what_is_wrong(two: Ranks, mixture: Path) -> None:
    ask = two.engine(0).rpc_methods()["rebalance_experts"]
    with pytest.raises(InvalidArgumentsError, match="no copy of expert 3"):
        ask(placement={"*": [[0, 1], [2]]})
    with pytest.raises(InvalidArgumentsError, match="do not have the form"):
        ask(placement={"*": [[0, 1], [2, 3]]}, shares={"*": [[1.0], [1.0, 1.0]]})
    with pytest.raises(InvalidArgumentsError, match="bytes_per_step"):
        ask(placement={"*": [[0, 1], [2, 3]]}, bytes_per_step=0)
