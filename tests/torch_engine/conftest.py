"""A SmolLM2 engine for the whole session, and a way to run requests on any engine to their end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from raycore.client.logprobs import TokenLogprob
from raycore.engine import Detail, EngineRequest, FinishReason, LogprobRows
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.conversion import converted
from raycore.engines.torch.loading import Checkpoint, find_smollm2, load_checkpoint
from raycore.errors import ConfigurationError
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer

DEVICE = os.environ.get("RAYCORE_TEST_DEVICE", "cpu")
"""`cuda` runs the model tests on a GPU (in float32, as here, so that the same answers are expected)."""
THREADS = 1
"""One: with two, every small operation waits at a barrier for a core that another process may hold."""
STEP_LIMIT = 5000
MAX_SEQUENCES = 64 if DEVICE == "cpu" else 24
"""Fewer on a GPU, where a graph is recorded for each batch size of every engine."""


@dataclass
class Result:
    """What one request gave."""

    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    details: list[Detail] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def stop_reason(self) -> int | str | None:
        return self.details[-1].stop_reason if self.details else None


def rows_of(part: LogprobRows) -> Iterator[tuple[int, TokenLogprob]]:
    """(handle, row), in order."""
    at = 0
    for i, handle in enumerate(part.handles.tolist()):
        end = at + int(part.widths[i])
        top = part.top_ids[at:end].tolist(), part.top_logprobs[at:end].tolist()
        yield handle, TokenLogprob(int(part.token_ids[i]), float(part.logprobs[i]), int(part.ranks[i]), *top)
        at = end
    assert at == len(part.top_ids) == len(part.top_logprobs)


@dataclass
class Driver:
    """Adds requests to an engine, steps it, and keeps what comes out."""

    engine: TorchEngine
    results: dict[int, Result] = field(default_factory=dict)

    def add(self, prompt, sampling=None, *, delivered=(), priority=0, tensors=None) -> Result:
        handle = len(self.results)
        ids, seen = np.array(prompt, dtype=np.uint32), np.array(delivered, dtype=np.uint32)
        request = EngineRequest(handle, f"r{handle}", ids, sampling or SamplingParams(), seen, priority, tensors or {})
        self.engine.add(request)
        self.results[handle] = Result()
        return self.results[handle]

    def step(self) -> None:
        output = self.engine.step()
        assert output.counts is None
        for handle, token in zip(output.handles.tolist(), output.tokens.tolist(), strict=True):
            assert self.results[handle].reason is None, "a token after the end"
            self.results[handle].tokens.append(token)
        for handle, detail in output.details:
            self.results[handle].details.append(detail)
        for part in output.logprobs:
            for handle, row in rows_of(part):
                result = self.results[handle]
                (result.prompt_logprobs if part.of_prompt else result.logprobs).append(row)
        for handle, reason in zip(output.finished.tolist(), output.reasons, strict=True):
            self.results[handle].reason = FinishReason(reason)

    def run(self) -> None:
        for _ in range(STEP_LIMIT):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine did not finish")

    def one(self, prompt, sampling=None, **keywords) -> Result:
        result = self.add(prompt, sampling, **keywords)
        self.run()
        return result


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    torch.set_num_threads(THREADS)
    try:
        model = os.environ.get("RAYCORE_TEST_MODEL") or str(converted(find_smollm2()))
    except ConfigurationError as error:
        if DEVICE == "cpu":
            raise
        pytest.skip(str(error))  # a machine lent for its GPU need not have the package
    return load_checkpoint(TorchEngineOptions(model=model, device=DEVICE, dtype="float32"))


@pytest.fixture(scope="session")
def smollm2(checkpoint: Checkpoint) -> Iterator[TorchEngine]:
    engine = TorchEngine.of(
        checkpoint, TorchEngineOptions(model=checkpoint.name, kv_tokens=8192, device=DEVICE, max_sequences=MAX_SEQUENCES)
    )
    yield engine
    engine.close()


@pytest.fixture
def driver(smollm2: TorchEngine) -> Iterator[Driver]:
    yield Driver(smollm2)
    smollm2.abort(list(range(1000)))
    smollm2.check_invariants()
    assert smollm2.kv_cache_stats()["blocks_held"] == 0
    assert smollm2.reset_prefix_cache()


def driver_on(checkpoint: Checkpoint, **options: Any) -> Driver:
    """An engine with the loaded weights and a cache, budget or block size of its own."""
    return Driver(
        TorchEngine.of(
            checkpoint,
            TorchEngineOptions(
                **{"model": checkpoint.name, "kv_tokens": 4096, "device": DEVICE, "max_sequences": MAX_SEQUENCES, **options}
            ),
        )
    )


@pytest.fixture
def make_driver(checkpoint: Checkpoint) -> Callable[..., Driver]:
    return partial(driver_on, checkpoint)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    assert checkpoint.tokenizer is not None
    return checkpoint.tokenizer
