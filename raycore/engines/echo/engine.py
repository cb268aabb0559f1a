"""The echo engine: says each prompt over and over, and queues, fills and preempts as a real engine does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import msgspec
import numpy as np

from raycore.embeddings import PROMPT_EMBEDS
from raycore.engine import Activity, EngineInfo, EngineLoad, EngineRequest, RequestRefused, StepOutput
from raycore.engines.echo.ending import Ending, find_ending
from raycore.engines.echo.exchange import StepExchange
from raycore.engines.echo.faults import Faults
from raycore.engines.echo.options import EOS_TOKEN_ID, EchoOptions, check
from raycore.engines.echo.scheduler import EchoScheduler, stop_details
from raycore.groups import ProcessGroup
from raycore.sampling import check_vocabulary

SHORT_PROMPT = 32
"""Up to here Python's `max` over a list is faster than numpy's over the array (0.3 against 1.1 µs at 8 tokens)."""


@final
class EchoEngine:
    """Output token i is `prompt[i % len(prompt)]`, whatever the batch and however it is sampled.

    All probability is on that one token, which temperature, filters, penalties and biases leave as it is. What needs logits (log
    probabilities) or a model (embeddings) is refused. `clock` and `sleep` are used only when steps are to take time.
    """

    def __init__(
        self,
        options: EchoOptions | None = None,
        *,
        model: str = "echo",
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        options = options or EchoOptions()
        check(options)
        self._options = options
        self._clock, self._sleep = clock, sleep
        self._is_timed = bool(options.base_s or options.per_sequence_s or options.per_kv_token_s or options.per_prefill_token_s)
        self._info = EngineInfo("echo", model, options.vocab_size, options.longest, options.kv_tokens, ("generate",), (EOS_TOKEN_ID,))
        if options.lockstep:
            self._info = msgspec.structs.replace(self._info, sync_interval=options.sync_interval)
        self._exchange = StepExchange()
        self._longest = options.longest
        self._scheduler = EchoScheduler(options)
        self._done_on_arrival: list[tuple[int, Ending]] = []
        self._faults = Faults(sleep)
        self._counts = dict.fromkeys(("steps", "idle_steps", "tokens", "prefill_tokens", "finished", "aborted"), 0)

    @property
    def info(self) -> EngineInfo:
        """Facts that do not change while the engine lives."""
        return self._info

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raise RequestRefused for an empty or too long prompt and for ids outside the vocabulary."""
        prompt = request.prompt_token_ids
        length = len(prompt)
        if request.tensors and PROMPT_EMBEDS in request.tensors:
            raise RequestRefused(f"{PROMPT_EMBEDS}: the echo engine takes token ids only")
        if not length:
            raise RequestRefused("the prompt is empty")
        if length >= self._longest:
            raise RequestRefused(f"the prompt has {length} tokens; at most {self._longest - 1} leave room for one of output")
        largest = max(prompt.tolist()) if length <= SHORT_PROMPT else int(prompt.max())
        if largest >= self._info.vocab_size:
            raise RequestRefused(f"token id {largest} is outside the vocabulary of {self._info.vocab_size}")
        sampling = request.sampling
        if sampling.logprobs is not None or sampling.prompt_logprobs is not None:
            name = "prompt_logprobs" if sampling.logprobs is None else "logprobs"
            raise RequestRefused(f"{name}: the echo engine has no log probabilities")
        if sampling.logit_bias:
            check_vocabulary(sampling, self._info.vocab_size)
        ending: Ending | None = None
        if sampling.stop or sampling.stop_token_ids or largest >= EOS_TOKEN_ID or len(request.delivered):
            ending = find_ending(prompt, sampling, self._longest)
            if ending.length <= len(request.delivered):
                self._done_on_arrival.append((request.handle, ending))
                return
        self._scheduler.add(request, ending)

    def abort(self, handles: Sequence[int]) -> None:
        """Forget these requests."""
        wanted = set(handles)
        found = self._scheduler.remove(wanted)
        if self._done_on_arrival:
            stay = [row for row in self._done_on_arrival if row[0] not in wanted]
            found += len(self._done_on_arrival) - len(stay)
            self._done_on_arrival = stay
        self._counts["aborted"] += found

    def step(self) -> StepOutput:
        """Admit what fits, give one token to each sequence whose prompt is in, and let go of those that ended."""
        started_s = self._clock() if self._is_timed else 0.0
        if self._faults.is_armed:
            self._faults.strike()
        # before anything changes: a step whose collective fails must leave the sequences as they were
        self._exchange.meet()
        scheduler = self._scheduler
        prefilled = scheduler.admit()
        if self._is_timed:
            self._take_time(started_s, prefilled)
        output = scheduler.advance()
        if self._done_on_arrival:
            self._publish_done_on_arrival(output)
        output.prefilled = prefilled
        counts = self._counts
        counts["steps"] += 1
        counts["tokens"] += len(output.tokens)
        counts["prefill_tokens"] += prefilled
        counts["finished"] += len(output.finished)
        return output

    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return self._scheduler.has_work or bool(self._done_on_arrival)

    def idle_step(self) -> None:
        """A step without sequences."""
        self._exchange.meet()
        self._counts["idle_steps"] += 1
        if self._options.base_s:
            self._sleep(self._options.base_s)

    def set_group(self, group: ProcessGroup | None) -> None:
        """The group of coming steps (lockstep)."""
        self._exchange = StepExchange(group)

    def load(self) -> EngineLoad:
        """The load now."""
        return self._scheduler.load()

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        """The operations that mean something without a model."""
        return {"reset_prefix_cache": self._reset_prefix_cache}

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        """Faults for tests, and `stats`."""
        return {**self._faults.methods(), "stats": self.stats}

    def stats(self) -> dict[str, int]:
        """Counters since the start, and the load."""
        now = self.load()
        return {
            **self._counts,
            "preempted": self._scheduler.preempted,
            "running": now.running,
            "waiting": now.waiting,
            "kv_tokens_used": now.kv_tokens_used,
        }

    def budget_s(self, activity: Activity) -> float | None:
        """A stalled step may have declared its length."""
        return self._faults.budget_s() if activity is Activity.STEP else None

    def close(self) -> None:
        """Forget everything."""
        self._scheduler = EchoScheduler(self._options)
        self._done_on_arrival = []

    def _publish_done_on_arrival(self, output: StepOutput) -> None:
        """Replays that had all their tokens already end without another one."""
        done, self._done_on_arrival = self._done_on_arrival, []
        output.finished = np.concatenate((output.finished, np.array([handle for handle, _ in done], dtype=np.uint32)))
        output.reasons += bytes(ending.reason for _, ending in done)
        output.details = [*output.details, *stop_details(done)]

    def _take_time(self, started_s: float, prefilled: int) -> None:
        options, scheduler = self._options, self._scheduler
        modelled_s = (
            options.base_s
            + options.per_sequence_s * scheduler.batch_size
            + options.per_kv_token_s * (scheduler.kv_used + scheduler.batch_size)
            + options.per_prefill_token_s * prefilled
        )
        left_s = started_s + modelled_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)

    def _reset_prefix_cache(self, *, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """There is no prefix cache to reset; with `reset_running_requests` everything that runs is computed anew, as in a real engine."""
        del reset_connector
        if reset_running_requests:
            self._scheduler.preempt_all()
        return True
