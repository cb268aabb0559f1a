"""The torch engine: a real causal language model behind the Engine Protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from raycore.engine import (
    EMPTY,
    MAKE_TRACE,
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
from raycore.engines.torch.batch import sampled_chunks
from raycore.engines.torch.blocks import BlockPool
from raycore.engines.torch.kv_cache import KVCache, choose_kv_tokens
from raycore.engines.torch.loading import Checkpoint, eos_ids, load_checkpoint
from raycore.engines.torch.options import TorchEngineOptions, check_options
from raycore.engines.torch.outcome import StepOutcome
from raycore.engines.torch.runner import ModelRunner, probe_layers
from raycore.engines.torch.sampler import Choice, sample
from raycore.engines.torch.scheduler import Chunk, Scheduler
from raycore.engines.torch.sequence import Sequence as TokenSequence
from raycore.engines.torch.stops import Stop, StopChecker
from raycore.engines.torch.trace import TorchTrace
from raycore.errors import ConfigurationError
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer

LOAD_BUDGET_S = 600.0
"""A large checkpoint from a slow disk."""
FIRST_STEP_BUDGET_S = 120.0
"""The first step initialises kernels and thread pools."""


@dataclass(slots=True)
class _Running:
    """What the engine keeps of a request besides its sequence."""

    sampling: SamplingParams
    stops: StopChecker
    is_first_output: bool = True


@final
class TorchEngine:
    """Continuous batching of one model on one device; made by `create`."""

    def __init__(self, info: EngineInfo, scheduler: Scheduler, runner: ModelRunner, tokenizer: Tokenizer | None) -> None:
        self._info = info
        self._scheduler = scheduler
        self._runner = runner
        self._tokenizer = tokenizer
        self._requests: dict[int, _Running] = {}
        self._ended_on_arrival: list[tuple[int, Stop]] = []
        """Replays whose delivered tokens hold their end already."""
        self._handles: TokenArray = EMPTY
        self._handle_list: list[int] = []
        self._steps = 0

    @classmethod
    def create(cls, options: TorchEngineOptions) -> TorchEngine:
        """Load model, tokenizer and cache; raises ConfigurationError that names what is wrong."""
        check_options(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return cls.of(load_checkpoint(options), options)

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: TorchEngineOptions) -> TorchEngine:
        """An engine with a cache of its own on a loaded checkpoint."""
        check_options(options)
        model, config = checkpoint.model, checkpoint.model.config.get_text_config()
        layers = probe_layers(model)
        model_limit = _model_limit(options, getattr(config, "max_position_embeddings", None))
        tokens = choose_kv_tokens(options, layers, dtype=model.dtype, device=model.device, model_limit=model_limit)
        size = options.block_size
        blocks = tokens // size
        cache = KVCache(layers, blocks=blocks + 1, block_size=size, dtype=model.dtype, device=model.device)
        info = EngineInfo(
            engine="torch",
            model=checkpoint.name,
            vocab_size=int(config.vocab_size),
            max_model_len=min(model_limit, tokens),
            kv_tokens=tokens,
            tasks=("generate",),
            eos_token_ids=eos_ids(model, checkpoint.tokenizer),
        )
        pool = BlockPool(blocks, caching=options.enable_prefix_caching)
        scheduler = Scheduler(pool, block_size=size, max_batch_tokens=options.max_batch_tokens, max_sequences=options.max_sequences)
        return cls(info, scheduler, ModelRunner(model, cache), checkpoint.tokenizer)

    @property
    def info(self) -> EngineInfo:
        """Facts that do not change while the engine lives."""
        return self._info

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raise RequestRefused when it can never be served."""
        problem = self._problem(request)
        if problem is not None:
            raise RequestRefused(problem)
        prompt = request.prompt_token_ids.tolist()
        delivered = request.delivered.tolist()
        stops = StopChecker(
            request.sampling,
            eos_token_ids=self._info.eos_token_ids,
            max_outputs=min(request.sampling.max_tokens, self._info.max_model_len - len(prompt)),
            tokenizer=self._tokenizer,
        )
        for token in delivered:
            stop = stops.push(token)
            if stop is not None:
                self._ended_on_arrival.append((request.handle, stop))
                return
        self._requests[request.handle] = _Running(request.sampling, stops)
        self._scheduler.add(TokenSequence(request.handle, prompt + delivered, len(prompt), request.priority))

    def abort(self, handles: Sequence[int]) -> None:
        """Forget these requests and free their blocks."""
        for handle in handles:
            if self._requests.pop(handle, None) is not None:
                self._scheduler.remove(handle)
        if self._ended_on_arrival:
            gone = set(handles)
            self._ended_on_arrival = [row for row in self._ended_on_arrival if row[0] not in gone]

    def step(self) -> StepOutput:
        """One forward pass over what the scheduler picked, and a token for each sequence whose known tokens are all in."""
        chunks = self._scheduler.schedule()
        outcome = StepOutcome()
        if chunks:
            logits = self._runner.forward(chunks)
            self._scheduler.computed(chunks)
            sampled = sampled_chunks(chunks)
            if sampled:
                self._advance(sampled, logits, outcome)
        for handle, stop in self._ended_on_arrival:
            outcome.end(handle, stop.finish, Detail(stop_reason=stop.reason) if stop.reason is not None else None)
        self._ended_on_arrival.clear()
        self._steps += 1
        return outcome.columns(self._handle_column(outcome.handles))

    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._requests or self._ended_on_arrival)

    def idle_step(self) -> None:
        """One step with a dummy batch."""
        self._runner.idle()

    def load(self) -> EngineLoad:
        """The load now."""
        s = self._scheduler
        return EngineLoad(s.running, s.waiting, s.kv_tokens_used, s.prefill_tokens_waiting)

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        """The operations of the table that this engine implements."""
        return {"reset_prefix_cache": self.reset_prefix_cache, MAKE_TRACE: TorchTrace}

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        """Facts about weights, memory and cache."""
        return {
            "weight_checksum": self._runner.weight_checksum,
            "memory_stats": self.memory_stats,
            "kv_cache_stats": self.kv_cache_stats,
        }

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all computed prefixes; False, and nothing is changed, while running requests hold some.

        With `reset_running_requests` these are preempted: they compute their tokens again. There is no connector to reset.
        """
        del reset_connector
        if self._scheduler.running:
            if not reset_running_requests:
                return False
            self._scheduler.preempt_all()
        self._scheduler.pool.reset()
        return True

    def memory_stats(self) -> dict[str, int]:
        """Bytes of weights and KV cache, and what torch has allocated on the GPU."""
        model = self._runner.model
        stats = {"weights_bytes": int(model.get_memory_footprint()), "kv_cache_bytes": self._runner.cache.total_bytes}
        if model.device.type == "cuda":
            stats["device_allocated_bytes"] = torch.cuda.memory_allocated(model.device)
        return stats

    def kv_cache_stats(self) -> dict[str, int]:
        """Blocks by state and counters since the start."""
        pool, stats = self._scheduler.pool, self._scheduler.stats
        return {
            "blocks": pool.capacity,
            "blocks_held": pool.held,
            "prefilled_tokens": stats.prefilled_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "preemptions": stats.preemptions,
            "steps": self._steps,
        }

    def budget_s(self, activity: Activity) -> float | None:
        """Loading and the first step may take long; otherwise the pool's default holds."""
        if activity is Activity.LOAD:
            return LOAD_BUDGET_S
        return FIRST_STEP_BUDGET_S if activity is Activity.STEP and not self._steps else None

    def close(self) -> None:
        """Forget every request and give the tensors back."""
        for handle in list(self._requests):
            self._scheduler.remove(handle)
        self._requests.clear()
        self._ended_on_arrival.clear()
        self._runner.close()

    def check_invariants(self) -> None:
        """Assert that requests, sequences and blocks agree."""
        assert len(self._requests) == len(self._scheduler)  # noqa: S101
        assert all(handle in self._scheduler for handle in self._requests)  # noqa: S101
        self._scheduler.check_invariants()

    def _problem(self, request: EngineRequest) -> str | None:
        """Why this request can never be served, or None."""
        prompt, delivered, sampling = request.prompt_token_ids, request.delivered, request.sampling
        longest = self._info.max_model_len - 1
        checks = (
            (not len(prompt), "the prompt is empty"),
            (len(prompt) > longest, f"the prompt has {len(prompt)} tokens; at most {longest} leave room for one of output"),
            self._outside(prompt, "token id"),
            self._outside(delivered, "delivered token id"),
            self._outside(sampling.stop_token_ids, "stop token id"),
            (
                bool(sampling.stop) and self._tokenizer is None,
                f"stop strings need a tokenizer, and model {self._info.model!r} has none; use stop_token_ids",
            ),
            (sampling.temperature > 0 and sampling.seed is None, "a sampled request needs a seed"),
            (request.handle in self._requests, f"handle {request.handle} is in use"),
        )
        return next((text for is_wrong, text in checks if is_wrong), None)

    def _outside(self, ids: TokenArray | Sequence[int], what: str) -> tuple[bool, str]:
        highest = int(np.max(ids)) if len(ids) else -1
        return highest >= self._info.vocab_size, f"{what} {highest} is outside the vocabulary of {self._info.vocab_size}"

    def _advance(self, chunks: Sequence[Chunk], logits: torch.Tensor, outcome: StepOutcome) -> None:
        """Choose and publish a token for each of these sequences, and let go of those that end."""
        rows = [(chunk.sequence, self._requests[chunk.sequence.handle]) for chunk in chunks]
        choices = [Choice(running.sampling, sequence.outputs, running.stops.banned) for sequence, running in rows]
        tokens = sample(logits, choices)
        for (sequence, running), token in zip(rows, tokens, strict=True):
            if token is None:
                self._fail(sequence, ArithmeticError("the model gave no finite logit for the next token"), outcome)
                continue
            try:
                stop = running.stops.push(token)
            except Exception as error:  # noqa: BLE001 -- whatever a tokenizer raises for this text, the other sequences go on
                self._fail(sequence, error, outcome)
                continue
            sequence.tokens.append(token)
            outcome.token(sequence.handle, token)
            detail = self._detail(sequence, running, stop)
            if stop is not None:
                self._forget(sequence.handle)
                outcome.end(sequence.handle, stop.finish, detail)
            elif detail is not None:
                outcome.details.append((sequence.handle, detail))

    def _detail(self, sequence: TokenSequence, running: _Running, stop: Stop | None) -> Detail | None:
        cached = sequence.cached_tokens if running.is_first_output else 0
        running.is_first_output = False
        reason = stop.reason if stop is not None else None
        return Detail(stop_reason=reason, prompt_tokens_cached=cached) if cached or reason is not None else None

    def _fail(self, sequence: TokenSequence, error: Exception, outcome: StepOutcome) -> None:
        """End one sequence with an error; what it computed is not to be trusted, so nothing of it stays in the cache."""
        blocks = list(sequence.blocks)
        self._forget(sequence.handle, discard=True)
        self._runner.cache.clear([block for block in blocks if not self._scheduler.pool.is_held(block)])
        outcome.end(sequence.handle, FinishReason.ERROR, Detail(error_type=type(error).__name__, error_message=str(error)))

    def _forget(self, handle: int, *, discard: bool = False) -> None:
        del self._requests[handle]
        self._scheduler.remove(handle, discard=discard)

    def _handle_column(self, handles: list[int]) -> TokenArray:
        """The same array object while the batch is the same: the core then leaves the column out of its frame."""
        if handles != self._handle_list:
            self._handle_list = handles
            self._handles = np.array(handles, dtype=np.uint32)
        return self._handles


def _model_limit(options: TorchEngineOptions, trained: int | None) -> int:
    """Prompt plus output tokens that the model and the options allow."""
    if options.max_model_len is None:
        return trained or options.kv_tokens or options.max_batch_tokens
    if trained is not None and options.max_model_len > trained:
        raise ConfigurationError(f"max_model_len ({options.max_model_len}) is above the model's own limit of {trained} positions")
    return options.max_model_len
