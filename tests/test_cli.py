"""The command line's manners: exit codes, one line for an error, and what it prints of answers."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from raycore import api, cli
from raycore.answers import Answer, summarise
from raycore.cli_bench import bench_app
from raycore.client.journal import RequestOutput
from raycore.client.logprobs import TokenLogprob
from raycore.errors import CallTimeoutError, CapacityError, DeadlineError, PoolNotFoundError, RaycoreError, ScalingBusyError
from raycore.exit_codes import MEANINGS, ExitCode, exit_code
from raycore.ids import RequestId
from raycore.sampling import SamplingParams
from raycore.terminal import AnswerView, rank_table, status_table


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate"],
        ["generate", "hello", "--max-tokens", "many"],
        ["generate", "hello", "--no-such-option"],
        ["no-such-command"],
        ["status"],
        ["generate", "hello", "--engine", "echo", "--top-p", "2"],
        ["generate", "hello", "--engine", "echo", "--temperature", "-1"],
        ["generate", "hello", "--engine", "echo", "--seed", "-3"],
        ["generate", "hello", "--engine", "echo", "--min-p", "1.5"],
        ["generate", "hello", "--engine", "echo", "--repetition-penalty", "0"],
        ["generate", "hello", "--engine", "echo", "--presence-penalty", "3"],
        ["generate", "hello", "--engine", "echo", "--frequency-penalty", "-3"],
        ["generate", "hello", "--engine", "echo", "--n", "2"],
        ["generate", "hello", "--engine", "echo", "--logprobs", "1"],
    ],
)
def test_wrong_usage_exits_with_2_and_no_traceback(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err + shown.out
    assert shown.err.strip()


def test_an_error_of_ours_is_one_line_and_has_a_code(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_pool: str) -> Any:
        raise PoolNotFoundError("no pool is called\n'nobody'")

    monkeypatch.setattr(api, "pool_status", fail)
    assert cli.run(["status", "nobody"]) == ExitCode.NOT_FOUND
    assert capfd.readouterr().err == "raycore: no pool is called 'nobody'\n"


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_pool: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "pool_status", interrupt)
    assert cli.run(["status", "nobody"]) == 130


@pytest.mark.parametrize(
    ("command", "what"), [(["scale", "busy", "3"], "scale_elastic_ep"), (["remove-ranks", "busy", "1"], "remove_ranks")]
)
def test_an_interrupted_scaling_says_that_it_goes_on(
    command: list[str], what: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_pool: str, _argument: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, what, interrupt)
    assert cli.run(command) == 130
    shown = capfd.readouterr().err
    assert "goes on" in shown
    assert "raycore status busy" in shown
    assert "raycore cancel-scaling busy" in shown


COMMANDS = dict(typer.main.get_group(cli.app).commands)
BENCH = typer.main.get_group(bench_app).commands


def test_there_are_the_commands_that_users_look_for() -> None:
    wanted = "demo generate serve status scale remove-ranks autoscale cancel-scaling pause resume sleep wake-up bench cleanup doctor"
    assert set(wanted.split()) <= set(COMMANDS)


def test_help_names_every_command_and_what_exit_codes_mean() -> None:
    shown = CliRunner().invoke(cli.app, ["--help"])
    assert shown.exit_code == 0
    for command in COMMANDS:
        assert command in shown.output
    words = " ".join(shown.output.split())
    for code in ExitCode:
        assert f"{code.value} {MEANINGS[code]}" in words


@pytest.mark.parametrize("command", [*(name for name in COMMANDS if name != "bench"), *(f"bench {name}" for name in BENCH)])
def test_the_help_of_each_command_has_examples_that_it_takes_and_each_prints_json(command: str) -> None:
    words = command.split()
    found = BENCH[words[1]] if words[0] == "bench" else COMMANDS[command]
    assert any("--json" in option.opts for option in found.params)
    title, *lines = (found.epilog or "").split("\n\n")
    assert title == "Examples:"
    assert any(f"raycore {command}" in line for line in lines)
    for line in lines:
        name, *arguments = shlex.split(line.split("raycore ", 1)[1])
        own = found if words[0] == "bench" else COMMANDS[name]
        own.make_context(name, arguments[1:] if words[0] == "bench" else arguments)  # raises on what the command does not know


def test_an_error_ends_with_the_code_of_its_kind() -> None:
    assert exit_code(RaycoreError("x")) == ExitCode.FAILED
    assert exit_code(ScalingBusyError("x", operation="o", phase="spawn")) == ExitCode.NOT_NOW
    assert exit_code(CallTimeoutError("x")) == exit_code(DeadlineError("x")) == ExitCode.TOO_LATE


def test_help_imports_neither_ray_nor_torch() -> None:
    code = "import sys; from raycore.cli import run; run(['--help']); sys.exit(len({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0


class FakeClient:
    """Echoes each prompt in two outputs, on alternating ranks."""

    def __init__(self) -> None:
        self.asked = 0

    async def __aenter__(self) -> FakeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def generate(self, prompt: str, sampling: SamplingParams, *, detokenize: bool) -> Any:
        assert detokenize
        rank = self.asked % 2
        self.asked += 1
        half = len(prompt) // 2
        for index in range(sampling.n):
            for text, reason in ((prompt[:half], None), (prompt[half:], "length")):
                logprobs = [TokenLogprob(byte, -0.5, 1, [], []) for byte in text.encode()] if sampling.logprobs is not None else None
                ids = list(text.encode())
                yield RequestOutput(RequestId("r"), ids, text, reason, None, rank, len(prompt), logprobs=logprobs, index=index)


@pytest.fixture
def fake_pool(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def launch(**config: Any) -> FakeClient:
        seen.update(config)
        return FakeClient()

    monkeypatch.setattr(api, "launch", launch)
    return seen


def test_generate_prints_one_answer_as_it_comes(fake_pool: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "two [halves]", "--engine", "echo", "--data-parallel-size", "3"]) == 0
    assert capsys.readouterr().out == "two [halves]\n"
    assert fake_pool["data_parallel_size"] == 3


def test_generate_prints_a_line_for_each_of_several(fake_pool: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "one", "two", "--engine", "echo"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["rank 0 | one | one", "rank 1 | two | two"]


def test_generate_prints_json_for_machines(fake_pool: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", "one", "zwölf", "--engine", "echo", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["one", "zwölf"]
    assert rows[0]["token_ids"] == list(b"one")
    assert rows[0]["finish_reason"] == "length"


def test_generate_gives_n_answers_with_log_probabilities(fake_pool: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--engine", "echo", "--json", "--n", "2", "--temperature", "0.5", "--logprobs", "0"]
    assert cli.run(["generate", "one", "two", *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["index"], row["text"]) for row in rows] == [(p, i, p) for p in ("one", "two") for i in range(2)]
    assert [entry["token_id"] for entry in rows[0]["logprobs"]] == list(b"one")


def test_generate_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def launch(**_config: Any) -> FakeClient:
        raise CapacityError("2 GPUs are missing on node a")

    monkeypatch.setattr(api, "launch", launch)
    assert cli.run(["generate", "one", "--engine", "echo"]) == ExitCode.NO_CAPACITY
    assert capfd.readouterr().err == "raycore: 2 GPUs are missing on node a\n"


def finished(prompt: str, rank: int, *, tokens: int, first_token_s: float, ended_s: float) -> Answer:
    return Answer(prompt, "text " * 80, [1] * tokens, rank, 7, "length", None, 0.0, first_token_s, ended_s)


def test_a_rank_is_summed_up_over_its_requests() -> None:
    rows = summarise(
        [
            finished("a", 1, tokens=10, first_token_s=0.1, ended_s=1.0),
            finished("b", 1, tokens=30, first_token_s=0.3, ended_s=2.0),
            finished("c", 0, tokens=5, first_token_s=0.2, ended_s=1.0),
        ]
    )
    assert [(r.rank, r.requests, r.prompt_tokens, r.output_tokens) for r in rows] == [(0, 1, 7, 5), (1, 2, 14, 40)]
    assert rows[1].tokens_per_s == 20.0


def test_tables_and_panels_can_be_drawn() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150)
    answers = [finished("one question", 0, tokens=9, first_token_s=0.1, ended_s=1.0), Answer("another [question]")]
    with AnswerView(console, answers, max_tokens=20) as view:
        view.show(answers[0])
    console.print(rank_table(summarise(answers[:1])))
    member = {
        "rank": 0,
        "incarnation": "ab",
        "pid": 7,
        "step": None,
        "load": None,
        "is_sleeping": True,
        "memory": {"weights_bytes": 5_000_000},
        "cache": {"prefix_hit_rate": 0.25},
    }
    gone = [{"rank": 1, "incarnation": "cd", "cause": "killed"}]
    spare = [{"pid": 77, "state": "warm", "problem": ""}, {"pid": 0, "state": "missing", "problem": "cluster is full"}]
    console.print(
        status_table({"pool": "p", "lifetime": "scoped", "epoch": 1, "term": 1, "members": [member], "departed": gone, "standbys": spare})
    )
    for words in (
        "one question",
        "another [question]",
        "waiting",
        "rank 0",
        "tokens/s",
        "killed",
        "asleep",
        "5.0 MB",
        "25%",
        "standby",
        "77",
        "missing",
    ):
        assert words in out.getvalue()
