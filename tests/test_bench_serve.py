"""`raycore bench serve` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raycore import cli
from tests.test_cli_runs import raycore


@pytest.mark.ray
def test_a_trace_is_replayed_by_several_clients_against_a_pool_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    options = json.dumps({"base_s": 0.002})
    done = raycore(
        *("bench", "serve", "--engine", "echo", "--data-parallel-size", "2", "--engine-options", options),
        *("--requests", "60", "--rate-scale", "20", "--clients", "2", "--seed", "5", "--json", str(path)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text(encoding="utf-8"))
    assert (report["completed"], report["lost"], report["clients"]) == (60, {}, 2)
    assert set(report["ttft_s"]) == {"p50", "p90", "p99"}
    assert sum(row["requests"] for row in report["ranks"].values()) == 60
    assert "first token" in done.stdout


@pytest.mark.ray
def test_lost_requests_are_told_and_end_in_failure() -> None:
    options = json.dumps({"base_s": 0.5})
    done = raycore("bench", "serve", "--engine-options", options, "--requests", "5", "--rate-scale", "50", "--drain", "0.5")
    assert done.returncode == 1
    assert "lost 5 requests" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--engine-options", "{"], ["--engine-options", "[]"], ["--trace", "/no/such/trace.csv"], ["--rate-scale", "0"]]
)
def test_wrong_usage_is_refused_before_anything_starts(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "serve", *arguments]) == 2
    assert "Traceback" not in capfd.readouterr().err
