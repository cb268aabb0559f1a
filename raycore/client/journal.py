"""The journal: one record per request in flight. The list of delivered tokens is also the buffer that consumers read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from raycore.engine import Detail, FinishReason
from raycore.errors import RaycoreError
from raycore.ids import Rank, RequestId
from raycore.routing.query import hash_blocks
from raycore.sampling import SamplingParams

if TYPE_CHECKING:
    from raycore.client.logprobs import LogprobJournal, TokenLogprob
    from raycore.client.session import EngineSession
    from raycore.client.text import TextBuilder


class RequestOutput(msgspec.Struct, frozen=True, gc=False):
    """What is new of one request since its last output.

    `token_ids`: new tokens, in order, each position once. `text`: their text where the prompt was text (a stop string and what follows it
    is left out).
    `finish_reason`: None while it runs; then "stop", "length", "abort". `replayed`: some of it was computed again after an engine or
    session was lost. `logprobs`: an entry for each of `token_ids` where they were asked for. `prompt_logprobs`: with the first tokens only,
    an entry for each token of the prompt, None for the first. `index`: which of the request's `n` answers this is of.
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
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    index: int = 0


REASON_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort", FinishReason.ERROR: "error"}


class RequestRecord:
    """One request from admission to its end, over every engine that it was on."""

    __slots__ = (
        "abort_wanted",
        "admitted_s",
        "cursor",
        "deaths",
        "detail",
        "embeds",
        "error",
        "files",
        "finish_reason",
        "index",
        "is_plain",
        "logprobs",
        "lora",
        "losses",
        "mailbox",
        "parent_id",
        "pinned_rank",
        "prefill",
        "priority",
        "prompt",
        "prompt_tokens",
        "refusals",
        "request_id",
        "sampling",
        "served_rank",
        "session",
        "slot",
        "stamp_ns",
        "tensors",
        "text",
        "tokens",
        "tokens_at_add",
        "tokens_at_loss",
        "waiter",
        "was_admitted",
        "was_replayed",
    )

    def __init__(
        self,
        request_id: RequestId,
        prompt: bytes,
        prompt_tokens: int,
        sampling: SamplingParams,
        pinned_rank: Rank | None = None,
        priority: int = 0,
        tensors: dict[str, Any] | None = None,
        lora: str | int | None = None,
        embeds: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_tokens = prompt_tokens
        self.sampling = sampling
        self.pinned_rank = pinned_rank
        self.priority = priority
        self.tensors = tensors
        self.lora = lora
        self.embeds = embeds
        self.tokens: list[int] = []
        self.cursor = 0
        self.finish_reason: FinishReason | None = None
        self.detail: Detail | None = None
        self.error: RaycoreError | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.mailbox: Callable[[RequestRecord], None] | None = None
        """Where the record reports progress when it is read through `outputs()`."""
        self.text: TextBuilder | None = None
        self.logprobs: LogprobJournal | None = None
        self.parent_id: RequestId | None = None
        """The id that the caller knows, where this is one of its answers."""
        self.index = 0
        self.is_plain = True
        """Whether outputs are token ids and nothing else: no text, log probabilities or index."""
        self.session: EngineSession | None = None
        self.slot = -1
        self.prefill = 0
        """Tokens that its engine is taken to have still to compute before it gives the next one; 0 from then on."""
        self.tokens_at_add = 0
        self.deaths = 0
        """Engines that died with this request on them."""
        self.losses = 0
        """Sessions that ended under this request since its last token."""
        self.tokens_at_loss = -1
        self.served_rank = -1
        self.was_replayed = False
        self.was_admitted = False
        """It was on an engine before and is sent again: no limit of what may wait refuses it."""
        self.refusals = 0
        """Engines that had no room for it."""
        self.abort_wanted = False
        self.admitted_s = 0.0
        """When it was admitted, where that is measured."""
        self.files: tuple[str, ...] = ()
        self.stamp_ns = 0

    @property
    def max_tokens(self) -> int:
        """No more output than this."""
        return self.sampling.max_tokens

    def prefix_blocks(self, block_tokens: int) -> list[int]:
        """A hash for each full block of the prompt, over everything up to its end; an adapter's caches are its own."""
        return hash_blocks(self.prompt, block_tokens, salt=self.lora)

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

    def take_tokens(self) -> RequestOutput:
        """`take` for a request that runs and wants no text: this is once a token where tokens come one by one."""
        tokens = self.tokens
        end = len(tokens)  # once: the loop's thread may add some meanwhile
        new = tokens[self.cursor : end]
        self.cursor = end
        return RequestOutput(self.request_id, new, "", None, None, self.served_rank, self.prompt_tokens, self.was_replayed)

    def take(self) -> RequestOutput:
        """The output since the last call; from one thread at a time, which need not be the loop's."""
        if self.finish_reason is None and self.error is None and self.is_plain:
            return self.take_tokens()
        # the end before the tokens: the loop's thread adds tokens before it sets an end, so with an end in hand they are all there
        reason, error = self.finish_reason, self.error
        tokens, begin = self.tokens, self.cursor
        new = tokens[begin:] if begin else tokens[:]
        self.cursor += len(new)
        detail = self.detail
        stop_reason = detail.stop_reason if detail is not None else None
        text = ""
        if self.text is not None:
            text = self.text.push(new, is_last=reason is not None or error is not None, stop_reason=stop_reason)
        logprobs = self.logprobs
        return RequestOutput(
            self.parent_id or self.request_id,
            new,
            text,
            None if reason is None else REASON_NAMES[reason],
            stop_reason,
            self.served_rank,
            self.prompt_tokens,
            self.was_replayed,
            error,
            None if logprobs is None or logprobs.of_tokens is None else logprobs.of_tokens[begin : self.cursor],
            None if logprobs is None or not new else logprobs.take_prompt(),
            self.index,
        )
