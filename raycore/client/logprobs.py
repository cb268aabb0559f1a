"""Log probabilities on their way to the caller: from the columns of a step to one record a token."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from raycore.messages import LogprobColumns


class TokenLogprob(msgspec.Struct, frozen=True, gc=False):
    """One token's natural log probability under the model's own distribution, before penalties, biases, temperature and filters.

    `rank`: 1 for the likeliest token of the vocabulary. `top_ids` and `top_logprobs`: the likeliest tokens, best first, as many as asked.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


class LogprobJournal:
    """What was told of one request's tokens; kept over replays, which repeat nothing.

    `of_tokens` has an entry for each output token that was delivered; None: not asked for.
    """

    __slots__ = ("_is_prompt_due", "_of_prompt", "of_tokens")

    def __init__(self, *, of_tokens: bool, of_prompt: bool) -> None:
        self.of_tokens: list[TokenLogprob] | None = [] if of_tokens else None
        self._of_prompt: list[TokenLogprob | None] = [None]  # nothing stands before the first token
        self._is_prompt_due = of_prompt

    def take(self, columns: LogprobColumns, row: TokenLogprob) -> None:
        """Keep a row of the columns. Called before the token of the same step is added."""
        if columns.of_prompt:
            self._of_prompt.append(row)
        elif self.of_tokens is not None:
            self.of_tokens.append(row)

    def take_prompt(self) -> list[TokenLogprob | None] | None:
        """The prompt's, once: for the output with the first token."""
        if not self._is_prompt_due:
            return None
        self._is_prompt_due = False
        return self._of_prompt


def rows_of(columns: LogprobColumns) -> Iterator[tuple[int, TokenLogprob]]:
    """(slot, row), in order. ValueError when the columns do not fit each other."""
    slots, token_ids, ranks, widths, top_ids = (
        memoryview(column).cast("I").tolist()
        for column in (columns.slots, columns.token_ids, columns.ranks, columns.widths, columns.top_ids)
    )
    logprobs, top_logprobs = _floats(columns.logprobs), _floats(columns.top_logprobs)
    at = 0
    for slot, token_id, logprob, rank, width in zip(slots, token_ids, logprobs, ranks, widths, strict=True):
        yield slot, TokenLogprob(token_id, logprob, rank, top_ids[at : at + width], top_logprobs[at : at + width])
        at += width


def _floats(column: bytes) -> list[float]:
    values: list[float] = np.frombuffer(column, np.float32).tolist()
    return values
