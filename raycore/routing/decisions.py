"""Why requests went where they went: the last decisions, kept as they were made and put into words when asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from raycore.ids import EngineId
from raycore.routing.router import Candidate

KEPT = 1024
"""Decisions that can still be explained."""


@dataclass(frozen=True)
class CandidateReason:
    """One engine that a policy looked at; the lowest score wins."""

    rank: int
    score: float
    work: float
    """Units of work on it, each the time of one token of prefill: waiting prompts, the next steps of what runs, want of cache, a pause."""
    relative_pace: float
    """How much slower than the fleet's mean it is."""
    prefill_tokens: int
    """Prompt tokens waiting there, all clients' together."""
    requests: int
    """Requests there, all clients' together."""
    kv_tokens: int
    """Cache tokens in use or wanted by what waits."""
    unacked_tokens: int
    """Prefill that this client had sent and no report included yet."""
    cached_tokens: int
    """Leading prompt tokens that it was taken to have in its cache."""


@dataclass(frozen=True)
class Decision:
    """Where a request went, by which policy, and what that had looked at."""

    request_id: str
    rank: int
    incarnation: str
    policy: str
    candidates: tuple[CandidateReason, ...]
    """Lowest score first; empty for a rank that the caller named and for policies that look at nothing."""

    def __str__(self) -> str:
        rows = "; ".join(
            f"rank {c.rank}: score {c.score:.0f} (work {c.work:.0f} x pace {c.relative_pace:.2f}; {c.prefill_tokens} prompt tokens "
            f"waiting, {c.requests} requests, {c.cached_tokens} tokens cached)"
            for c in self.candidates
        )
        return f"{self.request_id} went to rank {self.rank} by {self.policy!r}" + (f": {rows}" if rows else "")


@final
class DecisionLog:
    """The last decisions of one client, newest last."""

    __slots__ = ("_kept",)

    def __init__(self, size: int = KEPT) -> None:
        self._kept: deque[tuple[str, EngineId, str, Sequence[Candidate]]] = deque(maxlen=size)

    def add(self, request_id: str, engine: EngineId, policy: str, reasons: Sequence[Candidate]) -> None:
        """Keep a decision; nothing is copied."""
        self._kept.append((request_id, engine, policy, reasons))

    def explain(self, request_id: str) -> Decision | None:
        """The newest decision about a request; None when it is not among the kept."""
        for kept_id, engine, policy, reasons in reversed(self._kept):
            if kept_id == request_id:
                rows = sorted((_readable(row) for row in reasons), key=lambda row: (row.score, row.rank))
                return Decision(request_id, engine.rank, engine.incarnation, policy, tuple(rows))
        return None


def _readable(row: Candidate) -> CandidateReason:
    (work, pace, prefill, live, kv_tokens, unacked, engine), score, cached = row
    return CandidateReason(engine.rank, score, work, pace, prefill, live, kv_tokens, unacked, cached)
