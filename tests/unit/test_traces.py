"""Traces: both public formats, the synthetic one, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raycore.errors import ConfigurationError
from raycore.traces import load_trace, percentiles


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    rows = ["2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,0", "2023-11-16 18:15:48.6805900,1,7"]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]), encoding="utf-8")
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": at, "input_length": 600, "output_length": 5, "hash_ids": [7, at]} for at in (0, 0, 0, 3000, 3000, 6000)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_azures_rows_come_in_order_of_time_and_have_at_least_one_token(azure: Path) -> None:
    rows = load_trace(azure)
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(374, 44), (1, 7), (396, 1)]
    assert [round(row.arrival_s, 3) for row in rows] == [0.0, 2.0, 4.315]


def test_mooncakes_rounded_times_are_spread_and_its_blocks_kept(mooncake: Path) -> None:
    rows = load_trace(mooncake, seed=3)
    times = [row.arrival_s for row in rows]
    assert times == sorted(times)
    assert len(set(times)) == 6
    assert times[0] == 0.0
    assert {row.blocks for row in rows} == {(7, 0), (7, 3000), (7, 6000)}
    assert rows == load_trace(mooncake, seed=3)
    assert rows != load_trace(mooncake, seed=4)


def test_a_scale_makes_time_pass_faster_and_a_count_ends_early(azure: Path) -> None:
    rows = load_trace(azure, rate_scale=2.0, requests=2)
    assert [round(row.arrival_s, 3) for row in rows] == [0.0, 1.0]


def test_a_seed_decides_the_synthetic_trace() -> None:
    rows = load_trace(None, seed=1, requests=500)
    assert len(rows) == 500
    assert rows == load_trace(None, seed=1, requests=500)
    assert rows != load_trace(None, seed=2, requests=500)
    assert rows[:100] == load_trace(None, seed=1, requests=100)


@pytest.mark.parametrize("text", ["no such column\n1\n", '{"timestamp": 1}\n'])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_is_no_trace_is_named(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"nothing{suffix}"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError, match="nothing"):
        load_trace(path)
    with pytest.raises(ConfigurationError, match="missing"):
        load_trace(tmp_path / f"missing{suffix}")


def test_a_scale_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="rate scale"):
        load_trace(None, rate_scale=0)


def test_percentiles_of_a_hundred_and_of_none() -> None:
    assert percentiles(range(101)) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([]) == {}
