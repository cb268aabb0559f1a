"""The terminal: answers side by side while they stream, lines where nobody watches, and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.columns import Columns
from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from raycore.answers import Answer, RankSummary
from raycore.client.control import ScalingReport
from raycore.doctor import Finding, Verdict

RANK_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
REFRESHES_PER_S = 12
PANEL_LINES = 5
"""Longer answers show their end; six panels in two columns fit a terminal of 24 lines."""
WIDE_TERMINAL = 150
"""From so many columns on there are three panels side by side instead of two."""


class AnswerView:
    """Shows answers while they come: live panels on a terminal, one line for each finished answer elsewhere."""

    def __init__(self, console: Console, answers: Sequence[Answer], *, max_tokens: int | None) -> None:
        """`answers`: one panel each; its owner may put others in their places. `max_tokens` of each; None: nobody knows how many come."""
        self._console = console
        self._answers = answers
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tokens]} tokens"), TimeElapsedColumn(), console=console
        )
        self._max_tokens = max_tokens
        self._ended_tokens = 0
        self._bar: TaskID | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            total = None if self._max_tokens is None else len(self._answers) * self._max_tokens
            self._bar = self._progress.add_task("answering", total=total, tokens=0)
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=REFRESHES_PER_S)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)

    def show(self, answer: Answer) -> None:
        """Something is new of this answer."""
        if answer.finish_reason is not None:
            self._ended_tokens += len(answer.token_ids)
        if self._live is None:
            if answer.finish_reason is not None:
                self._console.print(
                    f"rank {answer.rank} | {answer.prompt} | {answer.text.strip()}", markup=False, highlight=False, soft_wrap=True
                )
            return
        if self._bar is not None:
            tokens = self._ended_tokens + sum(len(a.token_ids) for a in self._answers if a.finish_reason is None)
            if self._max_tokens is not None:
                done = sum(self._max_tokens if a.finish_reason else len(a.token_ids) for a in self._answers)
                self._progress.update(self._bar, completed=done)
            self._progress.update(self._bar, tokens=tokens)

    def say(self, what: str) -> None:
        """What goes on now: before the bar, or a line of its own."""
        if self._live is None or self._bar is None:
            self._console.print(what, markup=False, highlight=False)
        else:
            self._progress.update(self._bar, description=what)

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


def scaling_table(reports: Sequence[ScalingReport]) -> Table:
    """What each scaling operation did, and the seconds of its phases."""
    phases = list(dict.fromkeys(phase for report in reports for phase in report.phases_s))
    table = Table(title="scaling")
    for heading in ("ranks", "joined", "left", *(f"{phase} [s]" for phase in phases)):
        table.add_column(Text(heading), justify="right")
    for report in reports:
        times = (f"{report.phases_s[phase]:.2f}" if phase in report.phases_s else "-" for phase in phases)
        names = (" ".join(map(str, ranks)) or "-" for ranks in (report.ranks, report.joined, report.left))
        table.add_row(*names, *times)
    return table


def status_table(status: Mapping[str, Any]) -> Table:
    """A pool's members and their loads, as the controller reports them."""
    table = Table(title=f"pool {status['pool']} · {status['lifetime']} · epoch {status['epoch']}, term {status['term']}")
    facts = ("rank", "incarnation", "pid", "state", "running", "waiting", "KV tokens", "prefix hits", "step")
    for heading in (*facts, "weights", "KV cache", "process", "GPU"):
        table.add_column(heading, justify="right")
    for member in status["members"]:
        load = member["load"] or {}
        state = {None: "-", True: "asleep", False: "paused" if member.get("is_paused") else "awake"}[member["is_sleeping"]]
        rate = member["cache"].get("prefix_hit_rate")
        hits = None if rate is None else f"{rate:.0%}"
        cells = (load.get("running"), load.get("waiting"), load.get("kv_tokens_used"), hits, member["step"])
        memory = (member["memory"].get(name) for name in ("weights_bytes", "kv_cache_bytes", "resident_bytes", "device_reserved_bytes"))
        table.add_row(
            str(member["rank"]),
            member["incarnation"],
            str(member["pid"]),
            state,
            *("-" if cell is None else str(cell) for cell in cells),
            *("-" if size is None else decimal(size) for size in memory),
        )
    for standby in status.get("standbys", ()):
        problem = [Text(str(standby["problem"]), style="red")] if standby["problem"] else []
        table.add_row("standby", "", str(standby["pid"] or "-"), str(standby["state"]), *problem)
    for gone in status["departed"]:
        table.add_row(str(gone["rank"]), gone["incarnation"], "gone", Text(gone["cause"], style="red"))
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """What `raycore doctor` found."""
    table = Table(title="raycore doctor")
    for heading in ("", "what", "found", "what to do"):
        table.add_column(heading)
    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    for finding in findings:
        table.add_row(
            Text(finding.verdict.value, style=colours[finding.verdict]), *map(Text, (finding.name, finding.found, finding.advice))
        )
    return table


def clients_table(clients: Sequence[Mapping[str, Any]]) -> Table:
    """A pool's client actors, as they report themselves."""
    table = Table(title="client actors")
    for heading in ("name", "pid", "in flight", "callers"):
        table.add_column(heading, justify="right")
    for client in clients:
        if "error" in client:
            table.add_row(str(client["name"]), Text(str(client["error"]), style="red"))
        else:
            table.add_row(*(str(client[name]) for name in ("name", "pid", "in_flight", "callers")))
    return table
