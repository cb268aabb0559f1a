"""Request traces: a public one from a file, or a synthetic one from a seed; and the percentiles that replays of them are told in. Pure."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from raycore.errors import ConfigurationError

SYNTHETIC_REQUESTS = 20_000
_SYNTHETIC_RATE = 5.5
"""Requests a second, and log-normal lengths below: close to a public trace of conversations."""
_MILLISECOND_S = 1e-3
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_DIGITS_OF_A_MICROSECOND = 26
"""Azure's stamps have seven digits after the point, one more than `datetime` takes."""


class TraceRequest(NamedTuple):
    """One request: when it arrives, in seconds from the first one, and how long its prompt and its output are, in tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """What the prompt consists of, where the trace tells: equal numbers are equal blocks of `BLOCK_TOKENS` tokens."""


BLOCK_TOKENS = 512
"""Mooncake's block; the last one of a prompt may be shorter."""


def load_trace(path: Path | None, *, rate_scale: float = 1.0, seed: int = 0, requests: int | None = None) -> list[TraceRequest]:
    """The first `requests` in order of arrival, which comes `rate_scale` times as fast as recorded; without a path a synthetic trace.

    `.jsonl` is read as Mooncake's, anything else as Azure's CSV. ConfigurationError names a file that cannot be read or is neither.
    """
    if not rate_scale > 0:
        msg = f"the rate scale must be above 0, not {rate_scale!r}"
        raise ConfigurationError(msg)
    if path is None:
        rows = _synthetic(seed, SYNTHETIC_REQUESTS if requests is None else requests)
    else:
        try:
            rows = _mooncake(path, seed) if path.suffix == ".jsonl" else _azure(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = f"{path} is no trace in Mooncake's JSONL or Azure's CSV: {type(error).__name__}: {error}"
            raise ConfigurationError(msg) from error
        if not rows:
            msg = f"{path} has no request in it"
            raise ConfigurationError(msg)
    return [row._replace(arrival_s=row.arrival_s / rate_scale) for row in rows[:requests]]


def percentiles(samples: Sequence[float] | np.ndarray, wanted: Sequence[float] = (50, 90, 99)) -> dict[str, float]:
    """`{"p50": …, "p90": …, "p99": …}` by linear interpolation; empty without samples."""
    if not len(samples):
        return {}
    return {f"p{share:g}": float(value) for share, value in zip(wanted, np.percentile(samples, wanted), strict=True)}


def _azure(path: Path) -> list[TraceRequest]:
    with path.open(encoding="utf-8", newline="") as lines:
        rows = sorted((_seconds(row[_AZURE_COLUMNS[0]]), *(int(row[name]) for name in _AZURE_COLUMNS[1:])) for row in csv.DictReader(lines))
    begin_s = rows[0][0] if rows else 0.0
    return [TraceRequest(at_s - begin_s, max(1, prompt), max(1, output)) for at_s, prompt, output in rows]


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp[:_DIGITS_OF_A_MICROSECOND]).replace(tzinfo=datetime.UTC).timestamp()


def _mooncake(path: Path, seed: int) -> list[TraceRequest]:
    """Its times are rounded to 3 s, so the requests of one instant are spread over the gap to the next."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    generator = random.Random(seed)
    stamps = sorted({row["timestamp"] for row in rows})
    gap_after = {stamp: after - stamp for stamp, after in itertools.pairwise(stamps)}
    spread = sorted(
        ((row["timestamp"] + generator.random() * gap_after.get(row["timestamp"], 0)) * _MILLISECOND_S, index)
        for index, row in enumerate(rows)
    )
    begin_s = spread[0][0] if spread else 0.0
    return [
        TraceRequest(at_s - begin_s, max(1, rows[i]["input_length"]), max(1, rows[i]["output_length"]), tuple(rows[i]["hash_ids"]))
        for at_s, i in spread
    ]


def _synthetic(seed: int, count: int) -> list[TraceRequest]:
    """Poisson arrivals, log-normal lengths."""
    generator = random.Random(seed)
    at_s, rows = 0.0, list[TraceRequest]()
    for _ in range(count):
        at_s += generator.expovariate(_SYNTHETIC_RATE)
        prompt = min(16_000, max(1, round(generator.lognormvariate(6.8, 0.8))))
        output = min(2_000, max(1, round(generator.lognormvariate(5.0, 0.85))))
        rows.append(TraceRequest(at_s, prompt, output))
    return rows
