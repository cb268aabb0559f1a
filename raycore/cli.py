"""The `raycore` command and its subcommands; `raycore/exit_codes.py` has what they end with."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from raycore import cli_observe, cli_operate, cli_scale
from raycore.cli_bench import bench_app
from raycore.cli_output import AsJson, examples, print_json
from raycore.config import API_KEY_VARIABLE
from raycore.console import error_console, working
from raycore.errors import ConfigurationError, PoolError, RaycoreError
from raycore.exit_codes import MEANINGS, ExitCode, exit_code
from raycore.sampling import SamplingParams, validate_sampling

_EXAMPLES = {
    "demo": examples("raycore demo", "raycore demo --no-scale --json"),
    "generate": examples(
        'raycore generate "Why is the sky blue?"',
        'raycore generate "The sea is" "The sky is" --model ./my-llama --raw --data-parallel-size 2',
        'raycore generate "Hello" --engine echo --json',
    ),
    "make-moe": examples(
        "raycore make-moe smol-moe",
        "raycore make-moe smol-moe-8 --experts 8 --seed 1",
        "raycore make-moe out --model ./my-llama --dtype bfloat16",
        'raycore generate "The sea is" --model smol-moe --data-parallel-size 2',
    ),
    "serve": examples(
        "raycore serve",
        "raycore serve ./my-llama --data-parallel-size 2 --device cuda",
        "raycore serve --engine echo --direct --port 9000",
        "RAYCORE_API_KEY=... raycore serve ./my-llama --replicas 2 --host 0.0.0.0",
    ),
    "status": examples("raycore status chat", "raycore status chat --watch 1", "raycore status chat --json"),
    "doctor": examples("raycore doctor", "raycore doctor --json"),
    "cleanup": examples("raycore cleanup chat"),
}

app = typer.Typer(
    help="Inference engine cores as Ray actors, orchestrated as one fleet.",
    epilog="Exit codes: " + ", ".join(f"{code.value} {meaning}" for code, meaning in MEANINGS.items()) + ".",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
cli_operate.register(app)
cli_observe.register(app)
cli_scale.register(app)


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
    except RaycoreError as error:
        line = " ".join(str(error).split())
        error_console().print(f"raycore: {line}", markup=False, highlight=False, soft_wrap=True)
        return exit_code(error)
    return ExitCode.DONE


@app.command(epilog=_EXAMPLES["demo"])
def demo(
    *,
    moe: Annotated[
        bool, typer.Option("--moe", help="A mixture of experts, spread over the ranks; made once, 1.5 GB in the user's cache.")
    ] = False,
    scales: Annotated[bool, typer.Option("--scale/--no-scale", help="Grow to more engine cores and back while the answers stream.")] = True,
    plot: Annotated[Path, typer.Option(help="Where the timeline goes.", metavar="PNG")] = Path("demo-timeline.png"),
    as_json: AsJson = False,
) -> None:
    """Let a small real model answer prompts while its pool grows and shrinks without a break, and check the answers."""
    from raycore.demo import run_demo

    report = run_demo(error_console() if as_json else Console(), is_mixture=moe, scales=scales, plot=plot)
    if as_json:
        print_json(report)


@app.command(epilog=_EXAMPLES["generate"])
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
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="On tokens of prompt and answer; 1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="On tokens of the answer, -2 to 2; 0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time that they came.")] = 0.0,
    n: Annotated[int, typer.Option("--n", help="Answers to each prompt; more than one needs a temperature.")] = 1,
    logprobs: Annotated[int | None, typer.Option(help="With --json: each token's log probability, and of so many likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given more than once.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--raw", help="Through the model's chat template, or as it is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Answer PROMPTs of your own."""
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        n=n,
        logprobs=logprobs,
    )
    validate_sampling(sampling)
    if logprobs is not None and not as_json:
        raise ConfigurationError("--logprobs needs --json")
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
    from raycore.answers import answers_to, ask_all
    from raycore.terminal import AnswerView
    from raycore.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config["model"]) if is_chat else None
    answers = answers_to(prompts, sampling.n)
    console = Console()
    async with api.launch(pool=f"generate-{os.getpid()}", **config) as client:
        if as_json or len(answers) == 1:
            show = (lambda _answer: None) if as_json else _Printer(console)
            await ask_all(client, answers, sampling, chat=tokenizer, on_news=show)
        else:
            with AnswerView(console, answers, max_tokens=sampling.max_tokens) as view:
                await ask_all(client, answers, sampling, chat=tokenizer, on_news=view.show)
    if as_json:
        for answer in answers:
            print_json(_for_machines(answer, sampling))


