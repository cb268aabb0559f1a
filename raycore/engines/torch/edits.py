"""What a request changes in its logits before a token is chosen: biases, penalties, bans. Vectorised over the rows that ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raycore.sampling import SamplingParams

Ids = NDArray[np.int64]
_FIRST_CAPACITY = 16


class OutputCounts:
    """The different tokens of an output and how often each is in it, as growing columns."""

    def __init__(self) -> None:
        self._size = 0
        self._ids: Ids = np.zeros(_FIRST_CAPACITY, np.int64)
        self._counts: Ids = np.zeros(_FIRST_CAPACITY, np.int64)
        self._place: dict[int, int] = {}

    @property
    def ids(self) -> Ids:
        """Different ids, in order of appearance."""
        return self._ids[: self._size]

    @property
    def counts(self) -> Ids:
        """How often each of `ids` came."""
        return self._counts[: self._size]

    def push(self, token: int) -> None:
        """Count an output token."""
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * place), np.resize(self._counts, 2 * place)
            self._ids[place], self._counts[place] = token, 0
            self._size += 1
        self._counts[place] += 1


class LogitEdits:
    """One request's biases and penalties, and the tokens that they depend on."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int]) -> None:
        """`prompt`: its token ids; empty where it came as embeddings."""
        bias = dict(params.logit_bias)
        self.bias_ids: Ids = np.array(list(bias), np.int64)
        self.bias_values: NDArray[np.float32] = np.array(list(bias.values()), np.float32)
        self.repetition = params.repetition_penalty
        self.presence, self.frequency = params.presence_penalty, params.frequency_penalty
        self.output = OutputCounts()
        self._prompt_ids: Ids = np.unique(np.array(prompt, np.int64)) if self.repetition != 1.0 else np.zeros(0, np.int64)

    @staticmethod
    def are_asked_by(params: SamplingParams) -> bool:
        """Whether these parameters edit logits at all."""
        return bool(params.logit_bias or params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)

    @property
    def seen_ids(self) -> Ids:
        """Ids of prompt and output; some twice."""
        return np.concatenate((self._prompt_ids, self.output.ids))

    @property
    def subtracted(self) -> NDArray[np.float32]:
        """What presence and frequency penalty take from each of the output's ids."""
        return (self.presence + self.frequency * self.output.counts).astype(np.float32)


@dataclass(slots=True, frozen=True)
class _Entries:
    """Single logits: `rows`, `ids` int64 and a value for each."""

    rows: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


def apply_edits(logits: torch.Tensor, edits: Sequence[tuple[int, LogitEdits]], banned: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Edit rows of logits [S, vocabulary] float32 in place: biases, repetition, presence and frequency, bans; as `generate` orders them."""
    biased = _entries(logits, ((row, e.bias_ids, e.bias_values) for row, e in edits if len(e.bias_ids)))
    if biased is not None:
        logits[biased.rows, biased.ids] += biased.values
    repeated = _entries(logits, ((row, ids := e.seen_ids, np.full(len(ids), e.repetition)) for row, e in edits if e.repetition != 1.0))
    if repeated is not None:
        # an id may come twice for a row: both times the same value is written
        before = logits[repeated.rows, repeated.ids]
        logits[repeated.rows, repeated.ids] = torch.where(before < 0, before * repeated.values, before / repeated.values)
    taken = _entries(logits, ((row, e.output.ids, e.subtracted) for row, e in edits if e.presence or e.frequency))
    if taken is not None:
        logits[taken.rows, taken.ids] -= taken.values
    out = _entries(logits, ((row, np.array(ids, np.int64), np.zeros(len(ids))) for row, ids in banned if ids))
    if out is not None:
        logits[out.rows, out.ids] = float("-inf")


def _entries(logits: torch.Tensor, parts: Iterable[tuple[int, Ids, NDArray[Any]]]) -> _Entries | None:
    """One column of entries for all rows, or None when there are none."""
    found = [part for part in parts if len(part[1])]
    if not found:
        return None
    rows = np.repeat([row for row, _, _ in found], [len(ids) for _, ids, _ in found])
    ids, values = (np.concatenate([part[at] for part in found]) for at in (1, 2))
    device = logits.device
    return _Entries(
        torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device), torch.from_numpy(values.astype(np.float32)).to(device)
    )
