"""The torch engine for the task "embed": a vector a prompt, by any model of transformers, encoder or decoder.

A prompt is computed in one step and nothing is kept of it, so there is no cache and no scheduler: steps take prompts in order and pad
them to the longest, within the same token budget as generation.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from transformers import PreTrainedModel

from raycore.engine import (
    EMBED,
    MAKE_TRACE,
    MEMORY_STATS,
    Activity,
    Detail,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    FinishReason,
    RequestRefused,
    StepOutput,
    TokenArray,
)
from raycore.engines.torch.controls import Controls
from raycore.engines.torch.loading import LOAD_BUDGET_S, find_source, load_model, load_tokenizer_of
from raycore.engines.torch.options import TorchEngineOptions
from raycore.engines.torch.outcome import StepOutcome
from raycore.engines.torch.pooling import Pooling, find_pooling, pool
from raycore.engines.torch.sleep import Sleep
from raycore.engines.torch.trace import TorchTrace
from raycore.engines.torch.weight_copy import LentModel, TakenModel, is_lendable
from raycore.engines.torch.weights import Weights
from raycore.errors import ConfigurationError
from raycore.tokenizer import Tokenizer
from raycore.weight_copies import LentWeights

_OFFSET_FAMILIES = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "mpnet"})
"""Their first position is one behind the padding id, which takes so many of their positions away."""


@dataclass(slots=True, frozen=True)
class _Waiting:
    order: tuple[int, int]
    handle: int
    tokens: TokenArray


@final
class EmbedEngine:
    """One model on one device; made by `create`."""

    def __init__(
        self, info: EngineInfo, weights: Weights, pooling: Pooling, tokenizer: Tokenizer | None, options: TorchEngineOptions
    ) -> None:
        self._info = info
        self._weights = weights
        self._pooling = pooling
        self._tokenizer = tokenizer
        self._options = options
        self._queue: list[_Waiting] = []
        self._arrivals = 0
        self._steps = 0
        self._sleep = Sleep(weights, _nothing, _nothing, _nothing)
        self._controls = Controls(
            weights, self._sleep, None, None, tokenizer=tokenizer, rank=options.rank, has_work=self.has_work, cache_bytes=lambda: 0
        )

    @classmethod
    def create(cls, options: TorchEngineOptions, taken: TakenModel | None = None) -> EmbedEngine:
        """Load model, tokenizer and pooling; raises ConfigurationError that names what is wrong. `taken`: what peers gave of it."""
        if options.threads is not None:
            torch.set_num_threads(options.threads)

        def load() -> PreTrainedModel:
            return load_model(find_source(options.model), options, task=EMBED)

        if taken is not None and taken.pooling is not None:
            model, tokenizer, pooling = taken.model, taken.tokenizer, taken.pooling
        else:
            source = find_source(options.model)
            model, tokenizer = load(), load_tokenizer_of(source)
            pooling = find_pooling(source.directory, model.config)
        info = EngineInfo(
            engine="torch",
            model=options.model,
            vocab_size=int(model.config.get_text_config().vocab_size),
            max_model_len=_limit(model, pooling, options),
            kv_tokens=0,
            tasks=(EMBED,),
        )
        return cls(info, Weights(model, load), pooling, tokenizer, options)

    @property
    def info(self) -> EngineInfo:
        """Facts that do not change while the engine lives."""
        return self._info

    def add(self, request: EngineRequest) -> None:
        """Queue a prompt; raise RequestRefused when it can never be served."""
        tokens, limit = request.prompt_token_ids, self._info.max_model_len
        highest = int(tokens.max()) if len(tokens) else -1
        checks = (
            (not len(tokens), "the prompt is empty"),
            (len(tokens) > limit, f"the prompt has {len(tokens)} tokens; the model takes at most {limit}"),
            (highest >= self._info.vocab_size, f"token id {highest} is outside the vocabulary of {self._info.vocab_size}"),
            (bool(request.tensors), "the prompt of an embedding is token ids; it takes no tensors"),
            (request.task != EMBED, f"the model is loaded to embed, not to {request.task}"),
        )
        problem = next((text for is_wrong, text in checks if is_wrong), None)
        if problem is not None:
            raise RequestRefused(problem)
        self._arrivals += 1
        # copied: the request's array may be a view of a message
        insort(self._queue, _Waiting((request.priority, self._arrivals), request.handle, tokens.copy()), key=lambda w: w.order)

    def abort(self, handles: Sequence[int]) -> None:
        """Forget these prompts."""
        gone = set(handles)
        self._queue = [waiting for waiting in self._queue if waiting.handle not in gone]

    @torch.inference_mode()
    def step(self) -> StepOutput:
        """The vectors of the first prompts in order, as many as fit the token budget with padding."""
        self._sleep.check_awake("a step")
        batch = self._take()
        outcome = StepOutcome()
        for waiting, vector in zip(batch, self._embed([waiting.tokens for waiting in batch]), strict=True):
            if np.isfinite(vector).all():
                outcome.end(waiting.handle, FinishReason.STOP, Detail(embedding=vector.astype("<f4").tobytes()))
            else:
                error = Detail(error_type=ArithmeticError.__name__, error_message="the model gave a vector that is not finite")
                outcome.end(waiting.handle, FinishReason.ERROR, error)
        self._steps += 1
        return outcome.columns(np.empty(0, dtype=np.uint32))

    def has_work(self) -> bool:
        """Whether any prompt waits."""
        return bool(self._queue)

    @torch.inference_mode()
    def idle_step(self) -> None:
        """A forward pass over one token."""
        self._sleep.check_awake("a dummy step")
        self._embed([np.zeros(1, dtype=np.uint32)])

    def lend_weights(self) -> LentWeights | None:
        """See `WeightGiver`."""
        model = self._weights.present()
        return LentModel(model, self._tokenizer, task=EMBED, pooling=self._pooling) if is_lendable(model) else None

    def load(self) -> EngineLoad:
        """The load now."""
        return EngineLoad(0, len(self._queue), 0, sum(len(waiting.tokens) for waiting in self._queue))

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        """The operations of the table that mean something without a cache, adapters or tokens."""
        return {**self._controls.utilities(), MAKE_TRACE: TorchTrace}

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        """Facts about memory."""
        return {MEMORY_STATS: self._controls.memory_stats}

    def budget_s(self, activity: Activity) -> float | None:
        """Loading may take long."""
        return LOAD_BUDGET_S if activity is Activity.LOAD else None

    def close(self) -> None:
        """Forget every prompt."""
        self._queue.clear()

    def _take(self) -> list[_Waiting]:
        count, longest = 0, 0
        for waiting in self._queue[: self._options.max_sequences]:
            longest = max(longest, len(waiting.tokens))
            if count and longest * (count + 1) > self._options.max_batch_tokens:
                break
            count += 1
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    def _embed(self, prompts: Sequence[TokenArray]) -> np.ndarray:
        """Vectors [N, size] float32 of N prompts."""
        model = self._weights.present()
        longest = max(map(len, prompts))
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            mask[row, : len(prompt)] = 1
        # Some models count positions by what is not the padding id.
        ids[mask == 0] = model.config.get_text_config().pad_token_id or 0
        inputs = {"input_ids": torch.from_numpy(ids).to(model.device), "attention_mask": torch.from_numpy(mask).to(model.device)}
        hidden = model(**inputs).last_hidden_state
        return pool(hidden, inputs["attention_mask"].sum(1), self._pooling).cpu().numpy()


def _limit(model: PreTrainedModel, pooling: Pooling, options: TorchEngineOptions) -> int:
    """Tokens of a prompt that model, checkpoint and options allow."""
    config = model.config.get_text_config()
    trained: int | None = getattr(config, "max_position_embeddings", None)
    if trained is not None and config.model_type in _OFFSET_FAMILIES:
        trained -= (config.pad_token_id or 0) + 1
    if options.max_model_len is not None and trained is not None and options.max_model_len > trained:
        raise ConfigurationError(f"max_model_len ({options.max_model_len}) is above the model's own limit of {trained} positions")
    limits = [limit for limit in (trained, options.max_model_len, pooling.max_tokens) if limit is not None]
    return min(limits, default=options.max_batch_tokens)


def _nothing() -> None:
    """There is no cache to free."""
