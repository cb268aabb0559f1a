"""A dense model made a mixture of experts: the same text, other bytes in every expert, and nothing half written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from raycore import cli
from raycore.engines.torch.checksums import weight_checksums
from raycore.engines.torch.upcycle import MoeRecipe, upcycle
from raycore.errors import ConfigurationError, SaveError
from tests.torch_engine.tiny import GREEDY, TINY, driver_of, prompts, save_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense") / "model")


@pytest.mark.parametrize(("experts", "experts_per_token"), [(4, 2), (8, 3)])
def test_the_mixture_says_what_the_dense_model_says(dense: Path, tmp_path: Path, experts: int, experts_per_token: int) -> None:
    layers: list[tuple[int, int]] = []
    recipe = MoeRecipe(experts=experts, experts_per_token=experts_per_token)
    report = upcycle(str(dense), str(tmp_path / "moe"), recipe, on_layer=lambda done, of: layers.append((done, of)))
    assert layers == [(1, 2), (2, 2)]
    assert (report.layers, report.experts) == (2, experts)
    plain, mixture = driver_of(dense), driver_of(tmp_path / "moe")
    for prompt in prompts(6):
        assert mixture.one(prompt, GREEDY).tokens == plain.one(prompt, GREEDY).tokens
    ids = torch.tensor(prompts(2))
    one, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits for path in (dense, tmp_path / "moe"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_experts_have_different_bytes_and_a_seed_decides_all_of_them(dense: Path, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle(str(dense), str(tmp_path / name), MoeRecipe(seed=seed))
        found[name] = weight_checksums(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    assert found["a"] == found["b"]
    experts = [value for key, value in found["a"].items() if ".experts." in key]
    assert len(experts) == len(set(experts)) == 2 * 2 * 4, "two tensors in two layers for four experts, all different"
    changed = {key for key, value in found["a"].items() if found["c"][key] != value}
    assert changed == {key for key in found["a"] if ".experts." in key or key.endswith("mlp.gate.weight")}


def test_tokens_spread_over_the_experts(dense: Path, tmp_path: Path) -> None:
    upcycle(str(dense), str(tmp_path / "moe"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    logits = model(torch.tensor(prompts(8)), output_router_logits=True).router_logits
    for layer in logits:
        assert set(layer.topk(2).indices.flatten().tolist()) == {0, 1, 2, 3}


def test_what_cannot_be_upcycled_is_refused_and_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    config = Qwen2Config(**TINY)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    with pytest.raises(ConfigurationError, match=r"qwen2 .*q_proj\.bias"):
        upcycle(str(tmp_path / "qwen"), str(tmp_path / "moe"))
    for wrong, text in (
        (MoeRecipe(experts=0), "experts must"),
        (MoeRecipe(experts=2, experts_per_token=3), "experts_per_token"),
        (MoeRecipe(dtype="auto"), "dtype"),
    ):
        with pytest.raises(ConfigurationError, match=text):
            upcycle(str(dense), str(tmp_path / "moe"), wrong)
    with pytest.raises(SaveError, match="exists"):
        upcycle(str(dense), str(tmp_path / "qwen"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["qwen"]


def test_the_command_makes_one_and_says_what_it_made(dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["make-moe", str(tmp_path / "moe"), "--model", str(dense), "--experts", "8", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["experts"], report["path"]) == (8, str(tmp_path / "moe"))
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_local_experts"] == 8
    assert cli.run(["make-moe", str(tmp_path / "moe"), "--model", str(dense)]) == 1
    assert cli.run(["make-moe", str(tmp_path / "other"), "--model", str(dense), "--experts", "0"]) == 2


def test_the_help_shows_how_the_command_is_used(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["make-moe", "--help"]) == 0
    assert "raycore make-moe smol-moe-8 --experts 8 --seed 1" in " ".join(capfd.readouterr().out.split())
