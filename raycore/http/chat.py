"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from typing import Any

from msgspec import UNSET

from raycore.client.journal import RequestOutput
from raycore.http.answers import Answers
from raycore.http.endpoint import Asked, EventStream, Reply
from raycore.http.errors import bad_value
from raycore.http.front import Front, new_id
from raycore.http.logprobs import chat_rows
from raycore.http.protocol import ChatBody, parse
from raycore.http.replies import AssistantMessage, ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatLogprobs, Delta, Usage


class ChatCompletions:
    """The route's handler."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def __call__(self, asked: Asked) -> Reply | EventStream:
        """Answer a request."""
        front, ask = self._front, parse(ChatBody, asked.body)
        adapter = await front.adapter(ask.model, ask.lora)
        _check(ask)
        prompt = await front.texts.chat(ask.messages)
        front.check_room([prompt], "messages")
        given = ask.max_tokens if ask.max_completion_tokens is None else ask.max_completion_tokens
        room = front.client.info.max_model_len - len(prompt)  # without a limit an answer may fill the context
        sampling = ask.sampling(max_tokens=room if given is None else given, logprobs=(ask.top_logprobs or 0) if ask.logprobs else None)
        writer = _Writer(front, ask)
        answers = Answers(front.client, writer.id, [prompt], sampling, ask.options(adapter))
        if not ask.stream:
            return await front.whole(answers, writer.whole)
        return await front.stream(answers, writer.chunk, writer.usage_chunk if ask.includes_usage else None)


class _Writer:
    """One request's answers as response bodies."""

    def __init__(self, front: Front, ask: ChatBody) -> None:
        self.id = new_id("chatcmpl")
        self._front = front
        self._gives_ids = bool(ask.return_token_ids)
        self._created = int(time.time())
        self._model = ask.model or front.model
        self._begun: set[int] = set()
        self._no_usage: Any = None if ask.includes_usage else UNSET

    def whole(self, outputs: list[RequestOutput], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index, AssistantMessage(output.text), self._logprobs(output), output.finish_reason, output.stop_reason, self._ids(output)
            )
            for index, output in enumerate(outputs)
        ]
        return ChatCompletion(self.id, self._created, self._model, choices, usage)

    def chunk(self, index: int, output: RequestOutput) -> ChatChunk:
        """The first of each answer has the role beside its text: an event of its own would say nothing that anybody waits for."""
        role: Any = UNSET
        if index not in self._begun:
            self._begun.add(index)
            role = "assistant"
        delta = Delta(role, output.text)
        choice = ChatChunkChoice(index, delta, self._logprobs(output), output.finish_reason, output.stop_reason, self._ids(output))
        return ChatChunk(self.id, self._created, self._model, [choice], self._no_usage)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(self.id, self._created, self._model, [], usage)

    def _logprobs(self, output: RequestOutput) -> ChatLogprobs | None:
        return None if output.logprobs is None else chat_rows(self._front.texts.tokenizer, output.logprobs)

    def _ids(self, output: RequestOutput) -> Any:
        return output.token_ids if self._gives_ids else UNSET


def _check(ask: ChatBody) -> None:
    ask.check_stream()
    if ask.top_logprobs is not None and not ask.logprobs:
        raise bad_value("top_logprobs needs logprobs to be true", "top_logprobs")
    if ask.tools:
        raise bad_value("tools are not supported", "tools", "not_supported")
    if ask.tool_choice not in (None, "none", "auto"):
        raise bad_value("tools are not supported, so none can be chosen", "tool_choice", "not_supported")
    if ask.response_format is not None and ask.response_format.type != "text":
        raise bad_value(f"response_format {ask.response_format.type[:40]!r} is not supported; text is", "response_format", "not_supported")
    if ask.modalities is not None and ask.modalities != ["text"]:
        raise bad_value("the one modality is text", "modalities", "not_supported")
    if ask.max_tokens is not None and ask.max_completion_tokens is not None and ask.max_tokens != ask.max_completion_tokens:
        raise bad_value("max_tokens and max_completion_tokens differ; the first is the older name of the second", "max_tokens")
