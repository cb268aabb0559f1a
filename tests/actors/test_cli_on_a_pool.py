"""The commands that operate a running pool, in this process, on the session's cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from raycore.cli import run
from raycore.exit_codes import ExitCode
from tests.actors.pools import PoolMaker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.ray
LIMIT_S = 60.0


@pytest.fixture
def address(cluster: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the commands find the cluster; they are connected already, and leave it as it is."""
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    return cluster


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0, capfd.readouterr().err
    return capfd.readouterr().out


def as_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(said(capfd, *arguments, "--json"))


def test_a_pool_is_operated_from_the_command_line(address: str, pools: PoolMaker, capfd: pytest.CaptureFixture[str]) -> None:
    import asyncio

    asyncio.run(pools.open("operated"))
    try:
        assert said(capfd, "pause", "operated", "--mode", "keep") == "pool 'operated' is paused (ranks 0, 1)\n"
        assert as_json(capfd, "resume", "operated") == {
            "pool": "operated",
            "operation": "resume_scheduler",
            "ranks": [0, 1],
            "result": None,
        }
        assert run(["sleep", "operated"]) == 1, "the echo engine has no weights to let go of"
        assert "level 0 only pauses" in capfd.readouterr().err
        assert "sleeps (level 0)" in said(capfd, "sleep", "operated", "--level", "0")
        assert "is awake" in said(capfd, "wake-up", "operated")
        assert "a dry run" in said(capfd, "autoscale", "operated", "--max", "3", "--options", '{"requests_per_rank": 4}')
        assert as_json(capfd, "status", "operated")["autoscaling"]["settings"]["bounds"]["max_ranks"] == 3
        assert "autoscaling (dry run)" in said(capfd, "status", "operated")
        assert "by hand" in said(capfd, "autoscale", "operated", "--off")
        findings = {row["name"]: row for row in as_json(capfd, "doctor")}
        assert findings["pool operated"]["found"] == "runs"
        assert "CPU free" in findings["ray cluster"]["found"]
        assert run(["pause", "no-such-pool"]) == ExitCode.NOT_FOUND
        assert "no-such-pool" in capfd.readouterr().err
        assert as_json(capfd, "autoscale", "operated", "--max", "3")["autoscaling"]["dry_run"]
        assert run(["cancel-scaling", "operated"]) == ExitCode.FAILED
        assert "none was begun" in capfd.readouterr().err
        assert as_json(capfd, "scale", "operated", "2")["ranks"] == [0, 1]
        assert run(["remove-ranks", "operated", "7"]) == ExitCode.NOT_FOUND
        assert "ranks [7] do not serve" in capfd.readouterr().err
        assert as_json(capfd, "cleanup", "no-such-pool")["actors"] == []
        assert "nothing was left" in said(capfd, "cleanup", "no-such-pool")
    finally:
        asyncio.run(pools.close())


def load_actors() -> list[str]:
    """States of the client processes of a load that live."""
    from ray._private import state

    return [row["State"] for row in state.actors().values() if row["ActorClassName"] == "LoadActor" and row["State"] != "DEAD"]


def test_an_interrupted_bench_leaves_neither_clients_nor_pool(cluster: str) -> None:
    arguments = ("bench", "serve", "--clients", "2", "--engine-options", '{"base_s": 0.5}', "--rate-scale", "0.01")
    code = "import sys; from raycore.cli import run; sys.exit(run(sys.argv[1:]))"
    environment = {**os.environ, "RAY_ADDRESS": cluster}
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: load_actors() == ["ALIVE"] * 2 or process.poll() is not None, "two clients send", LIMIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == ExitCode.INTERRUPTED, errors
    assert "Traceback" not in errors
    wait_until(lambda: not load_actors(), "the clients are gone", LIMIT_S)
