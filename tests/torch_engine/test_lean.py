"""The lean forward pass: the same answers as transformers' own modules, and only for models it is right for."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import nn

from raycore.engines.torch.attention import run_model
from raycore.engines.torch.lean import LeanDecoder
from tests.torch_engine import test_device
from tests.torch_engine.test_device import MODELS, by_generate, run_together

pytestmark = pytest.mark.skipif(test_device.ON_GPU or test_device.HAS_KERNELS, reason="the device tests do the same there")
make = test_device.make


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [512, 11])
def test_answers_equal_those_of_generate(name, budget):
    driver = make(name, max_batch_tokens=budget)
    assert isinstance(driver.engine._runner._forward, LeanDecoder) == (name != "gemma2")
    assert run_together(driver) == by_generate(name)


def test_a_batch_changes_no_answer():
    together = run_together(make("llama"))
    driver = make("llama")
    assert [driver.one(prompt, test_device.SAMPLING).tokens for prompt in test_device.prompts()] == together


def test_hooks_on_projections_are_honoured():
    driver = make("llama")
    before = run_together(driver)
    driver.engine.reset_prefix_cache()
    module = driver.engine._runner.model.model.layers[1].mlp.down_proj
    hook = module.register_forward_hook(lambda _, __, output: -output)
    changed = run_together(driver)
    hook.remove()
    driver.engine.reset_prefix_cache()
    assert changed != before
    assert run_together(driver) == before


def test_a_model_that_calls_itself_llama_and_is_not_keeps_its_own_modules(caplog, monkeypatch):
    class OffsetNorm(nn.Module):
        """Gemma's normalisation: one plus the weight."""

        def __init__(self, norm):
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, hidden):
            return torch.rms_norm(hidden, self.weight.shape, 1 + self.weight, self.variance_epsilon)

    def build():
        model = plain()
        model.model.norm = OffsetNorm(model.model.norm)
        model.model.layers[0].input_layernorm = OffsetNorm(model.model.layers[0].input_layernorm)
        return model

    plain = MODELS["llama"]
    monkeypatch.setitem(MODELS, "odd", build)
    with caplog.at_level(logging.WARNING, "raycore.engines.torch"):
        driver = make("odd")
    assert "the lean forward pass differs by" in caplog.text
    assert isinstance(driver.engine._runner._forward, partial)
    assert driver.engine._runner._forward.func is run_model
    assert run_together(driver) == by_generate("odd")
