"""What the generating routes share: the client, the model's name, tokens from texts, and answers on their way to a caller."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from raycore.client.client import EngineCoreClient
from raycore.client.journal import RequestOutput
from raycore.http.adapters import AdapterNames
from raycore.http.answers import Answers
from raycore.http.endpoint import EventStream, Reply
from raycore.http.errors import HttpError, bad_value
from raycore.http.metrics import HttpMetrics
from raycore.http.replies import DONE, Usage, encode, event
from raycore.http.text import Texts

WholeOf = Callable[[list[RequestOutput], Usage], Any]
"""The response body of all answers."""
ChunkOf = Callable[[int, RequestOutput], Any]
"""The event's data for what is new of one choice."""


_NAMED = 16
"""Models that an error names."""


class Front:
    """One served model and its adapters."""

    def __init__(self, client: EngineCoreClient, model: str, metrics: HttpMetrics) -> None:
        self.client = client
        self.model = model
        self.texts = Texts(client)
        self.adapters = AdapterNames(client)
        self.metrics = metrics
        self.created = int(time.time())

    def check_model(self, name: str | None) -> None:
        """404 for another model than the one that is served; None is that one."""
        if name is not None and name != self.model:
            raise self._no_model(name, ())

    async def adapter(self, model: str | None, lora: str | None = None) -> str | None:
        """The LoRA adapter that a request means, by its `model` or by `lora`; None: none. 404 where there is no such model."""
        if model is None or model == self.model:
            return lora
        names = await self.adapters.all()
        if model not in names:
            raise self._no_model(model, sorted(names))
        if lora not in {None, model}:
            raise bad_value(f"model is the adapter {model[:200]!r}, and lora names another one", "lora")
        return model

    def _no_model(self, name: str, adapters: Sequence[str]) -> HttpError:
        there = ", ".join(repr(each) for each in (self.model, *adapters)[:_NAMED])
        return HttpError(404, f"the model {name[:200]!r} does not exist; this server has {there}", code="model_not_found", param="model")

    async def models(self) -> bytes:
        """GET /v1/models: the one that is served, and its adapters, which name it as their parent."""
        adapters = [self.describe(name) for name in sorted(await self.adapters.all())]
        return encode({"object": "list", "data": [self.describe(), *adapters]})

    def describe(self, adapter: str | None = None) -> dict[str, Any]:
        """One entry of the list of models."""
        limit = self.client.info.max_model_len
        parent = None if adapter is None else self.model
        facts = {"id": adapter or self.model, "object": "model", "created": self.created, "owned_by": "raycore"}
        return {**facts, "max_model_len": limit, "parent": parent}

    async def prompts(self, given: str | Sequence[Any], param: str) -> list[list[int]]:
        """Token ids of each prompt of a body."""
        if isinstance(given, str):
            return [await self.texts.encode(given, param)]
        if isinstance(given[0], int):
            return [list(given)]
        return [await self.texts.encode(each, param) if isinstance(each, str) else each for each in given]

    def check_room(self, prompts: Sequence[Sequence[int]], param: str) -> None:
        """400 for a prompt that leaves no room for an answer, with the code that OpenAI's callers look for."""
        limit = self.client.info.max_model_len
        longest = max(map(len, prompts))
        if longest >= limit:
            message = f"the prompt has {longest} tokens, and with its answer the model's context takes {limit}"
            raise bad_value(message, param, "context_length_exceeded")

    async def whole(self, answers: Answers, make: WholeOf) -> Reply:
        """Every answer at once."""
        begin_s = time.perf_counter()
        async with answers:
            await answers.wait_for_first()
            self.metrics.ttft.observe(time.perf_counter() - begin_s)
            outputs = await answers.collect()
        self._count(answers.usage)
        return Reply(encode(make(outputs, answers.usage)))

    async def stream(self, answers: Answers, chunk: ChunkOf, last: Callable[[Usage], Any] | None) -> EventStream:
        """Each output as an event; `last` makes one more of the usage. What is refused is raised here, before anything is said."""
        begin_s = time.perf_counter()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(answers)
            await answers.wait_for_first()
            self.metrics.ttft.observe(time.perf_counter() - begin_s)
            return EventStream(self._events(answers, chunk, last), stack.pop_all())
        raise AssertionError  # pragma: no cover -- the block returns or raises

    async def _events(self, answers: Answers, chunk: ChunkOf, last: Callable[[Usage], Any] | None) -> AsyncGenerator[bytes]:
        async for output in answers:
            yield event(chunk(answers.index(output), output))
        usage = answers.usage
        self._count(usage)
        if last is not None:
            yield event(last(usage))
        yield DONE

    def _count(self, usage: Usage) -> None:
        self.metrics.count_tokens(usage.prompt_tokens, usage.completion_tokens)


def new_id(kind: str) -> str:
    """The id of an answer, and of its request in the engines' logs."""
    return f"{kind}-{secrets.token_hex(12)}"
