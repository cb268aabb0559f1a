"""A simulated engine: who is in its batch, step by step, under the echo engine's rules, in constant time a step and token."""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from raycore.engine import EngineLoad
from raycore.traces import TraceRequest


@dataclass(frozen=True)
class StepModel:
    """What a step takes in seconds, and what an engine holds; the defaults are those of an 8B model on one large GPU."""

    base_s: float = 6e-3
    per_sequence_s: float = 20e-6
    per_kv_token_s: float = 0.05e-6
    per_prefill_token_s: float = 25e-6
    max_batch_tokens: int = 8192
    max_sequences: int = 256
    kv_tokens: int = 400_000
    cache_blocks: int = 0
    """Blocks of prompt whose keys and values are kept for later requests, least recently used out first; 0: no prefix cache."""
    block_tokens: int = 512


@dataclass(slots=True)
class SimRequest:
    """One request of a trace, and what became of it."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    router: int = 0
    engine: int = -1
    first_token_s: float = -1.0
    end_s: float = -1.0
    hit_tokens: int = 0
    left: int = 0
    """Prompt tokens that the engine has still to take in; after a preemption output tokens are among them."""
    joined_step: int = -1
    produced: int = 0
    """Tokens that it had when it joined the batch."""
    prefill: int = 0
    """What the router counts for it; 0 once it has begun."""

    @classmethod
    def of(cls, index: int, row: TraceRequest) -> SimRequest:
        """A trace's request, not sent yet."""
        return cls(index, row.arrival_s, row.prompt_tokens, row.output_tokens, row.blocks)


@dataclass(slots=True)
class StepResult:
    """What one step gives to clients."""

    firsts: list[SimRequest]
    ends: list[SimRequest]


@dataclass(slots=True)
class SimEngine:
    """First come, first served; the head of the queue may be taken in part; the newest is preempted when the cache is full."""

    model: StepModel
    slowness: float = 1.0
    step: int = 0
    kv_used: int = 0
    queued_tokens: int = 0
    waiting: deque[SimRequest] = field(default_factory=deque)
    batch: OrderedDict[int, SimRequest] = field(default_factory=OrderedDict)
    partial: SimRequest | None = None
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    preempted: int = 0
    busy_s: float = 0.0
    _ends: list[tuple[int, int, int]] = field(default_factory=list)
    joiners: list[SimRequest] = field(default_factory=list)
    prefilled: int = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.batch) or self.partial is not None or bool(self.waiting)

    def load(self) -> EngineLoad:
        """What it would report now."""
        running = len(self.batch) + (self.partial is not None)
        return EngineLoad(running, len(self.waiting), self.kv_used, self.queued_tokens)

    def add(self, request: SimRequest) -> None:
        """Queue a request; a prefix that the cache holds now need not be computed."""
        request.hit_tokens = self._cached_tokens(request)
        request.left = request.prompt_tokens - request.hit_tokens
        self.waiting.append(request)
        self.queued_tokens += request.left

    def begin_step(self) -> float:
        """Admit what fits; how long the step takes, in seconds."""
        model, batch = self.model, self.batch
        if self.kv_used + len(batch) > model.kv_tokens - (self.partial is not None):
            self._preempt()
        joiners = self._fill()
        for request in joiners:
            request.joined_step = self.step
            batch[request.index] = request
            self.kv_used += request.prompt_tokens + request.produced
            heapq.heappush(self._ends, (self.step + request.output_tokens - request.produced, request.joined_step, request.index))
        self.joiners = joiners
        sequences = len(batch)
        held = self.kv_used + sequences
        seconds = self.slowness * (
            model.base_s + model.per_sequence_s * sequences + model.per_kv_token_s * held + model.per_prefill_token_s * self.prefilled
        )
        self.busy_s += seconds
        return seconds

    def end_step(self) -> StepResult:
        """A token for each sequence of the batch; those that ended leave it."""
        batch = self.batch
        self.step += 1
        self.kv_used += len(batch)
        result = StepResult([r for r in self.joiners if r.first_token_s < 0], [])
        ends, step = self._ends, self.step
        while ends and ends[0][0] <= step:
            _, joined_step, index = heapq.heappop(ends)
            request = batch.get(index)
            if request is None or request.joined_step != joined_step:
                continue  # preempted since
            del batch[index]
            self.kv_used -= request.prompt_tokens + request.output_tokens
            result.ends.append(request)
        return result

    def _fill(self) -> list[SimRequest]:
        model = self.model
        budget = all_budget = model.max_batch_tokens - len(self.batch)
        joiners: list[SimRequest] = []
        partial = self.partial
        if partial is not None:
            taken = min(budget, partial.left)
            partial.left -= taken
            budget -= taken
            if partial.left:
                self.prefilled = taken
                self.queued_tokens -= taken
                return joiners
            joiners.append(partial)
            self.kv_used -= partial.prompt_tokens + partial.produced
            self.partial = None
        places = model.max_sequences - len(self.batch) - len(joiners)
        room = model.kv_tokens - self.kv_used - len(self.batch) - sum(r.prompt_tokens + r.produced + 1 for r in joiners)
        waiting = self.waiting
        while waiting and places and budget:
            request = waiting[0]
            held = request.prompt_tokens + request.produced
            if held + 1 > room:
                break
            waiting.popleft()
            if request.left > budget:
                request.left -= budget
                budget = 0
                self.partial = request
                self.kv_used += held
                self._keep(request)
                break
            budget -= request.left
            request.left = 0
            places, room = places - 1, room - held - 1
            joiners.append(request)
            self._keep(request)
        self.prefilled = all_budget - budget
        self.queued_tokens -= self.prefilled
        return joiners

    def _preempt(self) -> None:
        if self.partial is not None:
            request, self.partial = self.partial, None
            self.kv_used -= request.prompt_tokens + request.produced
            self._put_back(request)
        while self.batch and self.kv_used + len(self.batch) > self.model.kv_tokens:
            _, request = self.batch.popitem()
            request.produced += self.step - request.joined_step
            self.kv_used -= request.prompt_tokens + request.produced
            self._put_back(request)

    def _put_back(self, request: SimRequest) -> None:
        before = request.left
        request.left = request.prompt_tokens + request.produced - self._cached_tokens(request)
        request.joined_step = -1
        self.queued_tokens += request.left - before
        self.waiting.appendleft(request)
        self.preempted += 1

    # -- prefixes ---------------------------------------------------------------------------------------------------------

    def _cached_tokens(self, request: SimRequest) -> int:
        """Leading prompt tokens in the cache; the last token is always computed."""
        cache, count = self.cache, 0
        if not cache:
            return 0
        for block in request.blocks:
            if block not in cache:
                break
            cache.move_to_end(block)
            count += 1
        return min(count * self.model.block_tokens, request.prompt_tokens - 1)

    def _keep(self, request: SimRequest) -> None:
        limit = self.model.cache_blocks
        if not limit:
            return
        cache = self.cache
        for block in request.blocks:
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > limit:
            cache.popitem(last=False)
