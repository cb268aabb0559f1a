"""What one client has in flight over all engines, and the bound of it: a client, too, must not grow without end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from raycore.client.journal import RequestRecord
from raycore.errors import OverloadedError

_UNKNOWN_S = 1.0
_SHORTEST_S, _LONGEST_S = 0.05, 60.0


class InFlight:
    """Counts requests and their prompt tokens from admission to their end; None is no limit."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self._most_requests = requests
        self._most_tokens = tokens
        self._requests = 0
        self._tokens = 0
        self._ended = 0
        self._busy_since_s = 0.0

    def check(self, record: RequestRecord, answers: int, clock: Callable[[], float]) -> None:
        """OverloadedError when a request with so many answers would be too much. Whatever its size, a request may go alone."""
        if not self._requests:
            return
        tokens = record.prompt_tokens * answers
        if self._most_requests is not None and self._requests + answers > self._most_requests:
            text = f"this client has {self._requests} requests in flight; {self._most_requests} may be"
        elif self._most_tokens is not None and self._tokens + tokens > self._most_tokens:
            text = f"this client has requests with {self._tokens} prompt tokens in flight; {self._most_tokens} may be"
        else:
            return
        raise OverloadedError(text, request_id=record.request_id, retry_after_s=self._hint_s(clock()))

    def begin(self, record: RequestRecord, clock: Callable[[], float]) -> None:
        """A request was sent."""
        if not self._requests:
            self._busy_since_s, self._ended = clock(), 0
        self._requests += 1
        self._tokens += record.prompt_tokens

    def end(self, record: RequestRecord) -> None:
        """A request is over."""
        self._requests -= 1
        self._tokens -= record.prompt_tokens
        self._ended += 1

    def _hint_s(self, now_s: float) -> float:
        """How long what is in flight will take at the rate since the client became busy."""
        if not self._ended:
            return _UNKNOWN_S
        return min(max(self._requests * (now_s - self._busy_since_s) / self._ended, _SHORTEST_S), _LONGEST_S)

    def check_invariants(self, records: Iterable[RequestRecord]) -> None:
        """Raise AssertionError when the counts disagree with the journal; for tests."""
        tokens = [record.prompt_tokens for record in records]
        assert (self._requests, self._tokens) == (len(tokens), sum(tokens)), "what is in flight is miscounted"  # noqa: S101
