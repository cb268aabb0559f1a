"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from raycore.client.journal import RequestOutput
from raycore.http.answers import Answers
from raycore.http.endpoint import Asked, EventStream, Reply
from raycore.http.errors import bad_value
from raycore.http.front import Front, new_id
from raycore.http.logprobs import CompletionColumns, joined
from raycore.http.protocol import CompletionBody, parse
from raycore.http.replies import Completion, CompletionChoice, CompletionLogprobs, Usage

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class Completions:
    """The route's handler."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, asked: Asked) -> Reply | EventStream:
        """Answer a request."""
        front, ask = self._front, parse(CompletionBody, asked.body)
        adapter = await front.adapter(ask.model, ask.lora)
        _check(ask)
        prompts = await front.prompts(ask.prompt, "prompt")
        front.check_room(prompts, "prompt")
        sampling = ask.sampling(
            max_tokens=DEFAULT_MAX_TOKENS if ask.max_tokens is None else ask.max_tokens,
            logprobs=ask.logprobs,
            prompt_logprobs=ask.logprobs if ask.echo else None,
        )
        writer = _Writer(front, ask, prompts)
        answers = Answers(front.client, writer.id, prompts, sampling, ask.options(adapter))
        if not ask.stream:
            return await front.whole(answers, writer.whole)
        return await front.stream(answers, writer.chunk, writer.usage_chunk if ask.includes_usage else None)


class _Writer:
    """One request's answers as response bodies."""

    def __init__(self, front: Front, ask: CompletionBody, prompts: Sequence[Sequence[int]]) -> None:
        self.id = new_id("cmpl")
        self._front = front
        self._ask = ask
        self._prompts = prompts
        self._created = int(time.time())
        self._model = ask.model or front.model
        self._columns: dict[int, CompletionColumns] = {}
        self._begun: set[int] = set()
        self._no_usage: Any = None if ask.includes_usage else UNSET

    def whole(self, outputs: list[RequestOutput], usage: Usage) -> Completion:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return Completion(self.id, self._created, self._model, choices, usage)

    def chunk(self, index: int, output: RequestOutput) -> Completion:
        return Completion(self.id, self._created, self._model, [self._choice(index, output)], self._no_usage)

    def usage_chunk(self, usage: Usage) -> Completion:
        return Completion(self.id, self._created, self._model, [], usage)

    def _choice(self, index: int, output: RequestOutput) -> CompletionChoice:
        text = output.text
        if self._ask.echo and index not in self._begun:
            self._begun.add(index)
            text = self._prompt_text(index) + text
        token_ids = output.token_ids if self._ask.return_token_ids else UNSET
        return CompletionChoice(index, text, self._logprobs(index, output), output.finish_reason, output.stop_reason, token_ids)

    def _logprobs(self, index: int, output: RequestOutput) -> CompletionLogprobs | None:
        if output.logprobs is None:
            return None
        columns = self._columns.get(index)
        if columns is None:
            columns = self._columns[index] = CompletionColumns(self._front.texts.tokenizer)
        if output.prompt_logprobs is None:
            return columns.of_tokens(output.logprobs)
        return joined((columns.of_prompt(self._prompt(index), output.prompt_logprobs), columns.of_tokens(output.logprobs)))

    def _prompt(self, index: int) -> Sequence[int]:
        return self._prompts[index // (self._ask.n or 1)]

    def _prompt_text(self, index: int) -> str:
        given = self._ask.prompt
        if isinstance(given, str):
            return given
        each = given[index // (self._ask.n or 1)]
        return each if isinstance(each, str) else self._front.texts.tokenizer.decode(self._prompt(index))


def _check(ask: CompletionBody) -> None:
    ask.check_stream()
    n = ask.n or 1
    if ask.best_of not in {None, n}:
        raise bad_value("best_of must equal n: answers are not ranked here", "best_of", "not_supported")
    if ask.suffix:
        raise bad_value("suffix is not supported", "suffix", "not_supported")
    if ask.echo and ask.logprobs is not None and n > 1:
        raise bad_value("echo with logprobs takes n=1: the prompt's log probabilities come once", "echo", "not_supported")
