"""The command line: `raycore demo`, `generate`, `status`, `cleanup`. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from raycore.errors import ConfigurationError, InvalidRequestError, PoolError, RaycoreError
from raycore.sampling import SamplingParams, validate_sampling

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Inference engine cores as Ray actors, orchestrated as one fleet.", no_args_is_help=True, pretty_exceptions_enable=False
)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    # Loading a GGUF file draws bars through tqdm itself, in every engine, over what we print; a local Ray's processes inherit this.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app(args=list(arguments), prog_name="raycore")  # ends with SystemExit, 130 after Ctrl-C; only our own errors come through
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except (ConfigurationError, InvalidRequestError) as error:
        return _complain(error, WRONG_USAGE)
    except RaycoreError as error:
        return _complain(error, FAILED)
    return 0


def _complain(error: RaycoreError, code: int) -> int:
    line = " ".join(str(error).split())
    Console(stderr=True).print(f"raycore: {line}", markup=False, highlight=False, soft_wrap=True)
    return code


@app.command()
def demo() -> None:
    """Let a small real model on two engine cores answer six prompts at once, and check the answers."""
    from raycore.demo import run_demo

    run_demo(Console())


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Asked all at once.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint directory or GGUF file; the packaged SmolLM2 by default.")] = None,
    engine: Annotated[str, typer.Option(help="echo, torch, or module:function.")] = "torch",
    data_parallel_size: Annotated[int, typer.Option(help="Engine cores.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given more than once.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help="Through the model's chat template, or as it is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Answer PROMPTs of your own."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, stop=tuple(stop or ()))
    validate_sampling(sampling)
    if engine == "torch" and model is None:
        from raycore.demo import default_model

        model = default_model()
    config: dict[str, Any] = {"engine": engine, "model": model, "data_parallel_size": data_parallel_size, "device": device}
    if engine == "torch" and device == "cpu" and data_parallel_size > 1:
        # Engines that each take every core wait for each other.
        config["engine_options"] = {"threads": max(1, (os.cpu_count() or 1) // data_parallel_size)}
    asyncio.run(_generate(prompts, config, sampling, is_chat=engine == "torch" if chat is None else chat, as_json=as_json))


async def _generate(prompts: list[str], config: dict[str, Any], sampling: SamplingParams, *, is_chat: bool, as_json: bool) -> None:
    from raycore import api
    from raycore.answers import Answer, ask_all
    from raycore.terminal import AnswerView
    from raycore.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config["model"]) if is_chat else None
    answers = [Answer(prompt) for prompt in prompts]
    console = Console()
    async with api.launch(pool=f"generate-{os.getpid()}", **config) as client:
        if as_json or len(prompts) == 1:
            show = (lambda _answer: None) if as_json else _Printer(console)
            await ask_all(client, answers, sampling, chat=tokenizer, on_news=show)
        else:
            with AnswerView(console, answers, max_tokens=sampling.max_tokens) as view:
                await ask_all(client, answers, sampling, chat=tokenizer, on_news=view.show)
    if as_json:
        for answer in answers:
            typer.echo(msgspec.json.encode(_for_machines(answer)).decode())


class _Printer:
    """Prints one answer as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = 0

    def __call__(self, answer: Any) -> None:
        end = "" if answer.finish_reason is None else "\n"
        self._console.print(answer.text[self._printed :], end=end, markup=False, highlight=False, soft_wrap=True)
        self._printed = len(answer.text)


def _for_machines(answer: Any) -> dict[str, Any]:
    names = ("prompt", "text", "token_ids", "finish_reason", "stop_reason", "rank", "prompt_tokens")
    return {name: getattr(answer, name) for name in names}


@app.command()
def status(pool: str, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show a running POOL's members and loads."""
    from raycore import api
    from raycore.terminal import status_table

    found = api.pool_status(pool)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    else:
        Console().print(status_table(found))


@app.command()
def cleanup(pool: str) -> None:
    """Remove what a killed driver left of POOL: actors, placement groups, socket and memory files."""
    from raycore import api

    report = api.cleanup(pool)
    removed = [f"actor {name}" for name in report.actors] + [f"placement group {name}" for name in report.placement_groups]
    removed += [
        f"{count} {what}"
        for count, what in ((report.socket_directories, "socket directories"), (report.shared_memory_files, "memory files"))
        if count
    ]
    for line in removed:
        typer.echo(f"removed {line}")
    if report.lingering_pids:
        raise PoolError(f"processes that did not end: {', '.join(map(str, report.lingering_pids))}")
    if not removed:
        typer.echo(f"pool {pool!r} had left nothing")
