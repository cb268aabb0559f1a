"""Sleep and wake-up of the torch engine: memory falls and comes back, answers stay the same, wrong states are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from raycore.engine import RequestRefused
from raycore.errors import EngineStateError, InvalidArgumentsError
from tests.torch_engine.tiny import GREEDY, driver_of, prompts, save_llama


@pytest.fixture
def tiny(tmp_path):
    return save_llama(tmp_path / "tiny")


def call(driver, name, /, **arguments):
    return driver.engine.utilities()[name](**arguments)


def stats(driver):
    return driver.engine.rpc_methods()["memory_stats"]()


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("tags", [[None], [["weights"], ["kv_cache"]], [["kv_cache"], ["weights"]], [["weights", "kv_cache"]]])
def test_answers_are_the_same_after_a_sleep_and_frozen_requests_go_on(tiny, level, tags):
    awake = driver_of(tiny)
    asked = prompts(3)
    expected = [awake.one(prompt, GREEDY).tokens for prompt in asked]
    driver = driver_of(tiny, max_batch_tokens=16, max_sequences=4)
    assert driver.one(asked[0], GREEDY).tokens == expected[0]
    frozen = [driver.add(prompt, GREEDY) for prompt in asked]
    for _ in range(7):
        driver.step()
    assert any(result.tokens for result in frozen)
    assert not all(result.reason for result in frozen)
    call(driver, "sleep", level=level)
    for wanted in tags[:-1]:
        assert call(driver, "wake_up", tags=wanted) is False
        with pytest.raises(EngineStateError, match=f"back already: {wanted[0]}"):
            call(driver, "wake_up", tags=wanted)
    assert call(driver, "wake_up", tags=tags[-1]) is True
    driver.run()
    assert [result.tokens for result in frozen] == expected
    assert driver.one(asked[1], GREEDY).tokens == expected[1]
    driver.engine.check_invariants()


def test_nothing_of_the_old_cache_is_found_after_a_sleep(tiny):
    driver = driver_of(tiny)
    prompt = prompts(1, 40)[0]
    driver.one(prompt, GREEDY)
    call(driver, "sleep", level=1)
    call(driver, "wake_up")
    before = driver.engine.kv_cache_stats()
    driver.one(prompt, GREEDY)
    after = driver.engine.kv_cache_stats()
    assert after["prefix_hit_tokens"] == before["prefix_hit_tokens"]
    assert after["prefilled_tokens"] - before["prefilled_tokens"] == len(prompt)


def test_the_engine_counts_what_it_holds(tiny):
    driver = driver_of(tiny)
    awake = stats(driver)
    assert awake["weights_bytes"] > 0
    assert awake["kv_cache_bytes"] > 0
    call(driver, "sleep", level=2)
    asleep = stats(driver)
    assert asleep["kv_cache_bytes"] == 0
    assert asleep["weights_bytes"] < awake["weights_bytes"] / 100  # the buffers of the positions stay
    call(driver, "wake_up", tags=["kv_cache"])
    assert stats(driver)["kv_cache_bytes"] == awake["kv_cache_bytes"]
    call(driver, "wake_up")
    back = stats(driver)
    assert (back["weights_bytes"], back["kv_cache_bytes"]) == (awake["weights_bytes"], awake["kv_cache_bytes"])


def test_the_dense_copy_of_decodes_goes_with_the_cache(tiny):
    driver = driver_of(tiny, kv_tokens=8192, device="cpu")
    empty = stats(driver)["kv_cache_bytes"]
    for prompt in prompts(3):
        driver.add(prompt, GREEDY)
    for _ in range(4):
        driver.step()
    assert stats(driver)["kv_cache_bytes"] > empty
    call(driver, "sleep", level=1)
    assert stats(driver)["kv_cache_bytes"] == 0
    call(driver, "wake_up")
    assert stats(driver)["kv_cache_bytes"] == empty
    driver.run()


def test_on_a_cpu_level_1_keeps_the_weights_where_they_are(tiny):
    driver = driver_of(tiny, device="cpu")
    awake = stats(driver)
    call(driver, "sleep", level=1)
    asleep = stats(driver)
    assert asleep["weights_bytes"] == awake["weights_bytes"]
    assert asleep["weights_host_bytes"] == 0
    assert asleep["kv_cache_bytes"] == 0


def test_a_wrong_state_is_refused_and_says_what_to_do(tiny, tmp_path):
    driver = driver_of(tiny, device="cpu")
    with pytest.raises(EngineStateError, match="awake: there is nothing to wake up"):
        call(driver, "wake_up")
    with pytest.raises(InvalidArgumentsError, match="level must be 1"):
        call(driver, "sleep", level=3)
    call(driver, "sleep", level=2)
    with pytest.raises(EngineStateError, match="sleeps already, at level 2: call wake_up"):
        call(driver, "sleep", level=1)
    for tags in (["weight"], [], ["kv_cache", "scheduling"]):
        with pytest.raises(InvalidArgumentsError, match="tags are None, or some of"):
            call(driver, "wake_up", tags=tags)
    for work in (
        driver.engine.step,
        driver.engine.idle_step,
        lambda: call(driver, "save_sharded_state", path=str(tmp_path / "saved")),
        lambda: call(driver, "add_lora", lora_id=1, name="a", path=str(tmp_path)),
        lambda: call(driver, "compute_weight_checksums"),
    ):
        with pytest.raises(EngineStateError, match="wake_up first"):
            work()
    with pytest.raises(EngineStateError, match="released already: the engine sleeps"):
        call(driver, "release_kv_cache_memory")
    assert not (tmp_path / "saved").exists()
    call(driver, "wake_up")
    assert len(driver.one([5, 6], GREEDY).tokens) == 12


def test_a_wake_up_that_cannot_read_the_checkpoint_leaves_the_engine_asleep(tiny):
    driver = driver_of(tiny)
    expected = driver.one([5, 6, 7], GREEDY).tokens
    call(driver, "sleep", level=2)
    tiny.rename(tiny.with_name("moved"))
    with pytest.raises(EngineStateError, match=r"cannot be read again.*does not exist.*wake_up again"):
        call(driver, "wake_up")
    save_llama(tiny, hidden_size=64)
    with pytest.raises(EngineStateError, match="another one now"):
        call(driver, "wake_up")
    shutil.rmtree(tiny)
    tiny.with_name("moved").rename(tiny)
    assert call(driver, "wake_up") is True
    assert driver.one([5, 6, 7], GREEDY).tokens == expected


def test_a_released_cache_comes_back_with_the_next_request_or_a_wake_up(tiny):
    driver = driver_of(tiny)
    expected = driver.one([5, 6, 7], GREEDY).tokens
    running = driver.add([5, 6, 7], GREEDY)
    with pytest.raises(EngineStateError, match="requests need the KV cache"):
        call(driver, "release_kv_cache_memory")
    driver.run()
    assert running.tokens == expected
    call(driver, "release_kv_cache_memory")
    assert stats(driver)["kv_cache_bytes"] == 0
    with pytest.raises(EngineStateError, match="released already"):
        call(driver, "release_kv_cache_memory")
    assert driver.one([5, 6, 7], GREEDY).tokens == expected
    call(driver, "release_kv_cache_memory")
    driver.engine.idle_step()
    call(driver, "release_kv_cache_memory")
    assert call(driver, "wake_up", tags=["kv_cache"]) is True
    call(driver, "release_kv_cache_memory")
    call(driver, "sleep", level=1)
    assert call(driver, "wake_up") is True
    assert driver.one([5, 6, 7], GREEDY).tokens == expected


def test_a_refused_request_does_not_bring_a_released_cache_back(tiny):
    driver = driver_of(tiny)
    call(driver, "release_kv_cache_memory")
    with pytest.raises(RequestRefused):
        driver.add([97])
    assert stats(driver)["kv_cache_bytes"] == 0


RESIDENT = """
import json, sys
import numpy as np
from raycore.engine import EngineRequest
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.controls import resident_bytes
from raycore.sampling import SamplingParams

