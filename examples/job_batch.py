"""Batch inference over a JSONL file: `ray job submit --working-dir . -- python examples/job_batch.py /data/in.jsonl /data/out.jsonl`

A line of the input is `{"prompt": "...", ...}`; the same line of the output is it with "text" and "finish_reason", or with "error". Lines
are written in order. A job that was killed goes on where its output ends: submit it again.
"""

import argparse
import asyncio
import json
import os
from collections import deque
from pathlib import Path

from rich.progress import Progress

import raycore
from raycore.demo import default_model


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--model", help="checkpoint directory or GGUF file; the packaged SmolLM2 by default")
    parser.add_argument("--engine-options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--data-parallel-size", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--in-flight", type=int, default=64, help="requests at once; a killed job computes at most so many again")
    given = parser.parse_args()
    if not (given.input.is_absolute() and given.output.is_absolute()):
        parser.error("the paths are absolute: a job's working directory is a copy that goes with it")
    return given


def lines_done(output: Path) -> int:
    """Whole lines of an earlier run; what a kill tore off in the middle of one is cut away."""
    data = output.read_bytes() if output.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(output, whole)
    return data[:whole].count(b"\n")


async def answer(client, line: str, sampling) -> dict:
    try:
        row = json.loads(line)
        output = await client.generate(row["prompt"], sampling, detokenize=True).collect()
    except (json.JSONDecodeError, KeyError, TypeError, raycore.InvalidRequestError) as error:
        return {"error": f"{type(error).__name__}: {error}", "line": line[:200]}
    return {**row, "text": output.text, "finish_reason": output.finish_reason}


async def main() -> None:
    given = options()
    lines, done = given.input.read_text(encoding="utf-8").splitlines(), lines_done(given.output)
    print(f"{done} of {len(lines)} lines are there already", flush=True)
    if done >= len(lines):
        return
    model = default_model() if given.engine == "torch" and given.model is None else given.model
    pool = {"engine": given.engine, "model": model, "engine_options": given.engine_options, "data_parallel_size": given.data_parallel_size}
    sampling = raycore.SamplingParams(max_tokens=given.max_tokens)
    todo, running = iter(lines[done:]), deque()
    async with raycore.launch(pool=f"batch-{os.getpid()}", **pool) as client:
        with given.output.open("a", encoding="utf-8") as file, Progress() as progress:
            bar = progress.add_task("lines", total=len(lines), completed=done)
            for _ in range(done, len(lines)):
                while len(running) < max(1, given.in_flight) and (line := next(todo, None)) is not None:
                    running.append(asyncio.create_task(answer(client, line, sampling)))
                file.write(json.dumps(await running.popleft(), ensure_ascii=False) + "\n")
                file.flush()
                progress.advance(bar)
    print(f"{len(lines)} lines in {given.output}")


if __name__ == "__main__":
    asyncio.run(main())
