"""How much may wait at one engine core: its limits, over all clients and for each, and when to come again once they are reached."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from raycore.config import Limits
from raycore.core.sessions import Session
from raycore.engine import EMPTY, TokenArray
from raycore.errors import ErrorRecord, OverloadedError

_GROWTH = 1024
_WINDOW_S = 5.0
"""The measured rate forgets what is older than a few times this."""
_UNKNOWN_S = 1.0
"""The hint before anything has been measured."""
_SHORTEST_S, _LONGEST_S = 0.05, 60.0


class Rate:
    """Units a second over the last seconds in which something waited."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0
        self._last_s: float | None = None

    def begin(self, now_s: float) -> None:
        """Time before this does not count: nothing could have gone on."""
        self._last_s = now_s

    def note(self, amount: int, now_s: float) -> None:
        """So many units were done since the last time."""
        passed_s = 0.0 if self._last_s is None else max(0.0, now_s - self._last_s)
        self._last_s = now_s
        keep = math.exp(-passed_s / _WINDOW_S)
        self._amount = self._amount * keep + amount
        self._seconds = self._seconds * keep + passed_s

    def seconds_for(self, amount: int) -> float:
        """How long so many units will take, within bounds."""
        if not self._amount or not self._seconds:
            return _UNKNOWN_S
        return min(max(amount * self._seconds / self._amount, _SHORTEST_S), _LONGEST_S)


class WaitingRoom:
    """Counts the requests that have no token yet, whoever holds them, the tokens of their prompts, and the bytes of their tensors."""

    def __init__(self, limits: Limits) -> None:
        self.tokens = 0
        self.tensor_bytes = 0
        self._waiting: dict[int, tuple[Session, int, int]] = {}
        self._is_waiting: NDArray[np.bool_] = np.zeros(_GROWTH, np.bool_)
        """By handle, so that a step's batch is looked up at once."""
        self._last_handles: TokenArray = EMPTY
        self._limits = limits
        self._requests_rate = Rate()
        self._tokens_rate = Rate()

    @property
    def requests(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def refusal(self, session: Session, tokens: int, tensor_bytes: int = 0) -> ErrorRecord | None:
        """Why a request with such a prompt and such tensors cannot wait here, if it cannot.

        One that is larger than a limit is taken when nothing else waits.
        """
        limits = self._limits
        by_request, by_token = (self._requests_rate, self.requests), (self._tokens_rate, self.tokens)
        checks = (
            (self.requests, 1, limits.waiting_requests, by_request, "this engine has {} requests waiting"),
            (self.tokens, tokens, limits.waiting_tokens, by_token, "this engine has {} prompt tokens waiting"),
            (session.waiting, 1, limits.client_waiting_requests, by_request, "this client has {} requests waiting at this engine"),
            (session.waiting_tokens, tokens, limits.client_waiting_tokens, by_token, "this client has {} prompt tokens waiting here"),
            (self.tensor_bytes, tensor_bytes, limits.waiting_tensor_bytes, by_request, "this engine has {} bytes of tensors waiting"),
        )
        for waiting, more, limit, (rate, amount), text in checks:
            if limit is not None and waiting and more and waiting + more > limit:
                message = f"{text.format(waiting)}; {limit} may"
                return ErrorRecord(OverloadedError.__name__, message, retry_after_s=rate.seconds_for(amount))
        return None

    def enter(self, handle: int, session: Session, tokens: int, now_s: float, tensor_bytes: int = 0) -> None:
        """A request waits from now on."""
        if not self._waiting:
            self.begin(now_s)
        if handle >= len(self._is_waiting):
            self._is_waiting = np.concatenate((self._is_waiting, np.zeros(max(handle, _GROWTH), np.bool_)))
        self._is_waiting[handle] = True
        self._waiting[handle] = session, tokens, tensor_bytes
        self.tokens += tokens
        self.tensor_bytes += tensor_bytes
        session.waiting += 1
        session.waiting_tokens += tokens

    def leave(self, handle: int) -> int:
        """This request does not wait (any more), whatever the reason; the tokens of its prompt if it did."""
        entry = self._waiting.pop(handle, None)
        if entry is None:
            return 0
        session, tokens, tensor_bytes = entry
        self._is_waiting[handle] = False
        self.tokens -= tokens
        self.tensor_bytes -= tensor_bytes
        session.waiting -= 1
        session.waiting_tokens -= tokens
        return tokens

    def on_output(self, handles: TokenArray, finished: TokenArray, now_s: float) -> None:
        """These got tokens in a step, and those ended."""
        if not self._waiting:
            return
        if handles is not self._last_handles:
            self._last_handles = handles
            started = handles[self._is_waiting[handles]].tolist()
            if started:
                tokens = sum(map(self.leave, started))
                self._requests_rate.note(len(started), now_s)
                self._tokens_rate.note(tokens, now_s)
        for handle in finished.tolist():
            self.leave(handle)

    def begin(self, now_s: float) -> None:
        """What waits can go on from here: after a pause, or when the first request comes."""
        self._requests_rate.begin(now_s)
        self._tokens_rate.begin(now_s)

    def check_invariants(self, live: Iterable[Session]) -> None:
        """Raise AssertionError when the counts disagree; for tests."""
        entries = list(self._waiting.values())
        assert self.tokens == sum(tokens for _, tokens, _ in entries), "the room miscounts tokens"  # noqa: S101
        assert np.flatnonzero(self._is_waiting).tolist() == sorted(self._waiting), "the room's mask is wrong"  # noqa: S101
        for session in live:
            own = [tokens for owner, tokens, _ in entries if owner is session]
            assert (session.waiting, session.waiting_tokens) == (len(own), sum(own)), "a session's share is wrong"  # noqa: S101
            assert set(session.handle_of.values()) >= {h for h, (owner, _, _) in self._waiting.items() if owner is session}  # noqa: S101
