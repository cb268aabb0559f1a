"""Log probabilities in OpenAI's two shapes: columns for completions, a row a token for chats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raycore.client.logprobs import TokenLogprob
from raycore.http.replies import ChatLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob
from raycore.http.text import token_bytes, token_text
from raycore.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity, which a token that the model rules out has."""


class CompletionColumns:
    """The columns of one choice, piece by piece: offsets go on where the last piece ended."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def of_prompt(self, tokens: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        """Of the prompt's tokens; nothing stands before the first, so it has none."""
        return self._columns(tokens, entries)

    def of_tokens(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Of new tokens."""
        return self._columns([entry.token_id for entry in entries], entries)

    def _columns(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        texts = [token_text(self._tokenizer, token) for token in ids]
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return CompletionLogprobs(
            texts,
            [None if entry is None else finite(entry.logprob) for entry in entries],
            [None if entry is None else self._top(entry, text) for entry, text in zip(entries, texts, strict=True)],
            offsets,
        )

    def _top(self, entry: TokenLogprob, text: str) -> dict[str, float]:
        """The likeliest tokens and the token itself, best first; of two with the same text the likelier counts."""
        top: dict[str, float] = {}
        for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            top.setdefault(token_text(self._tokenizer, token), finite(logprob))
        top.setdefault(text, finite(entry.logprob))
        return top


def joined(parts: Iterable[CompletionLogprobs]) -> CompletionLogprobs:
    """Pieces of one choice as one."""
    whole = CompletionLogprobs([], [], [], [])
    for part in parts:
        whole.tokens.extend(part.tokens)
        whole.token_logprobs.extend(part.token_logprobs)
        whole.top_logprobs.extend(part.top_logprobs)
        whole.text_offset.extend(part.text_offset)
    return whole


def chat_rows(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """A row for each token."""
    return ChatLogprobs([_row(tokenizer, entry) for entry in entries])


def _row(tokenizer: Tokenizer, entry: TokenLogprob) -> TokenLogprobs:
    text = token_text(tokenizer, entry.token_id)
    top: list[TopLogprob] = []
    for token, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
        likely = token_text(tokenizer, token)
        top.append(TopLogprob(likely, finite(logprob), token_bytes(likely)))
    return TokenLogprobs(text, finite(entry.logprob), token_bytes(text), top)


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(logprob, LEAST_LOGPROB)
