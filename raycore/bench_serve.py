"""`raycore bench serve`: a trace replayed against a pool, and what its clients saw of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from raycore import api
from raycore.console import working
from raycore.errors import ConfigurationError
from raycore.load import LoadRecord, LoadShare, losses
from raycore.traces import TraceRequest, load_trace, percentiles

LATE_S = 0.02
"""A request that is sent so long after its time was not sent at its time."""
LATE_SHARE = 0.01
"""With more of these than one in a hundred, the generator has not kept up, and its figures are of another load than the one asked for."""


class ServeBench(msgspec.Struct, frozen=True, kw_only=True):
    """What to replay, against what."""

    trace: Path | None = None
    seed: int = 0
    rate_scale: float = 1.0
    requests: int | None = None
    duration_s: float | None = None
    clients: int = 1
    drain_limit_s: float = 120.0
    pool: str | None = None
    """A pool that runs; None: launch one."""
    launch: dict[str, Any] = {}
    """Configuration of the pool to launch."""
    settings: dict[str, Any] = {}
    """Of each client, as for `connect`."""


class ServeReport(msgspec.Struct, frozen=True, kw_only=True):
    """What clients saw; times in seconds, measured from when a request should have been sent."""

    pool: str
    requests: int
    completed: int
    lost: dict[str, int]
    replayed: int
    clients: int
    duration_s: float
    ttft_s: dict[str, float]
    inter_token_s: dict[str, float]
    """Between two arrivals of tokens of one request."""
    per_token_s: dict[str, float]
    """Of each request: from its first token to its last, a token."""
    end_to_end_s: dict[str, float]
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ranks: dict[int, dict[str, int]]
    imbalance: float
    """Prompt and output tokens of the busiest rank, over the mean of all."""
    late_s: dict[str, float]
    late: int
    kept_up: bool


async def run_bench(bench: ServeBench) -> ServeReport:
    """Replay and sum up. The pool that it launched is gone afterwards."""
    trace = chosen_trace(bench)
    if bench.pool is None:
        async with api.launch(**bench.launch) as client:
            return await _replay(client.pool, client.ranks(), trace, bench)
    async with api.connect(bench.pool) as client:
        return await _replay(bench.pool, client.ranks(), trace, bench)


def chosen_trace(bench: ServeBench) -> list[TraceRequest]:
    """The requests to replay. ConfigurationError when there is none."""
    trace = load_trace(bench.trace, rate_scale=bench.rate_scale, seed=bench.seed, requests=bench.requests)
    if bench.duration_s is not None:
        trace = [request for request in trace if request.arrival_s < bench.duration_s]
    if not trace or bench.clients < 1:
        msg = "there is nothing to replay: no request, or no client"
        raise ConfigurationError(msg)
    return trace


async def _replay(pool: str, ranks: Sequence[int], trace: list[TraceRequest], bench: ServeBench) -> ServeReport:
    from actors.load_run import replay_on_clients

    with working(f"replaying {len(trace)} requests, the last one after {trace[-1].arrival_s:.0f} s, from {bench.clients} clients"):
        shares = await replay_on_clients(pool, trace, bench.clients, drain_limit_s=bench.drain_limit_s, settings=bench.settings)
    return summary(pool, ranks, trace, shares)


def summary(pool: str, ranks: Sequence[int], trace: Sequence[TraceRequest], shares: Sequence[LoadShare]) -> ServeReport:
    """The report of a replay; a request of the trace that no share tells of is lost, too."""
    records = [record for share in shares for record in share.records]
    done = [record for record in records if record.is_complete]
    lost = losses(records)
    if len(records) < len(trace):
        lost["never sent"] = len(trace) - len(records)
    ends_s = [trace[record.index].arrival_s + record.last_s for record in done]
    duration_s = max(ends_s, default=0.0)
    late = sum(record.late_s > LATE_S for record in records)
    gaps = np.concatenate([np.frombuffer(share.gaps, np.float32) for share in shares]) if shares else np.empty(0)
    later_tokens = [(record.last_s - record.first_s, record.got_tokens - record.first_tokens) for record in done]
    by_rank, imbalance = _balance(ranks, done)

    def per_second(count: float) -> float:
        return count / duration_s if duration_s else 0.0

    return ServeReport(
        pool=pool,
        requests=len(trace),
        completed=len(done),
        lost=lost,
        replayed=sum(record.replayed for record in records),
        clients=len(shares),
        duration_s=duration_s,
        ttft_s=percentiles([record.first_s for record in done]),
        inter_token_s=percentiles(gaps),
        per_token_s=percentiles([seconds / tokens for seconds, tokens in later_tokens if tokens]),
        end_to_end_s=percentiles([record.last_s for record in done]),
        requests_per_s=per_second(len(done)),
        prompt_tokens_per_s=per_second(sum(record.prompt_tokens for record in done)),
        output_tokens_per_s=per_second(sum(record.got_tokens for record in done)),
        ranks=by_rank,
        imbalance=imbalance,
        late_s=percentiles([record.late_s for record in records]),
        late=late,
        kept_up=late <= LATE_SHARE * len(records),
    )


def _balance(ranks: Sequence[int], done: Sequence[LoadRecord]) -> tuple[dict[int, dict[str, int]], float]:
    rows: dict[int, dict[str, int]] = defaultdict(lambda: dict.fromkeys(("requests", "prompt_tokens", "output_tokens"), 0))
    for rank in ranks:
        rows[rank]["requests"] += 0
    for record in done:
        row = rows[record.rank]
        row["requests"] += 1
        row["prompt_tokens"] += record.prompt_tokens
        row["output_tokens"] += record.got_tokens
    work = [row["prompt_tokens"] + row["output_tokens"] for row in rows.values()]
    return dict(sorted(rows.items())), max(work) * len(work) / sum(work) if sum(work) else 1.0


def show(report: ServeReport, console: Console) -> None:
    """For a terminal."""
    table = Table(title=f"pool {report.pool} · {report.requests} requests in {report.duration_s:.1f} s · {report.clients} clients")
    for heading in ("ms", "p50", "p90", "p99"):
        table.add_column(heading, justify="right")
    rows = (
        ("first token", report.ttft_s),
        ("between tokens", report.inter_token_s),
        ("a token", report.per_token_s),
        ("whole request", report.end_to_end_s),
        ("sent late", report.late_s),
    )
    for name, values in rows:
        table.add_row(name, *(f"{values[share] * 1e3:,.1f}" if values else "-" for share in ("p50", "p90", "p99")))
    console.print(table)
    ranks = Table()
    for heading in ("rank", "requests", "prompt tokens", "output tokens"):
        ranks.add_column(heading, justify="right")
    for rank, row in report.ranks.items():
        ranks.add_row(str(rank), *(f"{row[name]:,}" for name in ("requests", "prompt_tokens", "output_tokens")))
    console.print(ranks)
    console.print(
        f"{report.requests_per_s:.2f} requests/s, {report.prompt_tokens_per_s:,.0f} prompt and {report.output_tokens_per_s:,.0f} output "
        f"tokens/s; the busiest rank has {report.imbalance:.2f} x the mean of tokens",
        highlight=False,
        soft_wrap=True,
    )
    if not report.kept_up:
        console.print(
            f"[red]the load generator could not keep up:[/] {report.late} of {report.requests} requests were sent more than "
            f"{LATE_S * 1e3:.0f} ms late; use more --clients or a smaller --rate-scale",
            highlight=False,
            soft_wrap=True,
        )
    if report.lost:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.lost.items())
        console.print(f"[red]lost {sum(report.lost.values())} requests:[/] {reasons}", highlight=False, soft_wrap=True)
