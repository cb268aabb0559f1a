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
def test_two_engines_that_are_no_language_model() -> None:
    rows = run("automaton.py").splitlines()
    assert [len(row) for row in rows] == [41] * 16
    assert (rows[0].strip(), rows[-1].strip()) == ("█ █", "█" + " " * 31 + "█")


@pytest.mark.ray
def test_a_client_actor_streams_to_whoever_has_its_handle() -> None:
    lines = run("client_actor.py").splitlines()
    assert lines == ["Hello through an actor. " * 2, "And from a Ray task too.", "paused: True"]


@pytest.mark.ray
def test_a_router_of_ones_own_says_why() -> None:
    *own, default = run("router.py").splitlines()
    assert own == [
        "a went to rank 0 by LongPromptsApart: rank 0 had 0, rank 1 had 0",
        "b went to rank 1 by LongPromptsApart: rank 1 had 0, rank 0 had 1",
        "c went to rank 2 by LongPromptsApart: rank 2 had 0",
        "d went to rank 0 by LongPromptsApart: rank 0 had 1, rank 1 had 1",
    ]
    assert default.startswith("e went to rank ")
    assert default.count("; rank ") == 2
    assert "by 'work': rank " in default


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_two_engine_cores_share_the_experts_of_a_model(tmp_path: Path) -> None:
    from raycore.engines.torch.loading import find_smollm2
    from raycore.engines.torch.upcycle import upcycle
    from raycore.tokenizer import load_tokenizer
    from tests.torch_engine.tiny import save_llama

    tokenizer = load_tokenizer(str(find_smollm2()))
    tokenizer.save(save_llama(tmp_path / "dense", vocab_size=tokenizer.vocab_size))
    upcycle(str(tmp_path / "dense"), str(tmp_path / "moe"))
    *texts, first, second, report = run("experts.py", str(tmp_path / "moe")).splitlines()
    assert {text[:8] for text in texts} == {"[rank 0]", "[rank 1]"}
    for rank, line in enumerate((first, second)):
        assert line.startswith(f"tokens of rank {rank} by expert of the first layer: [")
    assert "experts moved, and the busiest rank has" in report


@pytest.mark.ray
@pytest.mark.model
@pytest.mark.timeout(300)
def test_two_engine_cores_stream_chats() -> None:
    lines = run("stream.py").splitlines()
    france = [line for line in lines if "capital of France" in line]
    assert "".join(line.split(" … ")[1].strip("'") for line in france) == "The capital of France is Paris."
    assert {line.split("]")[0] for line in lines} == {"[rank 0", "[rank 1"}
