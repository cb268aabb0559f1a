"""The terminal: answers side by side while they stream, lines where nobody watches, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from raycore.answers import Answer, RankSummary

RANK_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
REFRESHES_PER_S = 12
PANEL_LINES = 5
"""Longer answers show their end; six panels in two columns fit a terminal of 24 lines."""
WIDE_TERMINAL = 150
"""From so many columns on there are three panels side by side instead of two."""


class AnswerView:
    """Shows answers while they come: live panels on a terminal, one line for each finished answer elsewhere."""

    def __init__(self, console: Console, answers: Sequence[Answer], *, max_tokens: int) -> None:
        self._console = console
        self._answers = answers
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tokens]} tokens"), TimeElapsedColumn(), console=console
        )
        self._max_tokens = max_tokens
        self._bar: TaskID | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = self._progress.add_task("answering", total=len(self._answers) * self._max_tokens, tokens=0)
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_S)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)

    def show(self, answer: Answer) -> None:
        """Something is new of this answer."""
        if self._live is None:
            if answer.finish_reason is not None:
                self._console.print(
                    f"rank {answer.rank} | {answer.prompt} | {answer.text.strip()}", markup=False, highlight=False, soft_wrap=True
                )
            return
        if self._bar is not None:
            done = sum(self._max_tokens if a.finish_reason else len(a.token_ids) for a in self._answers)
            self._progress.update(self._bar, completed=done, tokens=sum(len(a.token_ids) for a in self._answers))

    def _render(self) -> Group:
        width = self._console.width // (3 if self._console.width >= WIDE_TERMINAL else 2) - 1
        return Group(Columns([_panel(answer, width) for answer in self._answers]), self._progress)


def _panel(answer: Answer, width: int) -> Panel:
    colour = "white" if answer.rank < 0 else RANK_COLOURS[answer.rank % len(RANK_COLOURS)]
    lines = Text(answer.text.strip()).wrap(Console(width=width), max(1, width - 4))
    shown = Text("\n").join(list(lines)[-PANEL_LINES:])
    place = "waiting" if answer.rank < 0 else f"rank {answer.rank}"
    return Panel(shown, title=Text(answer.prompt, style="bold"), subtitle=place, width=width, height=PANEL_LINES + 2, border_style=colour)


def rank_table(rows: Sequence[RankSummary]) -> Table:
    """What each rank did."""
    table = Table(title="per rank")
    for heading in ("rank", "requests", "prompt tokens", "output tokens", "tokens/s", "first token"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.rank),
            str(row.requests),
            str(row.prompt_tokens),
            str(row.output_tokens),
            f"{row.tokens_per_s:.1f}",
            f"{row.first_token_s * 1000:.0f} ms",
        )
    return table


def status_table(status: Mapping[str, Any]) -> Table:
    """A pool's members and their loads, as the controller reports them."""
    table = Table(title=f"pool {status['pool']} · {status['lifetime']} · epoch {status['epoch']}, term {status['term']}")
    for heading in ("rank", "incarnation", "pid", "running", "waiting", "KV tokens", "step"):
        table.add_column(heading, justify="right")
    for member in status["members"]:
        load = member["load"] or {}
        cells = (load.get("running"), load.get("waiting"), load.get("kv_tokens_used"), member["step"])
        table.add_row(
            str(member["rank"]), member["incarnation"], str(member["pid"]), *("-" if cell is None else str(cell) for cell in cells)
        )
    for gone in status["departed"]:
        table.add_row(str(gone["rank"]), gone["incarnation"], "gone", Text(gone["cause"], style="red"))
    return table