class _Printer:
    """Prints one answer as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed = 0

    def __call__(self, answer: Any) -> None:
        end = "" if answer.finish_reason is None else "\n"
        self._console.print(answer.text[self._printed :], end=end, markup=False, highlight=False, soft_wrap=True)
        self._printed = len(answer.text)


def _for_machines(answer: Any, sampling: SamplingParams) -> dict[str, Any]:
    names = ["prompt", "text", "token_ids", "finish_reason", "stop_reason", "rank", "prompt_tokens"]
    names += ["index"] if sampling.n > 1 else []
    names += ["logprobs"] if sampling.logprobs is not None else []
    return {name: getattr(answer, name) for name in names}


@app.command("make-moe", epilog=_EXAMPLES["make-moe"])
def make_moe(
    target: Annotated[str, typer.Argument(help="New directory for the checkpoint.")],
    model: Annotated[str | None, typer.Option(help="Dense checkpoint directory or GGUF file; the packaged SmolLM2 by default.")] = None,
    experts: Annotated[int, typer.Option(help="Experts of each layer.")] = 4,
    experts_per_token: Annotated[int, typer.Option(help="How many of them compute each token.")] = 2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; texts equal the dense model's in float32.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Make a mixture of experts of a dense Llama-like model, which answers as the dense one does: for trying expert parallelism."""
    from rich.progress import Progress

    from raycore.engines.torch.upcycle import MoeRecipe, upcycle

    if model is None:
        from raycore.demo import default_model

        model = default_model()
    recipe = MoeRecipe(experts=experts, experts_per_token=experts_per_token, seed=seed, dtype=dtype)
    with Progress(console=error_console(), transient=True) as progress:
        task = progress.add_task("layers", total=None)
        report = upcycle(model, target, recipe, on_layer=lambda done, layers: progress.update(task, completed=done, total=layers))
    if as_json:
        print_json(report)
        return
    size = f"{report.parameters / 1e6:.0f} M parameters, {report.size_bytes / 1e9:.1f} GB"
    typer.echo(f"{report.path}: {report.layers} layers of {report.experts} experts, {size}")


