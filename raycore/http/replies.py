"""Response bodies, as structs that msgspec writes: a chunk is encoded once for each step of each stream."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request: of all its prompts, of all its answers, and both."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> Usage:
        """With their sum."""
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """OpenAI's older shape: columns. `text_offset`: where each token's text begins in prompt and answer, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One answer, or what is new of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True):
    """Answer of /v1/completions, whole or a chunk. `usage` is absent from chunks unless it was asked for, then null until the last."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


class TopLogprob(msgspec.Struct, frozen=True):
    """A token's text, its natural log probability, and its bytes where the text is whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(msgspec.Struct, frozen=True):
    """A token of an answer and the likeliest at its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """OpenAI's newer shape: a row for each token."""

    content: list[TokenLogprobs]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    """A whole answer."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """Answer of /v1/chat/completions."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"


class Delta(msgspec.Struct, frozen=True):
    """What is new of a message; the first has the role."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """What is new of one answer of a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True):
    """One event of a chat's stream."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


encode = msgspec.json.Encoder().encode


def event(chunk: Any) -> bytes:
    """A server-sent event whose data is this object."""
    return b"data: " + encode(chunk) + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The end of a stream, in OpenAI's protocol."""