engine = TorchEngine.create(TorchEngineOptions(model=sys.argv[1], device="cpu", kv_tokens=8192, threads=1, enable_prefix_caching=False))
def fill():
    for handle in range(8):
        engine.add(EngineRequest(handle, "r", np.full(1000, 5, np.uint32), SamplingParams(max_tokens=8, ignore_eos=True)))
    while engine.has_work():
        engine.step()
fill()
rows = [resident_bytes()]
for work in (lambda: engine.utilities()["sleep"](level=2), lambda: engine.utilities()["wake_up"](), fill):
    work()
    rows.append(resident_bytes())
print(json.dumps(rows + [engine.rpc_methods()["memory_stats"]()]))
"""


def test_the_process_really_gives_its_memory_back(tmp_path):
    size = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "num_key_value_heads": 4}
    model = save_llama(tmp_path / "model", **size, max_position_embeddings=2048)
    run = subprocess.run([sys.executable, "-c", RESIDENT, str(model)], capture_output=True, text=True, timeout=100, check=True)
    awake, asleep, woken, used, stats = json.loads(run.stdout)
    held = stats["weights_bytes"] + stats["kv_cache_bytes"]
    assert held > 150e6
    assert awake - asleep > 0.9 * held
    assert woken > asleep
    assert used > awake - 0.2 * held
