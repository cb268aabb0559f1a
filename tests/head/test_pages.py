"""What the documentation shows is run: the blocks of README, operations, serving and autoscaling here, those of jobs in `test_jobs`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.head import Head, free_ports, raycore
from tests.support.pages import LIMIT_S, Reader, blocks
from tests.support.waiting import wait_until

PAGES = ("README.md", "docs/autoscaling.md", "docs/jobs.md", "docs/operations.md", "docs/serving.md")


@pytest.mark.parametrize("page", PAGES)
def test_each_block_of_a_page_says_what_it_is(page: str) -> None:
    found = blocks(page)
    assert any(block.is_run for block in found)
    assert [str(block) for block in found if block.language not in {"python", "sh", "mermaid", "text"}] == []


@pytest.fixture
def chat(head: Head) -> Iterator[None]:
    """A running pool `chat`, as the pages call it."""
    launch = "import raycore\nwith raycore.launch(engine='echo', pool='chat', lifetime='detached'): pass"
    assert head.run(sys.executable, "-c", launch).returncode == 0
    yield
    assert raycore(head, "cleanup", "chat").returncode == 0


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_readme_runs(head: Head) -> None:
    with Reader(head, {'engine="torch", model="path/to/checkpoint"': 'engine="echo"'}) as reader:
        (said,) = [reader.run(block) for block in blocks("README.md") if block.is_run]
    assert said == "The capital of F(0, 1) False\n"


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("chat")
def test_the_page_of_autoscaling_runs(head: Head) -> None:
    with Reader(head, {}) as reader:
        commands, policy, nodes = [reader.run(block) for block in blocks("docs/autoscaling.md") if block.is_run]
    for words in ("a dry run", "autoscaling (dry run)", "scales itself", "by hand"):
        assert words in commands
    assert policy == ""
    assert nodes == "(0, 1)\n"


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_page_of_operations_runs(head: Head, tmp_path: Path) -> None:
    dashboard = tmp_path / "dashboard.json"
    with Reader(head, {"raycore-dashboard.json": str(dashboard)}) as reader:
        for block in blocks("docs/operations.md"):
            if block.is_run:
                reader.run(block)
    assert json.loads(dashboard.read_text())["panels"]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_page_of_serving_runs(head: Head) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    instead = {"raycore serve": f"raycore serve --engine echo --direct --port {port}", "http://127.0.0.1:8000": url}
    with Reader(head, {**instead, "openai_client.py": f"openai_client.py {url}"}) as reader:
        serve, ask = [block for block in blocks("docs/serving.md") if block.is_run]
        reader.run(serve)
        healthy = f"curl -sf --max-time 5 {url}/health"
        wait_until(lambda: head.run("bash", "-c", healthy).returncode == 0, "the front is healthy", LIMIT_S)
        said = reader.run(ask)
    assert '"delta":{"role":"assistant"' in said.replace(" ", "")
    assert "data: [DONE]" in said
    assert "(length)" in said
