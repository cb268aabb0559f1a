"""The command line on real pools, each run in a process of its own as a user would have it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RAYCORE = [sys.executable, "-c", "import sys; from raycore.cli import run; sys.exit(run(sys.argv[1:]))"]
LIMIT_S = 110


def raycore(*arguments: str, limit_s: float = LIMIT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RAYCORE, *arguments], capture_output=True, text=True, timeout=limit_s, check=False)


@pytest.mark.ray
def test_generate_answers_on_several_engine_cores() -> None:
    done = raycore("generate", "one ", "two ", "--engine", "echo", "--data-parallel-size", "2", "--max-tokens", "10", "--json")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["one one on", "two two tw"]
    assert {row["rank"] for row in rows} == {0, 1}


@pytest.mark.ray
def test_a_wrong_option_of_an_engine_is_one_line() -> None:
    done = raycore("generate", "one", "--engine", "ecco")
    assert done.returncode in {1, 2}
    assert "ecco" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_a_model_that_is_not_there_is_named() -> None:
    done = raycore("generate", "one", "--model", "/no/such/model", "--raw")
    assert done.returncode in {1, 2}
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_demo_grows_and_shrinks_while_it_answers(tmp_path: Path) -> None:
    plot = tmp_path / "timeline.png"
    done = raycore("demo", "--plot", str(plot), limit_s=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "3 ranks served, 2 → 3 → 2 while they streamed" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
@pytest.mark.parametrize("started", ["GCS", "controller", "engine"])
def test_an_interrupt_while_the_pool_starts_exits_with_130_and_leaves_nothing(started: str) -> None:
    patterns = {"GCS": "gcs_server", "controller": "ray::ControllerActor", "engine": "ray::EngineActor"}
    arguments = [*RAYCORE, "generate", "one", "--engine", "echo"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_descendant(process, patterns[started])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not list(Path("/tmp").glob(f"raycore-*/generate*-{process.pid}.*"))


def wait_for_descendant(process: subprocess.Popen[str], words: str) -> None:
    """Wait until the process has a descendant whose command line holds `words`; or has ended."""
    until_s = time.monotonic() + LIMIT_S
    parent = psutil.Process(process.pid)
    while process.poll() is None and time.monotonic() < until_s:
        for child in parent.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if words in " ".join(child.cmdline()):
                    return
        time.sleep(0.01)
    pytest.fail(f"no {words} was started")


@pytest.mark.ray
@pytest.mark.model
@pytest.mark.timeout(300)
def test_an_interrupt_while_it_answers_exits_with_130() -> None:
    arguments = [*RAYCORE, "generate", "Count to a thousand: 1, 2, 3,", "--raw", "--max-tokens", "2000"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
