"""Answers: prompts asked at once of one client, and what is measured of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from raycore.client.logprobs import TokenLogprob
from raycore.errors import RaycoreError
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer

if TYPE_CHECKING:
    from raycore.client.blocking import BlockingClient
    from raycore.client.client import EngineCoreClient
    from raycore.client.journal import RequestOutput


class Answer(msgspec.Struct):
    """One prompt and what came back; times are seconds of one clock. `index`: which of the prompt's `n` answers it is."""

    prompt: str
    text: str = ""
    token_ids: list[int] = []
    rank: int = -1
    prompt_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    asked_s: float = 0.0
    first_token_s: float | None = None
    ended_s: float | None = None
    index: int = 0
    logprobs: list[TokenLogprob] = []

    def take(self, output: RequestOutput, now_s: float) -> None:
        """Add what an output brings."""
        self.text += output.text
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs or ())
        self.rank, self.prompt_tokens = output.rank, output.prompt_tokens
        if output.token_ids and self.first_token_s is None:
            self.first_token_s = now_s
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason, self.ended_s = output.finish_reason, output.stop_reason, now_s


class RankSummary(msgspec.Struct, frozen=True):
    """What one rank did for these answers."""

    rank: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    tokens_per_s: float
    first_token_s: float
    """Median over the requests, from asking to the first token."""


def answers_to(prompts: Sequence[str], n: int) -> list[Answer]:
    """Empty answers, n in a row for each prompt."""
    return [Answer(prompt, index=index) for prompt in prompts for index in range(n)]


def summarise(answers: Sequence[Answer]) -> list[RankSummary]:
    """One row for each rank that served, in order."""
    rows: list[RankSummary] = []
    for rank in sorted({answer.rank for answer in answers}):
        own = [answer for answer in answers if answer.rank == rank]
        waits = sorted(a.first_token_s - a.asked_s for a in own if a.first_token_s is not None)
        elapsed_s = max((a.ended_s or a.asked_s) for a in own) - min(a.asked_s for a in own)
        tokens = sum(len(a.token_ids) for a in own)
        rows.append(
            RankSummary(
                rank=rank,
                requests=len(own),
                prompt_tokens=sum(a.prompt_tokens for a in own),
                output_tokens=tokens,
                tokens_per_s=tokens / elapsed_s if elapsed_s > 0 else 0.0,
                first_token_s=waits[len(waits) // 2] if waits else 0.0,
            )
        )
    return rows


async def ask_all(
    client: EngineCoreClient,
    answers: Sequence[Answer],
    sampling: SamplingParams,
    *,
    chat: Tokenizer | None,
    on_news: Callable[[Answer], None] = lambda _answer: None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Ask all prompts at once and fill in the answers as they stream; the first error ends the others and is raised.

    `answers`: `sampling.n` in a row for each prompt, as `answers_to` makes them.
    `chat`: the tokenizer whose chat template the prompts go through; None asks them as they are.
    """

    try:
        async with asyncio.TaskGroup() as group:
            for begin in range(0, len(answers), sampling.n):
                group.create_task(_ask(client, answers[begin : begin + sampling.n], sampling, chat, on_news, clock))
    except* RaycoreError as errors:
        raise _first(errors) from None


async def ask_one(
    client: EngineCoreClient,
    answer: Answer,
    sampling: SamplingParams,
    *,
    chat: Tokenizer | None,
    on_news: Callable[[Answer], None] = lambda _answer: None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Ask one prompt and fill in its answer as it streams."""
    await _ask(client, [answer], sampling, chat, on_news, clock)


async def _ask(
    client: EngineCoreClient,
    own: Sequence[Answer],
    sampling: SamplingParams,
    chat: Tokenizer | None,
    on_news: Callable[[Answer], None],
    clock: Callable[[], float],
) -> None:
    prompt = _prompt_of(own[0], chat)
    for answer in own:
        answer.asked_s = clock()
    async for output in client.generate(prompt, sampling, detokenize=True):
        own[output.index].take(output, clock())
        on_news(own[output.index])


def ask_all_in_process(
    client: BlockingClient,
    answers: Sequence[Answer],
    sampling: SamplingParams,
    *,
    chat: Tokenizer | None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """The same with a blocking client, which steps an engine in process itself; one answer for each prompt."""
    asked: dict[str, Answer] = {}
    for answer in answers:
        prompt = _prompt_of(answer, chat)
        answer.asked_s = clock()
        asked[client.add_request(prompt, sampling, detokenize=True)] = answer
    while any(answer.finish_reason is None for answer in answers):
        for output in client.outputs():
            if output.error is not None:
                raise output.error
            asked[output.request_id].take(output, clock())


def _prompt_of(answer: Answer, chat: Tokenizer | None) -> str | list[int]:
    return answer.prompt if chat is None else chat.apply_chat_template([{"role": "user", "content": answer.prompt}])


def _first(errors: BaseExceptionGroup[RaycoreError]) -> RaycoreError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
