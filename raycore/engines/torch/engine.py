"""The torch engine: a real causal language model behind the Engine Protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch

from raycore.embeddings import PROMPT_EMBEDS, problem_with
from raycore.engine import (
    CHECK_INVARIANTS,
    EMPTY,
    GENERATE,
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
from raycore.engines.torch.adapters import load_adapter
from raycore.engines.torch.batch import in_row_order, prompt_logit_chunks, sampled_chunks
from raycore.engines.torch.blocks import BlockPool
from raycore.engines.torch.controls import Controls
from raycore.engines.torch.expert_parallel import ExpertParallel
from raycore.engines.torch.expert_switch import ExpertSwitch
from raycore.engines.torch.kv_cache import KVCache, choose_kv_tokens
from raycore.engines.torch.loading import LOAD_BUDGET_S, Checkpoint, eos_ids, find_source, load_checkpoint, load_model, load_tokenizer_of
from raycore.engines.torch.logprobs import LogprobAsk, StepLogprobs
from raycore.engines.torch.lora import LoraRegistry
from raycore.engines.torch.lora_layers import LoraLayers
from raycore.engines.torch.options import TorchEngineOptions, check_options
from raycore.engines.torch.outcome import StepOutcome
from raycore.engines.torch.runner import ModelRunner, probe_layers
from raycore.engines.torch.running import RunningRequest
from raycore.engines.torch.sampler import sample
from raycore.engines.torch.scheduler import Chunk, Scheduler
from raycore.engines.torch.sequence import Sequence as TokenSequence
from raycore.engines.torch.sleep import Sleep
from raycore.engines.torch.stops import Stop, StopChecker
from raycore.engines.torch.trace import TorchTrace
from raycore.engines.torch.weight_copy import LentModel, TakenModel, is_lendable
from raycore.engines.torch.weights import Weights
from raycore.errors import ConfigurationError, LockstepError
from raycore.groups import GroupSet, ProcessGroup, Reconfiguration
from raycore.tokenizer import Tokenizer
from raycore.weight_copies import LentWeights

FIRST_STEP_BUDGET_S = 120.0
"""The first step initialises kernels and thread pools."""


NO_CHOICE = "no token can be chosen: the logits hold NaN or nothing finite, or the request's bans and biases leave no token"


@final
class TorchEngine:
    """Continuous batching of one model on one device; made by `create`."""

    def __init__(
        self,
        info: EngineInfo,
        scheduler: Scheduler,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        weights: Weights,
        options: TorchEngineOptions,
        experts: ExpertParallel | None = None,
    ) -> None:
        self._info = info
        self._experts = experts
        self._expert_switch = None if experts is None else ExpertSwitch(experts, runner.forget_graphs)
        self._scheduler = scheduler
        self._runner = runner
        self._tokenizer = tokenizer
        self._weights = weights
        self._adapters = LoraRegistry(
            options.max_loras,
            lambda path: load_adapter(path, weights.model, base=options.model, max_rank=options.max_lora_rank),
        )
        self._lora = LoraLayers(weights.model)
        self._sleep = Sleep(weights, self._drop_cache, runner.cache.allocate, runner.prepare_again)
        self._controls = Controls(
            weights,
            self._sleep,
            self._adapters,
            self._lora,
            tokenizer=tokenizer,
            rank=options.rank,
            has_work=lambda: bool(self._requests or self._ended_on_arrival),
            cache_bytes=lambda: runner.cache_bytes,
            experts=experts,
        )
        self._requests: dict[int, RunningRequest] = {}
        self._special: set[int] = set()
        """Handles whose tokens take more than the highest logit; the step looks at single rows only when there are any."""
        self._ended_on_arrival: list[tuple[int, Stop]] = []
        """Replays whose delivered tokens hold their end already."""
        self._handles: TokenArray = EMPTY
        self._handle_list: list[int] = []
        self._steps = 0

    @classmethod
    def create(cls, options: TorchEngineOptions, taken: TakenModel | None = None) -> TorchEngine:
        """Load model, tokenizer and cache; raises ConfigurationError that names what is wrong. `taken`: the model, where peers gave it."""
        check_options(options)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if taken is not None:
            experts = None if taken.experts is None else ExpertParallel.of_peers(options, taken.experts, taken.model)
            return cls.of(Checkpoint(options.model, taken.model, taken.tokenizer), options, experts)
        experts = ExpertParallel.load(options)
        if experts is None:
            return cls.of(load_checkpoint(options), options)
        checkpoint = Checkpoint(options.model, experts.model, load_tokenizer_of(find_source(options.model)))
        return cls.of(checkpoint, options, experts)

    @classmethod
    def of(cls, checkpoint: Checkpoint, options: TorchEngineOptions, experts: ExpertParallel | None = None) -> TorchEngine:
        """An engine with a cache of its own on a loaded checkpoint; `experts`: what spreads its experts over ranks."""
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
            gives_logprobs=True,
            embedding_size=int(model.get_input_embeddings().weight.shape[1]),  # pyright: ignore[reportIndexIssue] -- an embedding
            sync_interval=experts.sync_interval if experts is not None else 0,
            is_expert_parallel=experts is not None,
        )
        pool = BlockPool(blocks, caching=options.enable_prefix_caching)
        scheduler = Scheduler(pool, block_size=size, max_batch_tokens=options.max_batch_tokens, max_sequences=options.max_sequences)
        runner = ModelRunner(model, cache, lean=options.lean)
        if options.cuda_graphs and (experts is None or experts.may_record):
            runner.prepare(max_sequences=options.max_sequences, max_model_len=info.max_model_len)
        if experts is None:
            weights = Weights(model, lambda: load_model(find_source(options.model), options))
        else:
            weights = Weights(model, experts.reload)
            experts.on_changed = weights.measure
            experts.exchange.reset_load()
        return cls(info, scheduler, runner, checkpoint.tokenizer, weights, options, experts)

    @property
    def info(self) -> EngineInfo:
        """Facts that do not change while the engine lives."""
        return self._info

    @property
    def experts(self) -> ExpertParallel | None:
        """What spreads the model's experts over ranks, and how their placement changes; None where this engine holds the whole model."""
        return self._experts

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raise RequestRefused when it can never be served."""
        problem = self._problem(request)
        if problem is not None:
            raise RequestRefused(problem)
        embeds = self._runner.embeddings(request.tensors[PROMPT_EMBEDS]) if PROMPT_EMBEDS in request.tensors else None
        prompt = request.prompt_token_ids.tolist() if embeds is None else [0] * len(embeds)
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
        self._sleep.ensure_cache()
        sequence = TokenSequence(request.handle, prompt + delivered, len(prompt), request.priority)
        if embeds is not None:
            sequence.embeds, sequence.reads_cache, sequence.fills_cache = embeds, False, False
        adapter = None if request.lora is None else self._adapters.find(request.lora)
        if adapter is not None:
            self._adapters.acquire(adapter)
            sequence.namespace = adapter.namespace
        running = self._requests[request.handle] = RunningRequest(request.sampling, stops, sequence, adapter)
        if running.is_special:
            self._special.add(request.handle)
        self._scheduler.add(sequence)

    def abort(self, handles: Sequence[int]) -> None:
        """Forget these requests and free their blocks."""
        for handle in handles:
            if handle in self._requests:
                self._forget(handle)
        if self._ended_on_arrival:
            gone = set(handles)
            self._ended_on_arrival = [row for row in self._ended_on_arrival if row[0] not in gone]

    def step(self) -> StepOutput:
        """One forward pass over what the scheduler picked, and a token for each sequence whose known tokens are all in."""
        self._sleep.check_awake("a step")
        chunks = self._scheduler.schedule()
        outcome = StepOutcome()
        if chunks:
            logits = self._forward(chunks)
            self._scheduler.computed(chunks)
            sampled = sampled_chunks(chunks)
            if len(logits) > len(sampled):
                self._take_prompt_logprobs(chunks, logits[len(sampled) :])
            if sampled:
                self._advance(sampled, logits[: len(sampled)], outcome)
        elif self._experts is not None:
            self.idle_step()  # the other ranks are in this step too
        for handle, stop in self._ended_on_arrival:
            outcome.end(handle, stop.finish, Detail(stop_reason=stop.reason) if stop.reason is not None else None)
        self._ended_on_arrival.clear()
        self._steps += 1
        output = outcome.columns(self._handle_column(outcome.handles))
        output.prefilled = sum(chunk.length for chunk in chunks) - len(outcome.handles)
        return output

    def has_work(self) -> bool:
        """Whether anything waits or runs, or experts are to move with the next steps."""
        return bool(self._requests or self._ended_on_arrival) or (self._experts is not None and self._experts.has_work)

    def idle_step(self) -> None:
        """One step with a dummy batch."""
        self._sleep.check_awake("a dummy step")
        self._sleep.ensure_cache()
        self._lora.end()
        if self._experts is not None:
            self._experts.begin_step(is_idle=True)
        self._runner.idle()

    def set_group(self, group: ProcessGroup | None) -> None:
        """The process group of coming steps (expert parallelism)."""
        assert self._experts is not None  # noqa: S101 -- only an engine with a sync_interval is told
        self._experts.exchange.set_group(group)

    def prepare(self, reconfiguration: Reconfiguration, groups: GroupSet) -> None:
        """See `ElasticEngine` and `ExpertSwitch`: this and the next four take the experts along in a switch of groups."""
        self._switching().prepare(reconfiguration, groups)

    def switch(self) -> None:
        """Go over to what was prepared."""
        self._switching().switch()

    def switch_back(self) -> None:
        """The old placement and group again."""
        self._switching().switch_back()

    def release(self) -> None:
        """Let go of the old."""
        self._switching().release()

    def drop(self) -> None:
        """Let go of what was prepared."""
        self._switching().drop()

    def _switching(self) -> ExpertSwitch:
        assert self._expert_switch is not None  # noqa: S101 -- only an engine with a sync_interval is asked
        return self._expert_switch

    def lend_weights(self) -> LentWeights | None:
        """See `WeightGiver`: all weights and buffers but experts that are spread over the ranks."""
        model = self._weights.present()
        if not is_lendable(model):
            return None
        spread = self._experts.tensors if self._experts is not None else frozenset[str]()
        return LentModel(model, self._tokenizer, task=GENERATE, expert_tensors=spread)

    def load(self) -> EngineLoad:
        """The load now."""
        s = self._scheduler
        return EngineLoad(s.running, s.waiting, s.kv_tokens_used, s.prefill_tokens_waiting)

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        """The operations of the table that this engine implements."""
        own = {"reset_prefix_cache": self.reset_prefix_cache, MAKE_TRACE: TorchTrace, CHECK_INVARIANTS: self.check_invariants}
        return {**self._controls.utilities(), **own}

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        """Facts about weights, memory and cache."""
        return {
            "weight_checksum": self._runner.weight_checksum,
            "memory_stats": self._controls.memory_stats,
            "kv_cache_stats": self.kv_cache_stats,
            **(self._experts.rpc_methods() if self._experts is not None else {}),
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

    def kv_cache_stats(self) -> dict[str, int | float]:
        """Blocks by state and counters since the start.

        `prefix_query_tokens`: known tokens of the sequences that were admitted; `prefix_hit_tokens`: how many of them were found computed;
        `prefix_hit_rate`: their ratio. `prefilled_tokens`: those that were computed, again after a preemption included.
        """
        pool, stats = self._scheduler.pool, self._scheduler.stats
        return {
            "blocks": pool.capacity,
            "blocks_held": pool.held,
            "prefilled_tokens": stats.prefilled_tokens,
            "prefix_query_tokens": stats.prefix_query_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "prefix_hit_rate": stats.prefix_hit_tokens / stats.prefix_query_tokens if stats.prefix_query_tokens else 0.0,
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
        self.abort(list(self._requests))
        self._ended_on_arrival.clear()
        self._lora.release()
        self._runner.close()

    def check_invariants(self) -> None:
        """Assert that requests, sequences and blocks agree."""
        assert len(self._requests) == len(self._scheduler)  # noqa: S101
        assert all(handle in self._scheduler for handle in self._requests)  # noqa: S101
        assert self._special == {handle for handle, running in self._requests.items() if running.is_special}  # noqa: S101
        self._scheduler.check_invariants()
        users = Counter(running.adapter for running in self._requests.values())
        assert all(adapter.users == users[adapter] for adapter in self._adapters.loaded())  # noqa: S101

    def _problem(self, request: EngineRequest) -> str | None:
        """Why this request can never be served, or None."""
        prompt, delivered, sampling = request.prompt_token_ids, request.delivered, request.sampling
        longest = self._info.max_model_len - 1
        unknown = next((name for name in request.tensors if name != PROMPT_EMBEDS), None)
        if unknown is not None:
            return f"the tensor {unknown!r:.200} is not known; this engine takes {PROMPT_EMBEDS!r}"
        if PROMPT_EMBEDS in request.tensors:
            problem = problem_with(request.tensors[PROMPT_EMBEDS], sampling, self._info)
            if len(prompt) or problem is not None:
                return problem or f"a prompt of token ids beside {PROMPT_EMBEDS}"
        checks = (
            (not len(prompt) and PROMPT_EMBEDS not in request.tensors, "the prompt is empty"),
            (len(prompt) > longest, f"the prompt has {len(prompt)} tokens; at most {longest} leave room for one of output"),
            self._outside(prompt, "token id"),
            self._outside(delivered, "delivered token id"),
            self._outside(sampling.stop_token_ids, "stop token id"),
            self._outside(list(dict(sampling.logit_bias)), "logit_bias: token id"),
            (
                bool(sampling.stop) and self._tokenizer is None,
                f"stop strings need a tokenizer, and model {self._info.model!r} has none; use stop_token_ids",
            ),
            (sampling.temperature > 0 and sampling.seed is None, "a sampled request needs a seed"),
            (request.lora is not None and self._adapters.find(request.lora) is None, self._adapters.missing(request.lora)),
            (request.handle in self._requests, f"handle {request.handle} is in use"),
        )
        return next((text for is_wrong, text in checks if is_wrong), None)

    def _outside(self, ids: TokenArray | Sequence[int], what: str) -> tuple[bool, str]:
        highest = int(np.max(ids)) if len(ids) else -1
        return highest >= self._info.vocab_size, f"{what} {highest} is outside the vocabulary of {self._info.vocab_size}"

    def _advance(self, chunks: Sequence[Chunk], logits: torch.Tensor, outcome: StepOutcome) -> None:
        """Choose and publish a token for each of these sequences, and let go of those that end."""
        rows = [(chunk.sequence, self._requests[chunk.sequence.handle]) for chunk in chunks]
        special = [(at, *rows[at]) for at in range(len(rows)) if rows[at][0].handle in self._special] if self._special else []
        asks = [LogprobAsk(at, s.handle, r.sampling.logprobs) for at, s, r in special if r.sampling.logprobs is not None]
        logprobs = StepLogprobs(logits, asks) if asks else None
        tokens = sample(logits, {at: running.choice(sequence.outputs) for at, sequence, running in special})
        for (sequence, running), token in zip(rows, tokens, strict=True):
            if token is None:
                self._fail(sequence, ArithmeticError(NO_CHOICE), outcome)
                continue
            try:
                stop = running.stops.push(token)
            except Exception as error:  # noqa: BLE001 -- whatever a tokenizer raises for this text, the other sequences go on
                self._fail(sequence, error, outcome)
                continue
            sequence.tokens.append(token)
            outcome.token(sequence.handle, token)
            if running.edits is not None:
                running.edits.output.push(token)
            if running.prompt_logprobs is not None:
                self._publish_prompt_logprobs(sequence, running, outcome)
            detail = self._detail(sequence, running, stop)
            if stop is not None:
                self._forget(sequence.handle)
                outcome.end(sequence.handle, stop.finish, detail)
            elif detail is not None:
                outcome.details.append((sequence.handle, detail))
        if logprobs is not None:
            published = logprobs.rows(outcome.tokens_by_handle())
            outcome.logprobs += [] if published is None else [published]

    def _forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """The step's logits. LockstepError when a peer is lost in it: then the sequences are as they were."""
        as_recorded = not self._begin_lora(chunks)
        if self._experts is None:
            return self._runner.forward(chunks, as_recorded=as_recorded)
        try:
            self._experts.begin_step(is_idle=False)
            return self._runner.forward(chunks, as_recorded=as_recorded)
        except LockstepError:
            self._runner.forget_window()  # it may hold this step's tokens, which come again
            raise

    def _take_prompt_logprobs(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> None:
        """Keep what these logits [Q, vocabulary] say of prompt tokens until the first output."""
        at = 0
        for chunk in prompt_logit_chunks(chunks):
            sequence, count = chunk.sequence, chunk.prompt_logits
            collected = self._requests[sequence.handle].prompt_logprobs
            assert collected is not None  # noqa: S101
            following = sequence.tokens[chunk.start + 1 : chunk.start + 1 + count]
            collected.take(logits[at : at + count], sequence.handle, chunk.start, following)
            at += count

    def _publish_prompt_logprobs(self, sequence: TokenSequence, running: RunningRequest, outcome: StepOutcome) -> None:
        rows = running.prompt_logprobs.rows() if running.prompt_logprobs is not None else None
        outcome.logprobs += [] if rows is None else [rows]
        running.prompt_logprobs = None
        sequence.wants_prompt_logprobs, sequence.reads_cache = False, True

    def _detail(self, sequence: TokenSequence, running: RunningRequest, stop: Stop | None) -> Detail | None:
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

    def _begin_lora(self, chunks: Sequence[Chunk]) -> bool:
        """Tell the layers whose rows the next forward pass has; whether any adapter is among them."""
        if not self._adapters.ids():
            return False
        rows = in_row_order(chunks)
        return self._lora.begin([(self._requests[c.sequence.handle].adapter, c.length, c.is_last, c.prompt_logits) for c in rows])

    def _drop_cache(self) -> None:
        """Free the KV cache; what runs computes its tokens again once it is back."""
        self._scheduler.preempt_all()
        self._scheduler.pool.reset()
        self._runner.release_cache()
        self._lora.release()

    def _forget(self, handle: int, *, discard: bool = False) -> None:
        adapter = self._requests.pop(handle).adapter
        if adapter is not None:
            self._adapters.release(adapter)
        self._special.discard(handle)
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
