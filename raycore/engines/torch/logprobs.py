"""Log probabilities under the model's own distribution: float32 logits before anything edits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from raycore.engine import LogprobRows, TokenArray


@dataclass(slots=True, frozen=True)
class LogprobAsk:
    """A row of a step's logits whose token's log probability is wanted."""

    row: int
    handle: int
    width: int
    """How many of the likeliest tokens come beside it."""


class StepLogprobs:
    """The rows of one step, kept before the sampler edits them."""

    def __init__(self, logits: torch.Tensor, asks: Sequence[LogprobAsk]) -> None:
        """`logits` [S, vocabulary] float32."""
        self._asks = asks
        self._logits = logits[[ask.row for ask in asks]]

    def rows(self, tokens: Mapping[int, int]) -> LogprobRows | None:
        """Those of the tokens, by handle, that were published; None when there are none."""
        kept = [at for at, ask in enumerate(self._asks) if ask.handle in tokens]
        if not kept:
            return None
        asks = [self._asks[at] for at in kept]
        return logprob_rows(self._logits[kept], [tokens[a.handle] for a in asks], [a.handle for a in asks], [a.width for a in asks])


class PromptLogprobs:
    """One prompt's, put together chunk by chunk."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._parts: list[LogprobRows] = []

    def take(self, logits: torch.Tensor, handle: int, start: int, tokens: Sequence[int]) -> None:
        """Logits [Q, vocabulary] float32 of positions `start` on, and the Q tokens that follow them."""
        if start == 0:
            self._parts.clear()  # computed anew after a preemption
        self._parts.append(logprob_rows(logits, tokens, [handle] * len(tokens), [self._width] * len(tokens)))

    def rows(self) -> LogprobRows | None:
        """All of them; None for a prompt of one token."""
        if not self._parts:
            return None
        names = ("handles", "token_ids", "logprobs", "ranks", "widths", "top_ids", "top_logprobs")
        columns = {name: np.concatenate([getattr(part, name) for part in self._parts]) for name in names}
        return LogprobRows(**columns, of_prompt=True)


@torch.inference_mode()
def logprob_rows(logits: torch.Tensor, tokens: Sequence[int], handles: Sequence[int], widths: Sequence[int]) -> LogprobRows:
    """One row for each row of logits [R, vocabulary] float32 and its token."""
    size = logits.shape[-1]
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (logits > chosen).sum(dim=-1) + 1
    capped = np.minimum(widths, size)
    values, ids = logits.topk(int(capped.max(initial=0)), dim=-1)
    keeps = np.arange(values.shape[1]) < capped[:, None]
    return LogprobRows(
        handles=np.array(handles, np.uint32),
        token_ids=np.array(tokens, np.uint32),
        logprobs=_floats(chosen - normaliser).flatten(),
        ranks=_ids(ranks),
        widths=capped.astype(np.uint32),
        top_ids=_ids(ids)[keeps],
        top_logprobs=_floats(values - normaliser)[keeps],
    )


def _ids(values: torch.Tensor) -> TokenArray:
    return values.cpu().numpy().astype(np.uint32)


def _floats(values: torch.Tensor) -> NDArray[np.float32]:
    return values.cpu().numpy()
