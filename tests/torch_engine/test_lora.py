"""LoRA: what peft computes, in batches of many adapters; eviction, pins, prefixes; wrong adapters are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raycore.engine import EngineRequest, FinishReason, RequestRefused
from raycore.errors import AdapterError, ConfigurationError, InvalidArgumentsError
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import Result
from tests.torch_engine.tiny import GREEDY, driver_of, engine_on, prompts, save_llama, save_mixtral

pytestmark = [
    # peft asks transformers for a name that it is about to drop,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # and tells that an adapter of the head is saved with the head.
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning"),
]

ATTENTION = ["q_proj", "v_proj"]
KINDS = {
    "attention": {"r": 4, "target_modules": ATTENTION},
    "all linear": {"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "use_rslora": True},
    "uneven": {"r": 2, "target_modules": ["o_proj", "down_proj"], "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"o_proj": 20}},
    "head": {"r": 3, "target_modules": ["lm_head", "k_proj"]},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("lora") / "tiny")


def make_adapter(model: Path, path: Path, seed: int, config: LoraConfig) -> Path:
    """An adapter of random tensors, large enough to change greedy answers."""
    torch.manual_seed(seed)
    fitted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    for name, parameter in fitted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    fitted.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(tiny, root / name.replace(" ", "-"), seed, LoraConfig(**settings))
        for seed, (name, settings) in enumerate(KINDS.items(), start=1)
    }


def answer_of(model: Path, adapter: Path | None, prompt: list[int], count: int = 12) -> list[int]:
    """transformers' own greedy answer, with peft's own adapter."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
    ids = torch.tensor([prompt])
    output = loaded.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


def add(driver, prompt, lora=None, sampling=GREEDY) -> Result:
    handle = len(driver.results)
    driver.engine.add(EngineRequest(handle, f"r{handle}", np.array(prompt, np.uint32), sampling, lora=lora))
    driver.results[handle] = Result()
    return driver.results[handle]


def load_all(driver, adapters) -> None:
    for lora_id, (name, path) in enumerate(adapters.items(), start=1):
        assert driver.engine.utilities()["add_lora"](lora_id=lora_id, name=name, path=str(path)) is True


def test_every_adapter_alone_and_all_in_one_batch_give_what_peft_gives(tiny, adapters):
    asked = prompts(10)
    chosen = [None, *adapters, *adapters, None]
    expected = [answer_of(tiny, adapters[name] if name else None, prompt) for prompt, name in zip(asked, chosen, strict=True)]
    assert len({tuple(answer_of(tiny, path, asked[0])) for path in adapters.values()}) == len(adapters), "the adapters do nothing"
    alone = driver_of(tiny)
    load_all(alone, adapters)
    for prompt, name, answer in zip(asked, chosen, expected, strict=True):
        result = add(alone, prompt, name)
        alone.run()
        assert result.tokens == answer, name
    for budget in (512, 24):
        mixed = driver_of(tiny, max_batch_tokens=budget, max_sequences=12)
        load_all(mixed, adapters)
        results = [add(mixed, prompt, name) for prompt, name in zip(asked, chosen, strict=True)]
        mixed.run()
        assert [result.tokens for result in results] == expected
        mixed.engine.check_invariants()


