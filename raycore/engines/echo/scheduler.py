"""Who is in the echo engine's batch: queue, batch, and cache bookkeeping, as a real engine's scheduler does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import final

import msgspec

from raycore.engine import Detail, EngineLoad, EngineRequest, FinishReason, StepOutput
from raycore.engines.echo.batch import Joiners, RunningBatch
from raycore.engines.echo.ending import Ending, echoed
from raycore.engines.echo.options import EchoOptions
from raycore.engines.echo.waiting import WaitingQueue, tokens_to_prefill

BY_LENGTH = bytes([FinishReason.LENGTH])


@dataclasses.dataclass(slots=True)
class _PartialPrefill:
    """The one request whose prompt is being taken in pieces; the cache for all of it is reserved."""

    request: EngineRequest
    left: int


@final
class EchoScheduler:
    """First come, first served within a priority; the newest are preempted when the cache is full, and wait at the front."""

    def __init__(self, options: EchoOptions) -> None:
        self.kv_used = 0
        self.preempted = 0
        self._options = options
        self._waiting = WaitingQueue()
        self._batch = RunningBatch()
        self._running: dict[int, EngineRequest] = {}
        self._partial: _PartialPrefill | None = None
        self._endings: dict[int, Ending] = {}
        """Of those requests that may end otherwise than by `max_tokens`, from `add` to the end."""

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting) + (self._partial is not None)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._running) or self._partial is not None or len(self._waiting) > 0

    @property
    def batch_size(self) -> int:
        """Sequences that get a token in a step."""
        return len(self._batch)

    def load(self) -> EngineLoad:
        """The load now."""
        partial = self._partial
        if partial is None:
            return EngineLoad(len(self._batch), len(self._waiting), self.kv_used, self._waiting.tokens)
        return EngineLoad(len(self._batch) + 1, len(self._waiting), self.kv_used, self._waiting.tokens + partial.left)

    def add(self, request: EngineRequest, ending: Ending | None) -> None:
        """Queue a request; `ending` None: it ends by its length."""
        if ending is not None:
            self._endings[request.handle] = ending
        self._waiting.append(request)

    def remove(self, wanted: set[int]) -> int:
        """Forget these requests; how many of them there were."""
        found = self._waiting.remove(wanted)
        if self._partial is not None and self._partial.request.handle in wanted:
            found.add(self._partial.request.handle)
            self._take_partial()
        running = [handle for handle in wanted if handle in self._running]
        if running:
            self.kv_used -= self._batch.take(running).tokens_held
            for handle in running:
                del self._running[handle]
            found.update(running)
        for handle in found:
            self._endings.pop(handle, None)
        return len(found)

    def admit(self) -> int:
        """Make room for the step's tokens, then fill the batch; returns how many prompt tokens the step takes in."""
        if self.kv_used + len(self._batch) > self._options.kv_tokens - (self._partial is not None):
            self._preempt()
        return self._fill() if self._partial is not None or self._waiting else 0

    def advance(self) -> StepOutput:
        """One token for each sequence of the batch; those that ended leave it."""
        batch = self._batch
        handles = batch.handles
        if not len(handles):
            return StepOutput()
        output = StepOutput(handles, batch.advance())
        self.kv_used += len(handles)
        ended = batch.take_ended()
        if ended is not None:
            self.kv_used -= ended.tokens_held
            output.finished, output.reasons = ended.handles, ended.reasons
            output.details = self._forget(ended.handles.tolist())
        return output

    def preempt_all(self) -> None:
        """Have everything computed anew."""
        if self._partial is not None:
            self._put_back(self._take_partial())
        self._evict(lambda _kept, _held: True)

    def _fill(self) -> int:
        options, waiting = self._options, self._waiting
        budget = all_budget = options.max_batch_tokens - len(self._batch)
        admitted: list[EngineRequest] = []
        partial = self._partial
        if partial is not None:
            taken = min(budget, partial.left)
            partial.left -= taken
            budget -= taken
            if partial.left:
                return taken
            admitted.append(self._take_partial())
        free = options.max_sequences - len(self._batch) - len(admitted)
        # One more token for each sequence that gets one in this step.
        room = options.kv_tokens - self.kv_used - len(self._batch) - sum(map(tokens_to_prefill, admitted)) - len(admitted)
        if len(waiting) <= free and waiting.tokens <= budget and waiting.tokens + len(waiting) <= room:
            budget -= waiting.tokens
            admitted += waiting.pop_all()
        else:
            budget = self._admit_some(admitted, free, budget, room)
        if admitted:
            self._join(admitted)
        return all_budget - budget

    def _admit_some(self, admitted: list[EngineRequest], free: int, budget: int, room: int) -> int:
        """Admit in the queue's order until a place, the cache or the step's budget is used up; returns the budget that is left."""
        waiting = self._waiting
        while waiting and free and budget:
            need = tokens_to_prefill(waiting.head)
            if need + 1 > room:
                break
            request = waiting.pop()
            if need > budget:
                self._partial = _PartialPrefill(request, need - budget)
                self.kv_used += need
                return 0
            free, budget, room = free - 1, budget - need, room - need - 1
            admitted.append(request)
        return budget

    def _join(self, admitted: list[EngineRequest]) -> None:
        """Put requests into the batch, each with its ending. Lists, since a numpy call for each request would cost more than all else."""
        handles: list[int] = [request.handle for request in admitted]
        prompts = [request.prompt_token_ids for request in admitted]
        positions = [len(request.delivered) for request in admitted]
        counts = [request.sampling.max_tokens for request in admitted]
        reasons = BY_LENGTH * len(admitted)
        longest = self._options.longest
        if max(map(len, prompts)) + max(counts) > longest:
            counts = [min(count, longest - len(prompt)) for count, prompt in zip(counts, prompts, strict=True)]
        if self._endings:
            by_length = Ending(0, FinishReason.LENGTH)
            endings = [self._endings.get(handle, by_length) for handle in handles]
            counts = [ending.length or count for ending, count in zip(endings, counts, strict=True)]
            reasons = bytes(ending.reason for ending in endings)
        self._running.update(zip(handles, admitted, strict=True))
        self.kv_used += sum(map(len, prompts)) + sum(positions)
        self._batch.join(Joiners(handles, prompts, positions, counts, reasons))

    def _preempt(self) -> None:
        """Put the newest back into the queue until each of the others can get its token."""
        if self._partial is not None:
            self._put_back(self._take_partial())
        self._evict(lambda kept, held: held + kept > self._options.kv_tokens)

    def _evict(self, is_too_much: Callable[[int, int], bool]) -> None:
        held = self._batch.tokens_held()
        keep, used = len(held), self.kv_used
        while keep and is_too_much(keep, used):
            keep -= 1
            used -= int(held[keep])
        leavers = self._batch.handles[keep:].tolist()
        if not leavers:
            return
        tokens = held[keep:].tolist()
        self.kv_used -= self._batch.take(leavers).tokens_held
        for handle, count in zip(reversed(leavers), reversed(tokens), strict=True):
            request = self._running.pop(handle)
            produced = echoed(request.prompt_token_ids, 0, count - len(request.prompt_token_ids))
            # What it has is computed again like a replay's, and published only once.
            self._put_back(msgspec.structs.replace(request, delivered=produced))

    def _take_partial(self) -> EngineRequest:
        partial, self._partial = self._partial, None
        assert partial is not None  # noqa: S101 -- our own callers look first
        self.kv_used -= tokens_to_prefill(partial.request)
        return partial.request

    def _put_back(self, request: EngineRequest) -> None:
        self._waiting.push_front(request)
        self.preempted += 1

    def _forget(self, handles: list[int]) -> list[tuple[int, Detail]]:
        for handle in handles:
            del self._running[handle]
        if not self._endings:
            return []
        return stop_details((handle, self._endings.pop(handle)) for handle in handles if handle in self._endings)


def stop_details(endings: Iterable[tuple[int, Ending]]) -> list[tuple[int, Detail]]:
    """The records of those that were ended by something that can be named."""
    return [(handle, Detail(stop_reason=ending.stop_reason)) for handle, ending in endings if ending.stop_reason is not None]
