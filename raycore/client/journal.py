"""The journal: one record per request in flight. The list of delivered tokens is also the buffer that consumers read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from raycore.engine import Detail, FinishReason
from raycore.errors import RaycoreError
from raycore.ids import Rank, RequestId
from raycore.sampling import SamplingParams

if TYPE_CHECKING:
    from raycore.client.session import EngineSession
    from raycore.client.text import TextBuilder


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """What is new of one request since its last output.

    `token_ids`: new tokens, in order, each position once. `text`: their text where the prompt was text (a stop string and what follows it
    is left out).
    `finish_reason`: None while it runs; then "stop", "length", "abort". `replayed`: some of it was computed again after an engine or
    session was lost.
    """

    request_id: RequestId
    token_ids: list[int]
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    rank: int = -1
    prompt_tokens: int = 0
    replayed: bool = False
    error: RaycoreError | None = None
    """Set on the last output of a failed request read through `outputs()`; `generate` raises it instead."""


REASON_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort", FinishReason.ERROR: "error"}


class RequestRecord:
    """One request from admission to its end, over every engine that it was on."""

    __slots__ = (
        "abort_wanted",
        "cost",
        "cursor",
        "deaths",
        "detail",
        "error",
        "files",
        "finish_reason",
        "losses",
        "mailbox",
        "pinned_rank",
        "priority",
        "prompt",
        "prompt_tokens",
        "request_id",
        "sampling",
        "served_rank",
        "session",
        "slot",
        "stamp_ns",
        "tensors",
        "text",
        "tokens",
        "tokens_at_loss",
        "waiter",
        "was_replayed",
    )

    def __init__(
        self,
        request_id: RequestId,
        prompt: bytes,
        prompt_tokens: int,
        sampling: SamplingParams,
        *,
        pinned_rank: Rank | None = None,
        priority: int = 0,
        tensors: dict[str, Any] | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_tokens = prompt_tokens
        self.sampling = sampling
        self.pinned_rank = pinned_rank
        self.priority = priority
        self.tensors = tensors
        self.tokens: list[int] = []
        self.cursor = 0
        self.finish_reason: FinishReason | None = None
        self.detail: Detail | None = None
        self.error: RaycoreError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.mailbox: Callable[[RequestRecord], None] | None = None
        """Where the record reports progress when it is read through `outputs()`."""
        self.text: TextBuilder | None = None
        self.session: EngineSession | None = None
        self.slot = -1
        self.cost = 0
        self.deaths = 0
        """Engines that died with this request on them."""
        self.losses = 0
        """Sessions that ended under this request since its last token."""
        self.tokens_at_loss = -1
        self.served_rank = -1
        self.was_replayed = False
        self.abort_wanted = False
        self.files: tuple[str, ...] = ()
        self.stamp_ns = 0

    @property
    def is_finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None or self.error is not None

    def wake(self) -> None:
        """Something is new: tell whoever waits."""
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            if not waiter.done():
                waiter.set_result(None)
        elif self.mailbox is not None:
            self.mailbox(self)

    def has_news(self) -> bool:
        """Whether `take` would give something."""
        return self.cursor < len(self.tokens) or self.is_finished

    def take(self) -> RequestOutput:
        """The output since the last call; from one thread at a time, which need not be the loop's."""
        if self.finish_reason is None and self.error is None and self.text is None:
            tokens = self.tokens
            new = tokens[self.cursor :]
            self.cursor += len(new)
            return RequestOutput(self.request_id, new, "", None, None, self.served_rank, self.prompt_tokens, self.was_replayed)
        # the end before the tokens: the loop's thread adds tokens before it sets an end, so with an end in hand they are all there
        reason, error = self.finish_reason, self.error
        tokens = self.tokens
        new = tokens[self.cursor :] if self.cursor else tokens[:]
        self.cursor += len(new)
        detail = self.detail
        stop_reason = detail.stop_reason if detail is not None else None
        text = ""
        if self.text is not None:
            text = self.text.push(new, is_last=reason is not None or error is not None, stop_reason=stop_reason)
        return RequestOutput(
            self.request_id,
            new,
            text,
            None if reason is None else REASON_NAMES[reason],
            stop_reason,
            self.served_rank,
            self.prompt_tokens,
            self.was_replayed,
            error,
        )
