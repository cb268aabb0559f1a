"""The answers to a request's prompts as one stream, by the index that OpenAI gives them: `prompt * n + answer`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from raycore.client.client import EngineCoreClient
from raycore.client.collected import collected
from raycore.client.journal import RequestOutput
from raycore.client.reader import BatchReader
from raycore.http.replies import Usage
from raycore.sampling import SamplingParams


class Answers:
    """Requests are sent on entering its block, and what runs of them is aborted on leaving it. One prompt is read without a detour."""

    def __init__(
        self, client: EngineCoreClient, request_id: str, prompts: Sequence[Sequence[int]], sampling: SamplingParams, options: dict[str, Any]
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._sampling = sampling
        self._options = options
        names = [request_id] if len(prompts) == 1 else [f"{request_id}-{index}" for index in range(len(prompts))]
        self._prompt_of = {name: index for index, name in enumerate(names)}
        self._source: Any = None
        self._outputs: AsyncIterator[RequestOutput]
        self._first: RequestOutput | None = None
        self._prompt_tokens: dict[str, int] = {}
        self._completion_tokens = 0

    @property
    def choices(self) -> int:
        """How many answers there will be."""
        return len(self._prompts) * self._sampling.n

    @property
    def usage(self) -> Usage:
        """Tokens so far; right once the outputs have been read to their end."""
        return Usage.of(sum(self._prompt_tokens.values()), self._completion_tokens)

    def index(self, output: RequestOutput) -> int:
        """Which choice this is of."""
        return self.prompt_index(output) * self._sampling.n + output.index

    def prompt_index(self, output: RequestOutput) -> int:
        """Which prompt this answers."""
        return self._prompt_of[output.request_id]

    async def __aenter__(self) -> Answers:
        names = iter(self._prompt_of)
        if len(self._prompts) == 1:
            self._source = self._client.generate(self._prompts[0], self._sampling, request_id=next(names), **self._options)
            self._outputs = self._source.__aiter__()
            return self
        reader = self._source = BatchReader(self._client)
        try:
            for name, prompt in zip(names, self._prompts, strict=True):
                reader.add(prompt, self._sampling, request_id=name, **self._options)
        except BaseException:
            await reader.aclose()
            raise
        self._outputs = _one_by_one(reader)
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self._source.aclose()

    async def wait_for_first(self) -> None:
        """Until something has come. Raises what is wrong with the requests while nothing has been said to the caller yet."""
        self._first = await anext(self._outputs, None)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """Every output; the error of one request ends all."""
        first, self._first = self._first, None
        if first is not None:
            self._count(first)
            yield first
        async for output in self._outputs:
            self._count(output)
            yield output

    async def collect(self) -> list[RequestOutput]:
        """Every answer as a whole, by index."""
        parts: list[list[RequestOutput]] = [[] for _ in range(self.choices)]
        async for output in self:
            parts[self.index(output)].append(output)
        return [collected(part) for part in parts]

    def _count(self, output: RequestOutput) -> None:
        self._prompt_tokens[output.request_id] = output.prompt_tokens
        self._completion_tokens += len(output.token_ids)


async def _one_by_one(reader: BatchReader) -> AsyncIterator[RequestOutput]:
    while outputs := await reader.outputs():
        for output in outputs:
            if output.error is not None:
                raise output.error
            yield output
