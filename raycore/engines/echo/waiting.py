"""The queue of an echo engine: requests that have no place in the batch yet."""

from __future__ import annotations

import bisect
from collections import deque
from typing import final

from raycore.engine import EngineRequest


def tokens_to_prefill(request: EngineRequest) -> int:
    """Prompt and delivered tokens: what a real engine must compute before the next token."""
    return len(request.prompt_token_ids) + len(request.delivered)


def _priority(request: EngineRequest) -> int:
    return request.priority


@final
class WaitingQueue:
    """The lowest priority number first, and within one the oldest; `tokens` is what all of them have to prefill."""

    def __init__(self) -> None:
        self._queue: deque[EngineRequest] = deque()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def head(self) -> EngineRequest:
        """The next one."""
        return self._queue[0]

    def append(self, request: EngineRequest) -> None:
        """Behind those of its priority."""
        self.tokens += len(request.prompt_token_ids) + len(request.delivered)
        queue = self._queue
        if queue and request.priority < queue[-1].priority:
            bisect.insort_right(queue, request, key=_priority)
        else:
            queue.append(request)

    def push_front(self, request: EngineRequest) -> None:
        """Before those of its priority: it was preempted."""
        self.tokens += tokens_to_prefill(request)
        bisect.insort_left(self._queue, request, key=_priority)

    def pop(self) -> EngineRequest:
        """Take the head."""
        request = self._queue.popleft()
        self.tokens -= tokens_to_prefill(request)
        return request

    def pop_all(self) -> list[EngineRequest]:
        """Take everything."""
        requests = list(self._queue)
        self.clear()
        return requests

    def remove(self, handles: set[int]) -> set[int]:
        """Forget these; returns those that were here."""
        found = {request.handle for request in self._queue if request.handle in handles}
        if found:
            self._queue = deque(request for request in self._queue if request.handle not in found)
            self.tokens = sum(map(tokens_to_prefill, self._queue))
        return set(found)

    def clear(self) -> None:
        """Forget everything."""
        self._queue.clear()
        self.tokens = 0
