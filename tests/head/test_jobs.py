"""Jobs as their users submit them: a batch that was killed and goes on, and a pool that another job scales."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.head import Head
from tests.support.pages import Block, Reader, blocks

LINES = 40

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def shown() -> list[Block]:
    """What the page of jobs shows."""
    batch, launch, scale = [block for block in blocks("docs/jobs.md") if block.is_run]
    return [batch, launch, scale]


def test_a_batch_goes_on_after_a_kill_in_order_and_once_each(head: Head, shown: list[Block], tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"id": number, "prompt": f"prompt {number} "}) for number in range(LINES)]
    rows[7], rows[9] = "{not json", json.dumps({"id": 9})
    source.write_text("\n".join(rows) + "\n")
    # a job that was killed left whole lines and a torn one
    first = [{**json.loads(row), "text": "from the run before", "finish_reason": "length"} for row in rows[:5]]
    target.write_text("".join(json.dumps(row) + "\n" for row in first) + '{"id": 5, "pro')
    with Reader(head, {"/tmp/in.jsonl": str(source), "/tmp/out.jsonl": str(target)}) as reader:
        said = reader.run(shown[0])
    assert f"5 of {LINES} lines are there already" in said
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(found) == LINES
    assert found[:5] == first, "what was there is not computed again"
    assert "JSONDecodeError" in found[7]["error"]
    assert "prompt" in found[9]["error"]
    for number in set(range(5, LINES)) - {7, 9}:
        assert (found[number]["id"], found[number]["finish_reason"]) == (number, "length")
        assert found[number]["text"].startswith(f"prompt {number} ")
    again = head.run(sys.executable, "examples/job_batch.py", str(source), str(target))
    assert (again.returncode, again.stdout) == (0, f"{LINES} of {LINES} lines are there already\n"), again.stderr


def test_another_job_scales_a_pool(head: Head, shown: list[Block]) -> None:
    with Reader(head, {}) as reader:
        reader.run(shown[1])
        said = reader.run(shown[2])
    assert "ranks [0] -> [0, 1] (reserve" in said
    assert "killed actor shared/controller" in said
    refused = head.run(sys.executable, "examples/job_scale.py", "no-such-pool", "2")
    assert refused.returncode == 1
    assert "no-such-pool" in refused.stderr