@app.command(epilog=_EXAMPLES["serve"])
def serve(
    model: Annotated[str | None, typer.Argument(help="Checkpoint directory or GGUF file; the packaged SmolLM2 by default.")] = None,
    engine: Annotated[str, typer.Option(help="echo, torch, or module:function.")] = "torch",
    data_parallel_size: Annotated[int, typer.Option(help="Engine cores.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    engine_options: Annotated[str, typer.Option(metavar="JSON", help="The engine's own options.")] = "{}",
    pool: Annotated[str, typer.Option(help="Name of the pool; one that runs already is used and left running.")] = "default",
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the model; else its path's last part.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="HTTP fronts of the pool.")] = 1,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    direct: Annotated[bool, typer.Option("--direct", help="One front in this process, without Ray Serve.")] = False,
    haproxy: Annotated[bool, typer.Option("--haproxy", help="HAProxy before Serve's replicas: far less added to each token.")] = False,
    keep_pool: Annotated[bool, typer.Option("--keep-pool", help="Leave the pool running at the end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Where it is served, as JSON, once it is.")] = False,
) -> None:
    """Serve a pool over HTTP as OpenAI's API until Ctrl-C. RAYCORE_API_KEY holds the key; without one, administration is closed."""
    from raycore import api
    from raycore.cli_bench import parsed_options

    if engine == "torch" and model is None:
        from raycore.demo import default_model

        model = default_model()
        served_model_name = served_model_name or "smollm2-135m-instruct"
    args: dict[str, Any] = {
        "engine": engine,
        "model": model,
        "data_parallel_size": data_parallel_size,
        "device": device,
        "engine_options": parsed_options(engine_options),
        "pool": pool,
        "served_model_name": served_model_name,
        "num_replicas": replicas,
    }
    if engine == "torch" and device == "cpu" and data_parallel_size > 1:
        # Engines that each take every core wait for each other.
        args["engine_options"].setdefault("threads", max(1, (os.cpu_count() or 1) // data_parallel_size))
    err = error_console()
    if not os.environ.get(API_KEY_VARIABLE) and host not in {"127.0.0.1", "::1", "localhost"}:
        err.print(f"raycore: anybody who reaches {host} may use this server: {API_KEY_VARIABLE} is not set", highlight=False)

    served_at: list[str] = []
    name = served_model_name or model or engine
    sign = working(f"starting pool {pool!r} and what serves it")

    def say(url: str) -> None:
        sign.stop()
        served_at.append(url)
        err.print(f"serving {name} at {url}/v1 (Ctrl-C ends it)", markup=False, highlight=False, soft_wrap=True)
        if as_json:
            print_json({"url": url, "pool": pool, "model": name})

    try:
        with sign:
            api.serve(args, host=host, port=port, is_direct=direct, haproxy=haproxy, keep_pool=keep_pool, on_ready=say)
    except KeyboardInterrupt:
        if not served_at:
            raise


@app.command(epilog=_EXAMPLES["status"])
def status(
    pool: str,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON; with --watch a line for each look.")] = False,
    watch_s: Annotated[float | None, typer.Option("--watch", min=0.1, metavar="SECONDS", help="Again and again, until Ctrl-C.")] = None,
) -> None:
    """Show a running POOL's members, loads and operations."""
    while True:
        _show_status(pool, as_json=as_json, clears=watch_s is not None)
        if watch_s is None:
            return
        time.sleep(watch_s)


def _show_status(pool: str, *, as_json: bool, clears: bool) -> None:
    from raycore import api
    from raycore.terminal import clients_table, status_table

    found = api.pool_status(pool)
    if as_json:
        print_json(found)
    else:
        if clears and sys.stdout.isatty():
            Console().clear()
        Console().print(status_table(found))
        if found.get("clients"):
            Console().print(clients_table(found["clients"]))
        if found["autoscaling"]["settings"] is not None:
            how = "autoscaling (dry run)" if found["autoscaling"]["settings"]["dry_run"] else "autoscaling"
            Console().print(f"{how}: {found['autoscaling']['now']}", markup=False, highlight=False)


@app.command(epilog=_EXAMPLES["doctor"])
def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Look at versions, GPUs, sockets, memory and Ray, and say what to do. Exit code 1 where something cannot work."""
    from raycore import api
    from raycore.doctor import Verdict
    from raycore.terminal import findings_table

    with working("looking around"):
        findings = api.doctor()
    if as_json:
        print_json(findings)
    else:
        Console().print(findings_table(findings))
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        raise typer.Exit(ExitCode.FAILED)


@app.command(epilog=_EXAMPLES["cleanup"])
def cleanup(pool: str, as_json: AsJson = False) -> None:
    """Remove what a killed driver left of POOL: actors, placement groups, socket and memory files."""
    from raycore import api

    with working(f"looking for what is left of pool {pool!r}"):
        report = api.cleanup(pool)
    if as_json:
        print_json(report)
    else:
        typer.echo("\n".join(report))
    if report.lingering_pids:
        raise PoolError(f"processes that did not end: {', '.join(map(str, report.lingering_pids))}")


if __name__ == "__main__":
    main()
