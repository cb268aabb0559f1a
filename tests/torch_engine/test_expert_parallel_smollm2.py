"""SmolLM2 made a mixture of experts, on two ranks: the answers are the dense model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycore.engines.torch import TorchEngine
from raycore.engines.torch.upcycle import MoeRecipe, upcycle
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer
from tests.torch_engine.conftest import Driver
from tests.torch_engine.ranks import ranks_on

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

QUESTIONS = ("What is the capital of France?", "Name three primary colors.")
GREEDY = SamplingParams(max_tokens=12)


def test_two_ranks_answer_as_the_dense_model(smollm2: TorchEngine, tokenizer: Tokenizer, driver: Driver, tmp_path: Path) -> None:
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in QUESTIONS]
    dense = [driver.one(prompt, GREEDY).tokens for prompt in prompts]
    upcycle(smollm2.info.model, str(tmp_path / "moe"), MoeRecipe(experts=2, experts_per_token=1))  # the smallest that has a choice
    with ranks_on(tmp_path / "moe", 2) as ranks:
        assert [result.tokens for result in ranks.generate(prompts, GREEDY)] == dense
        assert all(ranks.engine(rank).rpc_methods()["expert_traffic"]()["sent_rows"] for rank in range(2))
    assert tokenizer.decode(dense[0]).startswith("The capital of France is Paris.")
