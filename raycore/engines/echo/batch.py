"""The running sequences of an echo engine as columns, so that a step costs a few numpy calls whatever the batch.

Every running sequence gets one token a step. So a sequence's end is a tick of the batch's clock, fixed when it joins, and a step looks
for ended sequences only when the clock reaches the earliest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from raycore.engine import EMPTY, TokenArray

NEVER = 1 << 62
ARENA_TOKENS = 1 << 18
"""Where the prompts lie in the beginning; it grows when the running ones fill half of it."""
CURSOR, START, LIMIT, ENDS_AT, TOTAL, REASON = range(6)
"""Rows of the columns: arena indices of the next token, the prompt and its end; the tick of the last token; all tokens then; the reason."""


NO_COLUMNS: NDArray[np.int64] = np.empty((6, 0), dtype=np.int64)
FEW = 4


class Joiners(NamedTuple):
    """Sequences that join, as columns; `positions`: output tokens that each has, `counts`: those at its end, `reasons`: one byte each."""

    handles: list[int]
    prompts: list[TokenArray]
    positions: list[int]
    counts: list[int]
    reasons: bytes


class Ended(NamedTuple):
    """Sequences that got their last token, and what they held."""

    handles: TokenArray
    reasons: bytes
    tokens_held: int


@final
class RunningBatch:
    """Sequences in the order in which they joined. `handles` is the same array object while nobody joins or leaves."""

    def __init__(self) -> None:
        self._arena: TokenArray = np.empty(ARENA_TOKENS, dtype=np.uint32)
        self._tail = 0
        self._tick = 0
        self._set(EMPTY, NO_COLUMNS)

    def __len__(self) -> int:
        return self._size

    def join(self, joiners: Joiners) -> None:
        """Append sequences; each gets its next token at the next `advance`."""
        if len(joiners.handles) <= FEW:
            handles, columns = self._few(joiners)
        else:
            handles, columns = self._many(joiners)
        if self._size:
            handles = np.concatenate((self.handles, handles))
            columns = np.concatenate((self._columns, columns), axis=1)
        self._set(handles, columns)

    def _few(self, joiners: Joiners) -> tuple[TokenArray, NDArray[np.int64]]:
        """The columns of a few sequences, made in Python: a dozen numpy calls cost more than they save."""
        rows: list[tuple[int, int, int, int, int, int]] = []
        at = self._make_room(sum(map(len, joiners.prompts)))
        tick = self._tick
        for prompt, position, count, reason in zip(joiners.prompts, joiners.positions, joiners.counts, joiners.reasons, strict=True):
            length = len(prompt)
            self._arena[at : at + length] = prompt
            rows.append((at + position % length, at, at + length, tick + count - position, length + count, reason))
            at += length
        return np.array(joiners.handles, dtype=np.uint32), np.array(rows, dtype=np.int64).T.copy()

    def _many(self, joiners: Joiners) -> tuple[TokenArray, NDArray[np.int64]]:
        lengths, positions, counts = np.array((list(map(len, joiners.prompts)), joiners.positions, joiners.counts), dtype=np.int64)
        limits = np.cumsum(lengths)
        added = int(limits[-1])
        begin = self._make_room(added)
        np.concatenate(joiners.prompts, out=self._arena[begin : begin + added])
        columns = np.empty((6, len(lengths)), dtype=np.int64)
        np.add(limits, begin, out=columns[LIMIT])
        np.subtract(columns[LIMIT], lengths, out=columns[START])
        np.add(columns[START], positions % lengths, out=columns[CURSOR])
        np.add(counts - positions, self._tick, out=columns[ENDS_AT])
        np.add(lengths, counts, out=columns[TOTAL])
        columns[REASON] = np.frombuffer(joiners.reasons, dtype=np.uint8)
        return np.array(joiners.handles, dtype=np.uint32), columns

    def advance(self) -> TokenArray:
        """The next token of each sequence, in the order of `handles`."""
        cursor = self._cursor
        tokens: TokenArray = self._arena[cursor]
        cursor += 1
        np.equal(cursor, self._limit, out=self._wraps)
        np.copyto(cursor, self._start, where=self._wraps)
        self._tick += 1
        return tokens

    def take_ended(self) -> Ended | None:
        """Drop the sequences whose last token was that of this tick; None, as nearly always, when there is none."""
        if self._tick < self._next_end:
            return None
        if self._size == 1:
            ended = Ended(self.handles, bytes((int(self._columns[REASON, 0]),)), int(self._columns[TOTAL, 0]))
            self._clear()
            return ended
        return self._drop(self._columns[ENDS_AT] == self._tick)

    def take(self, handles: Sequence[int]) -> Ended:
        """Drop these sequences before their end; unknown handles are ignored."""
        return self._drop(np.isin(self.handles, np.array(handles, dtype=np.uint32)))

    def tokens_held(self) -> NDArray[np.int64]:
        """Prompt and output tokens of each sequence."""
        return self._columns[TOTAL] - (self._columns[ENDS_AT] - self._tick)

    def _drop(self, leaves: NDArray[np.bool_]) -> Ended:
        gone = int(np.count_nonzero(leaves))
        if gone == self._size:
            ended = Ended(self.handles, self._columns[REASON].astype(np.uint8).tobytes(), int(self.tokens_held().sum()))
            self._clear()
            return ended
        ended = Ended(self.handles[leaves], self._columns[REASON][leaves].astype(np.uint8).tobytes(), int(self.tokens_held()[leaves].sum()))
        if gone:
            stays = ~leaves
            self._set(self.handles[stays], self._columns[:, stays])
        return ended

    def _clear(self) -> None:
        self._set(EMPTY, NO_COLUMNS)
        self._tail = 0

    def _set(self, handles: TokenArray, columns: NDArray[np.int64]) -> None:
        self.handles = handles
        self._columns = columns
        self._size = len(handles)
        self._cursor, self._start, self._limit = columns[CURSOR], columns[START], columns[LIMIT]
        if self._size == 1:
            self._next_end = int(columns[ENDS_AT, 0])
        else:
            self._next_end = int(columns[ENDS_AT].min()) if self._size else NEVER
        self._wraps = np.empty(self._size, dtype=np.bool_)

    def _make_room(self, tokens: int) -> int:
        """Where `tokens` more may be written; the prompts of those who left are squeezed out when the end is reached."""
        if self._tail + tokens > len(self._arena):
            self._squeeze(tokens)
        begin = self._tail
        self._tail += tokens
        return begin

    def _squeeze(self, tokens: int) -> None:
        starts, limits = self._start.copy(), self._limit.copy()
        live = int((limits - starts).sum())
        old = self._arena
        self._arena = np.empty(max(ARENA_TOKENS, 2 * (live + tokens)), dtype=np.uint32)
        pieces = [old[a:b] for a, b in zip(starts.tolist(), limits.tolist(), strict=True)]
        if pieces:
            np.concatenate(pieces, out=self._arena[:live])
        new_limits = np.cumsum(limits - starts)
        self._columns[CURSOR] += new_limits - limits
        self._columns[START] += new_limits - limits
        self._columns[LIMIT] = new_limits
        self._tail = live