def test_logits_under_an_adapter_are_those_of_peft(tiny, adapters):
    driver = driver_of(tiny)
    load_all(driver, adapters)
    prompt = prompts(1)[0]
    seen = []
    forward = driver.engine._runner.forward
    driver.engine._runner.forward = lambda chunks, **how: seen.append(forward(chunks, **how)) or seen[-1]
    names = [None, *adapters]
    for name in names:
        add(driver, prompt, name, SamplingParams(max_tokens=1))
    driver.run()
    rows = torch.cat(seen)
    for row, name in zip(rows, names, strict=True):
        model = AutoModelForCausalLM.from_pretrained(tiny)
        model = model if name is None else PeftModel.from_pretrained(model, str(adapters[name]))
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(row.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_takes_the_type_of_the_model(tiny, adapters):
    driver = driver_of(tiny, dtype="bfloat16")
    load_all(driver, adapters)
    results = [add(driver, prompts(1)[0], name) for name in (None, *adapters)]
    driver.run()
    assert all(result.reason is FinishReason.LENGTH for result in results)
    assert len({tuple(result.tokens) for result in results}) == len(results)


def test_an_adapter_is_named_or_numbered_and_one_that_is_not_there_is_refused(tiny, adapters):
    driver = driver_of(tiny)
    prompt = prompts(1)[0]
    with pytest.raises(RequestRefused, match="no LoRA adapter 'x' is loaded; there is none"):
        add(driver, prompt, "x")
    load_all(driver, adapters)
    by_name, by_id = add(driver, prompt, "attention"), add(driver, prompt, 1)
    driver.run()
    assert by_name.tokens == by_id.tokens
    with pytest.raises(RequestRefused, match=r"no LoRA adapter 9 is loaded; there are 'attention' \(1\)"):
        add(driver, prompt, 9)
    driver.engine.check_invariants()


def test_a_prefix_is_found_under_its_own_adapter_only(tiny, adapters):
    driver = driver_of(tiny)
    load_all(driver, adapters)
    utilities = driver.engine.utilities()
    prompt = prompts(1, 48)[0]

    def hits(lora) -> int:
        before = driver.engine.kv_cache_stats()["prefix_hit_tokens"]
        add(driver, prompt, lora)
        driver.run()
        return driver.engine.kv_cache_stats()["prefix_hit_tokens"] - before

    assert [hits(lora) for lora in (None, "attention", "head", None, "attention", "head")] == [0, 0, 0, 32, 32, 32]
    utilities["remove_lora"](lora_id=1)
    utilities["add_lora"](lora_id=1, name="attention", path=str(adapters["all linear"]))
    assert hits("attention") == 0, "another adapter under the same name found the first one's prefix"
    assert driver.results[len(driver.results) - 1].tokens == answer_of(tiny, adapters["all linear"], prompt)


def test_the_least_recently_used_goes_and_pinned_ones_and_used_ones_stay(tiny, adapters):
    driver = driver_of(tiny, max_loras=2)
    utilities = driver.engine.utilities()
    paths = {name: str(path) for name, path in adapters.items()}
    utilities["add_lora"](lora_id=1, name="one", path=paths["attention"])
    utilities["add_lora"](lora_id=2, name="two", path=paths["head"])
    add(driver, [5], "one")
    driver.run()
    assert utilities["add_lora"](lora_id=3, name="three", path=paths["uneven"]) is True
    assert utilities["list_loras"]() == {1, 3}
    assert utilities["lora_names"]() == {"one": 1, "three": 3}
    assert utilities["pin_lora"](lora_id=1) is True
    utilities["add_lora"](lora_id=4, name="four", path=paths["head"])
    assert utilities["list_loras"]() == {1, 4}
    running = add(driver, [5, 6], "four")
    with pytest.raises(AdapterError, match=r"all 2 adapters \(max_loras\) are pinned or in use"):
        utilities["add_lora"](lora_id=5, name="five", path=paths["uneven"])
    with pytest.raises(AdapterError, match="'four' is in use by 1 requests"):
        utilities["remove_lora"](lora_id=4)
    driver.run()
    assert len(running.tokens) == 12
    with pytest.raises(AdapterError, match="no such directory"):
        utilities["add_lora"](lora_id=5, name="five", path="/nowhere")
    assert utilities["list_loras"]() == {1, 4}, "a wrong adapter evicted a good one"
    assert utilities["remove_lora"](lora_id=4) is True
    assert utilities["remove_lora"](lora_id=4) is False
    assert utilities["remove_lora"](lora_id=1) is True, "a pin keeps from eviction only"
    with pytest.raises(AdapterError, match="no adapter has the id 4"):
        utilities["pin_lora"](lora_id=4)


def test_the_same_again_is_fine_and_a_taken_id_or_name_is_not(tiny, adapters):
    engine = engine_on(tiny)
    add_lora = engine.utilities()["add_lora"]
    path = str(adapters["attention"])
    assert add_lora(lora_id=1, name="a", path=path) is True
    assert add_lora(lora_id=1, name="a", path=path) is True
    for lora_id, name, other in ((1, "b", path), (2, "a", path), (1, "a", str(adapters["head"]))):
        with pytest.raises(AdapterError, match="id 1 and name 'a' belong to"):
            add_lora(lora_id=lora_id, name=name, path=other)
    for lora_id, name in ((0, "c"), (-1, "c"), (3, "")):
        with pytest.raises(InvalidArgumentsError, match="an id of at least 1 and a name"):
            add_lora(lora_id=lora_id, name=name, path=path)
    with pytest.raises(AdapterError, match="max_loras is 0"):
        engine_on(tiny, max_loras=0).utilities()["add_lora"](lora_id=1, name="a", path=path)
    with pytest.raises(ConfigurationError, match="max_loras"):
        engine_on(tiny, max_loras=-1)


def test_an_aborted_request_lets_its_adapter_go(tiny, adapters):
    driver = driver_of(tiny)
    load_all(driver, adapters)
    for step in (0, 3):
        add(driver, prompts(1)[0], "head")
        for _ in range(step):
            driver.step()
        driver.engine.abort([len(driver.results) - 1])
        driver.engine.check_invariants()
    assert driver.engine.utilities()["remove_lora"](lora_id=4) is True


@pytest.mark.parametrize("level", [1, 2])
def test_adapters_outlast_a_sleep(tiny, adapters, level):
    driver = driver_of(tiny)
    load_all(driver, adapters)
    prompt = prompts(1)[0]
    frozen = add(driver, prompt, "all linear")
    driver.step()
    driver.step()
    driver.engine.utilities()["sleep"](level=level)
    assert driver.engine.rpc_methods()["memory_stats"]()["lora_bytes"] == 0
    driver.engine.utilities()["wake_up"]()
    driver.run()
    assert frozen.tokens == answer_of(tiny, adapters["all linear"], prompt)


def changed(path: Path, target: Path, **changes) -> Path:
    shutil.copytree(path, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return target


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def drop_first(tensors) -> None:
    del tensors[min(tensors)]


def spoil_first(tensors) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def wrong_adapters(tiny: Path, good: Path, root: Path):
    yield str(root / "nowhere"), "no such directory"
    yield "x" * 300, "too long"
    yield "~nobody-has-this-name/adapter", "home directory"
    (root / "empty").mkdir()
    yield str(root / "empty"), "adapter_config.json and adapter_model.safetensors missing; found nothing"
    pickled = shutil.copytree(good, root / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    yield str(pickled), "adapter_model.safetensors missing; found"
    broken = shutil.copytree(good, root / "broken")
    (broken / "adapter_config.json").write_text("{")
    yield str(broken), "adapter_config.json cannot be read"
    cut = shutil.copytree(good, root / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"12345")
    yield str(cut), "adapter_model.safetensors cannot be read"
    yield str(changed(good, root / "rank", r=65)), "its rank is 65; the engine takes up to max_lora_rank=64"
    yield str(changed(good, root / "rank of text", r="4")), "a rank must be an integer, not '4'"
    yield str(changed(good, root / "pattern of text", rank_pattern={"q_proj": "x"})), "a rank must be an integer, not 'x'"
    yield str(changed(good, root / "base", base_model_name_or_path=5)), "base_model_name_or_path must be text, not 5"
    yield str(changed(good, root / "scale", lora_alpha=float("nan"))), "scaled by nan, are not finite"
    yield str(changed(good, root / "large", lora_alpha=1e300)), "are not finite in torch.float32"
    yield str(changed(good, root / "shape", r=5)), "it does not fit this model"
    yield str(changed(good, root / "names", target_modules=["query"])), "it does not fit this model"
    yield str(changed(good, root / "more", target_modules=["q_proj"])), "it does not fit this model"
    yield str(changed(good, root / "dora", use_dora=True)), "it uses use_dora, which is not supported"
    yield str(changed(good, root / "bias", bias="all")), "bias='all'"
    yield str(changed(good, root / "saved", modules_to_save=["lm_head"])), "it uses modules_to_save"
    yield str(changed(good, root / "pissa", init_lora_weights="pissa")), "init_lora_weights='pissa'"
    head = make_adapter(tiny, root / "head", 1, LoraConfig(r=4, target_modules=["lm_head"]))
    change_tensors(head, lambda tensors: tensors[next(name for name in tensors if "lora_" not in name)].add_(1))
    yield str(head), "not those of this model"
    for name, change, text in (("gap", drop_first, "adapter_model.safetensors lacks base_model"), ("nan", spoil_first, "are not finite")):
        change_tensors(shutil.copytree(good, root / name), change)
        yield str(root / name), text
    other = save_llama(root / "other", hidden_size=64)
    yield str(make_adapter(other, root / "elsewhere", 1, LoraConfig(r=4, target_modules=ATTENTION))), "hidden_size is 64 there and 32 here"
    ia3 = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    ia3.save_pretrained(root / "ia3")
    yield str(root / "ia3"), "only LORA is supported"
    yield (
        str(make_adapter(tiny, root / "embedding", 1, LoraConfig(r=4, target_modules=["embed_tokens"]))),
        "only linear layers are supported",
    )


def test_a_wrong_adapter_is_refused_by_name_and_nothing_changes(tiny, adapters, tmp_path):
    driver = driver_of(tiny)
    load_all(driver, adapters)
    utilities = driver.engine.utilities()
    prompt = prompts(1)[0]
    expected = answer_of(tiny, adapters["attention"], prompt)
    for path, text in wrong_adapters(tiny, adapters["attention"], tmp_path):
        with pytest.raises(AdapterError) as refusal:
            utilities["add_lora"](lora_id=9, name="wrong", path=path)
        assert str(refusal.value).startswith(f"adapter {path!r}: ")
        assert text in str(refusal.value), path
        assert utilities["list_loras"]() == {1, 2, 3, 4}
    result = add(driver, prompt, "attention")
    driver.run()
    assert result.tokens == expected


def test_experts_as_targets_are_refused(tmp_path):
    model = save_mixtral(tmp_path / "moe")
    config = LoraConfig(r=4, target_modules=ATTENTION, target_parameters=["mlp.experts.gate_up_proj"])
    path = make_adapter(model, tmp_path / "adapter", 1, config)
    with pytest.raises(AdapterError, match="it uses target_parameters"):
        engine_on(model).utilities()["add_lora"](lora_id=1, name="a", path=str(path))


def test_errors_stay_short_however_long_and_many_the_names_are(tiny, adapters):
    driver = driver_of(tiny, max_loras=4)
    long = "n" * 100_000
    driver.engine.utilities()["add_lora"](lora_id=1, name=long, path=str(adapters["attention"]))
    with pytest.raises(RequestRefused, match="no LoRA adapter") as refused:
        driver.engine.add(EngineRequest(1, "r", np.array([1], np.uint32), GREEDY, lora=long + "x"))
    with pytest.raises(AdapterError, match="remove it first") as taken:
        driver.engine.utilities()["add_lora"](lora_id=2, name=long, path=str(adapters["head"]))
    assert max(len(str(refused.value)), len(str(taken.value))) < 1000


def test_a_tensor_that_is_not_known_is_refused_by_its_name(tiny):
    driver = driver_of(tiny)
    with pytest.raises(RequestRefused, match="tensor 'image' is not known"):
        driver.engine.add(EngineRequest(1, "r", np.array([1], np.uint32), GREEDY, tensors={"image": np.zeros(2)}))


def test_a_request_whose_bans_leave_no_token_is_told_so(tiny):
    driver = driver_of(tiny)
    banned = SamplingParams(max_tokens=2, logit_bias={token: float("-inf") for token in range(97)})
    result = driver.one([1, 2, 3], banned)
    assert result.reason is FinishReason.ERROR
    assert "bans and biases leave no token" in result.details[-1].error_message
