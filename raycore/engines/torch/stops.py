"""When a request ends: end-of-sequence ids, stop ids, stop strings, and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raycore.engine import FinishReason
from raycore.sampling import SamplingParams
from raycore.tokenizer import IncrementalDetokenizer, Tokenizer


@dataclass(slots=True, frozen=True)
class Stop:
    """Why a request ended; `reason` is the stop string or stop id, None for end of sequence and lengths."""

    finish: FinishReason
    reason: int | str | None = None


class StopChecker:
    """Watches one request's output tokens; tokens it has been given are published, the one that ends the request included.

    A stop string is looked for in the text, across tokens; it counts where its last character is completed. Until `min_tokens`
    tokens are out, no stop but the lengths counts. The detokeniser exists only for requests with stop strings: text for people is the
    client's business.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        *,
        eos_token_ids: Sequence[int],
        max_outputs: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        """`max_outputs`: output tokens until `max_tokens` or the context length, whichever comes first."""
        self._eos = frozenset(() if sampling.ignore_eos else eos_token_ids)
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._strings = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._max_outputs = max_outputs
        self._count = 0
        self._tail = ""
        self._keep = max((len(s) for s in self._strings), default=1) - 1
        assert tokenizer is not None or not self._strings  # noqa: S101
        self._text = IncrementalDetokenizer(tokenizer) if tokenizer is not None and self._strings else None

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that must not be chosen for the next token: those that would end the request before `min_tokens`."""
        return tuple(self._eos | self._stop_ids) if self._count < self._min_tokens else ()

    def push(self, token: int) -> Stop | None:
        """Count an output token; whether it ends the request, and why."""
        self._count += 1
        found = self._find_string(token) if self._text is not None else None
        if self._count > self._min_tokens:
            if token in self._stop_ids:
                return Stop(FinishReason.STOP, token)
            if token in self._eos:
                return Stop(FinishReason.STOP)
        if found is not None and self._count >= self._min_tokens:
            return Stop(FinishReason.STOP, found)
        return Stop(FinishReason.LENGTH) if self._count >= self._max_outputs else None

    def _find_string(self, token: int) -> str | None:
        """The stop string that begins first among those that this token completes."""
        assert self._text is not None  # noqa: S101
        old = len(self._tail)
        text = self._tail + self._text.push((token,))
        hits = []
        for string in self._strings:
            at = text.find(string, max(0, old - len(string) + 1))
            if at >= 0:
                hits.append((at, -len(string), string))
        self._tail = text[len(text) - self._keep :] if 0 < self._keep < len(text) else text if self._keep else ""
        return min(hits)[2] if hits else None
