"""The examples run as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=280, check=False, cwd=EXAMPLES.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_engine_in_this_process() -> None:
    assert run("in_process.py").strip() == ("Hello from one process. " * 2).strip()


@pytest.mark.ray
@pytest.mark.model
@pytest.mark.timeout(300)
def test_two_engine_cores_stream_chats() -> None:
    lines = run("stream.py").splitlines()
    france = [line for line in lines if "capital of France" in line]
    assert "".join(line.split(" … ")[1].strip("'") for line in france) == "The capital of France is Paris."
    assert {line.split("]")[0] for line in lines} == {"[rank 0", "[rank 1"}
