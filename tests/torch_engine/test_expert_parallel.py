"""Experts spread over ranks: the same text at every size, uneven slots and copies, and what a lost rank leaves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from raycore.engines.torch import expert_loading
from raycore.engines.torch.upcycle import MoeRecipe, upcycle
from raycore.errors import ConfigurationError, LockstepError, NotSupportedError
from raycore.sampling import SamplingParams
from tests.torch_engine.ranks import Ranks, ranks_on
from tests.torch_engine.tiny import GREEDY, TINY, driver_of, engine_on, prompts, save_llama

PROMPTS = prompts(6)
_SMALL = {**TINY, "num_experts_per_tok": 2}
MODELS: dict[str, Any] = {
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=5),
    "qwen2-moe": Qwen2MoeConfig(**_SMALL, num_experts=6, moe_intermediate_size=48, shared_expert_intermediate_size=40),
    "qwen3-moe": Qwen3MoeConfig(**_SMALL, num_experts=8, moe_intermediate_size=48, head_dim=8, norm_topk_prob=True),
    "olmoe": OlmoeConfig(**_SMALL, num_experts=8),
    "deepseek-v3": DeepseekV3Config(
        **{**_SMALL, "num_key_value_heads": 4, "num_hidden_layers": 3},
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def mixture(dense: Path) -> Path:
    upcycle(str(dense), str(dense.parent / "moe"), MoeRecipe(experts=4))
    return dense.parent / "moe"


@pytest.fixture(scope="module")
def expected(dense: Path) -> list[list[int]]:
    plain = driver_of(dense)
    return [plain.one(prompt, GREEDY).tokens for prompt in PROMPTS]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_text_is_the_dense_models_at_every_size(mixture: Path, expected: list[list[int]], size: int) -> None:
    with ranks_on(mixture, size) as ranks:
        assert [result.tokens for result in ranks.generate(PROMPTS, GREEDY)] == expected
        shape = ranks.engine(0)._runner.model.model.layers[0].mlp.experts.down_proj.shape
        assert shape[0] == -(-4 // size), "this rank's experts, and no others"


def test_a_model_alone_needs_no_group(mixture: Path, expected: list[list[int]]) -> None:
    driver = driver_of(mixture, expert_parallel=True)
    assert driver.engine.info.sync_interval == 0
    assert [driver.one(prompt, GREEDY).tokens for prompt in PROMPTS] == expected


@pytest.mark.parametrize("name", MODELS)
def test_a_models_answers_are_those_of_transformers_in_one_process(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    asked = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
    with ranks_on(tmp_path, 2) as ranks:
        results = ranks.generate(PROMPTS[:4], asked)
    for prompt, result in zip(PROMPTS[:4], results, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None, pad_token_id=0
            )
            logprobs = model(want).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert result.tokens == want[0, len(prompt) :].tolist()
        for row, found in zip(logprobs, result.logprobs, strict=True):
            torch.testing.assert_close(torch.tensor(found.top_logprobs), row[found.top_ids], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"expert_slots": 3},
        {"expert_slots": 4},
        {"expert_placement": {"*": [[3, 1, 0], [2]]}},
        {"expert_placement": {"0": [[], [2, 0, 1, 3]], "*": [[1, -1, 2, 0], [-1, 0, 3]]}},
    ],
    ids=["one copy more on each rank", "all on both", "uneven", "none in one layer, empty slots and copies in the other"],
)
def test_wherever_experts_are_and_however_many_copies_the_text_is_the_same(
    mixture: Path, expected: list[list[int]], options: dict[str, Any]
) -> None:
    with ranks_on(mixture, 2, **options) as ranks:
        assert [result.tokens for result in ranks.generate(PROMPTS, GREEDY)] == expected
        placement = ranks.engine(1).rpc_methods()["expert_placement"]()
        if "expert_placement" in options:
            assert placement["1"] == options["expert_placement"]["*"]


def test_a_rank_without_requests_serves_its_experts(mixture: Path, expected: list[list[int]]) -> None:
    with ranks_on(mixture, 3) as ranks:
        assert [result.tokens for result in ranks.generate(PROMPTS, GREEDY, on=[1] * 6)] == expected
        load = [ranks.engine(rank).rpc_methods()["expert_load"]() for rank in range(3)]
        assert not any(map(sum, load[0].values())), "a dummy batch is not counted"
        tokens = ranks.engine(1).kv_cache_stats()["prefilled_tokens"] + 6 * (GREEDY.max_tokens - 1)
        assert {sum(counts) for counts in load[1].values()} == {2 * tokens}, "two experts for each token, in each layer"
        traffic = [ranks.engine(rank).rpc_methods()["expert_traffic"]() for rank in range(3)]
        assert traffic[1]["sent_rows"] > 0 == traffic[0]["sent_rows"]


def test_the_load_counts_what_routers_chose_and_can_be_reset(mixture: Path, dense: Path) -> None:
    with ranks_on(mixture, 2) as ranks:
        ranks.generate(PROMPTS, SamplingParams(max_tokens=1))
        load = ranks.engine(0).rpc_methods()["expert_load"](reset=True)
        model = AutoModelForCausalLM.from_pretrained(mixture)
        routed = model(torch.tensor(PROMPTS[::2]), output_router_logits=True).router_logits
        for layer, logits in enumerate(routed):
            assert load[str(layer)] == logits.topk(2).indices.flatten().bincount(minlength=4).tolist()
        assert not any(map(sum, ranks.engine(0).rpc_methods()["expert_load"]().values()))


def test_prefixes_are_reused_and_preempted_sequences_come_back(mixture: Path, expected: list[list[int]]) -> None:
    with ranks_on(mixture, 2, kv_tokens=72, block_size=4) as ranks:
        assert [result.tokens for result in ranks.generate(PROMPTS, GREEDY)] == expected
        assert sum(ranks.engine(rank).kv_cache_stats()["preemptions"] for rank in range(2)) > 0
        assert [r.tokens for r in ranks.generate(PROMPTS[:1] * 2, GREEDY, on=[0, 0])] == [expected[0]] * 2
        assert ranks.engine(0).kv_cache_stats()["prefix_hit_tokens"] > 0


def test_long_prompts_in_chunks_beside_decodes_on_other_ranks(mixture: Path, dense: Path) -> None:
    asked, plain = prompts(4, length=90, seed=3), driver_of(dense)
    with ranks_on(mixture, 2, max_batch_tokens=16, max_sequences=4) as ranks:
        results = ranks.generate(asked, GREEDY, on=[0, 1, 1, 1])
    assert [result.tokens for result in results] == [plain.one(prompt, GREEDY).tokens for prompt in asked]


def test_only_this_ranks_experts_are_read(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    own_part = expert_loading._own_part

    class Noted:
        def __init__(self, key: str, stored: Any) -> None:
            self.key, self.stored = key, stored

        def __getitem__(self, part: Any) -> torch.Tensor:
            read.append(self.key)
            return self.stored[part]

        def get_shape(self) -> list[int]:
            return self.stored.get_shape()

    monkeypatch.setattr(expert_loading, "_own_part", lambda key, stored, *rest: own_part(key, Noted(key, stored), *rest))
    engine = engine_on(mixture, rank=1, data_parallel_size=4)
    experts = {key.split(".experts.")[1].split(".")[0] for key in read if ".experts." in key}
    assert experts == {"1"}
    assert len(read) == len(set(read)), "nothing is read twice"
    engine.close()


def test_checksums_are_by_expert_wherever_it_is(mixture: Path) -> None:
    whole = engine_on(mixture).utilities()["compute_weight_checksums"]()
    with ranks_on(mixture, 2, expert_placement={"*": [[3, 1, -1], [2, 0, 3]]}) as ranks:
        parts = [ranks.engine(rank).utilities()["compute_weight_checksums"]() for rank in range(2)]
    assert {**parts[0], **parts[1]} == whole
    assert {key.split(".experts.")[1].split(".")[0] for key in parts[0] if ".experts." in key} == {"1", "3"}


def test_a_sleeping_pool_reads_its_own_experts_again(mixture: Path, expected: list[list[int]]) -> None:
    with ranks_on(mixture, 2, expert_placement={"*": [[3, 1], [2, 0]]}) as ranks:
        for rank in range(2):
            utilities = ranks.engine(rank).utilities()
            utilities["sleep"](level=2)
            assert utilities["wake_up"]()
        assert [result.tokens for result in ranks.generate(PROMPTS, GREEDY)] == expected


def test_a_step_that_loses_a_peer_changes_nothing_and_goes_on_in_a_new_group(mixture: Path, expected: list[list[int]]) -> None:
    with ranks_on(mixture, 3) as ranks:
        results = [ranks.drivers[rank].add(prompt, GREEDY) for prompt, rank in zip(PROMPTS, [0, 1, 0, 1, 0, 1], strict=True)]
        for _ in range(4):
            ranks.on_all(ranks.step)
        before = [list(result.tokens) for result in results]
        ranks.groups[2].close()
        ranks.on_all(lambda rank: _fails(ranks, rank), [0, 1])
        assert [result.tokens for result in results] == before
        ranks.meet()
        ranks.run()
        assert [result.tokens for result in results] == expected


def _fails(ranks: Ranks, rank: int) -> None:
    with pytest.raises(LockstepError, match="collective"):
        ranks.step(rank)


def test_without_a_group_or_with_one_of_other_ranks_a_step_is_refused(mixture: Path) -> None:
    with ranks_on(mixture, 2) as ranks:
        ranks.drivers[0].add(PROMPTS[0], GREEDY)
        ranks.engine(0).set_group(None)
        with pytest.raises(LockstepError, match="no process group"):
            ranks.drivers[0].step()
        ranks.engine(0).set_group(ranks.groups[1])
        with pytest.raises(LockstepError, match="placed on 2 ranks, this one being 0; the process group has 2, this one being 1"):
            ranks.engine(0).idle_step()
        ranks.engine(0).set_group(ranks.groups[0])
        ranks.run()


def test_what_cannot_be_is_refused_by_name(mixture: Path, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no experts"):
        engine_on(dense, expert_parallel=True)
    with pytest.raises(ConfigurationError, match="rank 2 is none of the 2 ranks"):
        engine_on(mixture, rank=2, data_parallel_size=2)
    with pytest.raises(ConfigurationError, match="no copy of expert 1"):
        engine_on(mixture, data_parallel_size=2, expert_placement={"*": [[0], [2, 3]]})
    engine = engine_on(mixture, data_parallel_size=2)
    with pytest.raises(NotSupportedError, match="2 of 4 experts"):
        engine.utilities()["save_sharded_state"](path=str(tmp_path / "saved"))
    assert not list(tmp_path.iterdir())
    engine.close()


def test_a_pool_of_a_dense_model_or_with_the_option_off_steps_alone(mixture: Path, dense: Path) -> None:
    for path, options in ((dense, {}), (mixture, {"expert_parallel": False})):
        engine = engine_on(path, data_parallel_size=2, **options)
        assert (engine.info.sync_interval, engine.info.is_expert_parallel) == (0, False)
        engine.close()
    engine = engine_on(mixture, data_parallel_size=1)
    assert (engine.info.sync_interval, engine.info.is_expert_parallel) == (1, True)
    engine.close()


def test_ranks_may_begin_their_steps_at_different_times(mixture: Path, expected: list[list[int]]) -> None:
    """A rank that is late holds the others up in their first exchange and changes nothing."""
    with ranks_on(mixture, 2) as ranks:
        result = ranks.drivers[0].add(PROMPTS[0], GREEDY)
        first = threading.Thread(target=ranks.step, args=(0,))
        first.start()
        first.join(0.05)
        assert first.is_alive()
        ranks.step(1)
        first.join(30)
        assert len(result.tokens) == 1
        ranks.run()
        assert result.tokens == expected[0]
