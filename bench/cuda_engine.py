"""Decode tokens per second of the torch engine on a GPU beside transformers' continuous batching, in one process, on one set of weights.

The models are Llama-like with random weights, so nothing is downloaded. Decode rate: tokens after the moment at which the last request got
its first token, over the time from there to the end; both sides stamp each token on the host. `generate_batch` is run in each of the
settings below and the best counts. Results are printed and written after every measurement, so that a run that is cut short leaves what
it had.

    python -m bench.cuda_engine --model 1b 8b --json cuda_engine.json
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
import traceback
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from raycore.engine import EngineRequest
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.attention import ATTENTION_NAME
from raycore.engines.torch.loading import Checkpoint
from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams

VOCABULARY = 128_256
MODELS = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
REFERENCES: dict[str, dict[str, Any]] = {
    "default": {},
    "graphs": {"use_cuda_graph": True},
    "graphs, async": {"use_cuda_graph": True, "use_async_batching": True},
    "compiled": {"default_compile_level": 1, "use_cuda_graph": True},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"cuda_graphs": False},
    "graphs, transformers' modules": {"lean": False},
}
Stamps = list[list[float]]
"""When each request's tokens were there, in seconds."""


def main() -> None:
    """Measure, print, and write."""
    options = _parse()
    logging.set_verbosity_error()
    getLogger("ContinuousBatchingLogger").setLevel("ERROR")
    rows: list[dict[str, Any]] = []
    for name in options.model:
        model = _random_model(name, options)
        facts = _machine(model)
        print(f"{name}: {facts}", flush=True)
        for variant in options.variants:
            _guarded(lambda v=variant, n=name, m=model: _measure_engine(n, m, v, options, rows), rows, name, variant)
            _save(options, rows, facts)
        model.set_attn_implementation("sdpa")
        for setting in options.references:
            _guarded(lambda s=setting, n=name, m=model: _measure_reference(n, m, s, options, rows), rows, name, setting)
            _save(options, rows, facts)
        del model
        _collect()
    _summarise(rows, options)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["1b", "8b"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--prompt", type=int, default=128, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens per request")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that warms up; the best counts on both sides")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=["graphs", "eager"])
    parser.add_argument("--references", nargs="*", choices=REFERENCES, default=["default", "graphs", "graphs, async"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def _random_model(name: str, options: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        **MODELS[name], vocab_size=VOCABULARY, max_position_embeddings=8192, tie_word_embeddings=name == "1b", eos_token_id=None
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, options.dtype))
    try:
        with torch.device(options.device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def _prompts(count: int, options: argparse.Namespace) -> list[list[int]]:
    return np.random.default_rng(count).integers(10, VOCABULARY, (count, options.prompt)).tolist()


def _measure_engine(name: str, model: Any, variant: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    largest = max(options.batch)
    model.set_attn_implementation(ATTENTION_NAME)
    begin = time.perf_counter()
    engine = TorchEngine.of(
        Checkpoint(name, model, None),
        TorchEngineOptions(
            model=name,
            device=options.device,
            max_batch_tokens=8192,
            max_sequences=largest,
            kv_tokens=largest * (options.prompt + options.new + 32),
            enable_prefix_caching=False,
            **VARIANTS[variant],
        ),
    )
    load_s = time.perf_counter() - begin
    try:
        for size in options.batch:
            rates = [_rates(_run_engine(engine, _prompts(size, options), options)) for _ in range(options.rounds + 1)]
            _note(rows, name, size, "raycore", variant, rates, load_s=round(load_s, 1))
    finally:
        engine.close()


def _run_engine(engine: TorchEngine, prompts: list[list[int]], options: argparse.Namespace) -> tuple[float, Stamps]:
    sampling = SamplingParams(max_tokens=options.new, ignore_eos=True)
    stamps: Stamps = [[] for _ in prompts]
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(Handle(i), RequestId(str(i)), np.array(prompt, dtype=np.uint32), sampling))
    while engine.has_work():
        output = engine.step()
        now = time.perf_counter()
        for handle in output.handles.tolist():
            stamps[handle].append(now)
    return begin, stamps


def _measure_reference(name: str, model: Any, setting: str, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    generation = GenerationConfig(max_new_tokens=options.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for size in options.batch:
        config = ContinuousBatchingConfig(**REFERENCES[setting], allow_block_sharing=False, max_memory_percent=0.5)
        prompts = _prompts(size, options)
        rates = []
        try:
            for _ in range(options.rounds + 1):
                begin = time.perf_counter()
                outputs = model.generate_batch(
                    inputs=prompts,
                    generation_config=generation,
                    continuous_batching_config=config,
                    record_timestamps=True,
                    persistent_manager=True,
                )
                stamps = [output.timestamps for output in outputs.values()]
                if len(stamps) != size or any(len(s or ()) != options.new for s in stamps):
                    raise RuntimeError(f"generate_batch gave {[len(s or ()) for s in stamps][:8]} tokens for {size} requests")
                rates.append(_rates((begin, stamps)))
        finally:
            model.destroy_cached_continuous_batching_manager()
            _collect()
        _note(rows, name, size, "generate_batch", setting, rates)


def _rates(run: tuple[float, Stamps]) -> tuple[float, float]:
    """Decode tokens/s, and output tokens/s from the first request's arrival on."""
    begin, stamps = run
    started, ended = max(s[0] for s in stamps), max(s[-1] for s in stamps)
    decoded = sum(sum(t > started for t in s) for s in stamps)
    return decoded / (ended - started), sum(map(len, stamps)) / (ended - begin)


def _note(rows: list[dict[str, Any]], name: str, size: int, who: str, how: str, rates: list[tuple[float, float]], **more: Any) -> None:
    measured = rates[1:] or rates
    row = {
        "model": name,
        "batch": size,
        "who": who,
        "how": how,
        "decode": round(max(r[0] for r in measured), 1),
        "whole": round(max(r[1] for r in measured), 1),
        "decode_rounds": [round(r[0], 1) for r in measured],
        **more,
    }
    rows.append(row)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def _guarded(measure: Any, rows: list[dict[str, Any]], name: str, how: str) -> None:
    """One setting that a version of transformers or torch cannot run must not cost the others."""
    try:
        measure()
    except Exception as error:  # noqa: BLE001 -- reported as a row, which a reader sees
        traceback.print_exc()
        rows.append({"model": name, "how": how, "error": f"{type(error).__name__}: {error}"})
    _collect()


def _summarise(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print("\nmodel  batch   raycore  generate_batch  ratio   (decode tokens/s, each at its best)")
    for name in options.model:
        for size in options.batch:
            best = {
                who: max((r["decode"] for r in rows if (r["model"], r.get("batch"), r.get("who")) == (name, size, who)), default=None)
                for who in ("raycore", "generate_batch")
            }
            ours, theirs = best["raycore"], best["generate_batch"]
            ratio = f"{ours / theirs:5.2f}" if ours and theirs else "    -"
            print(f"{name:5} {size:6} {ours or 0:9.1f} {theirs or 0:15.1f}  {ratio}")


def _machine(model: Any) -> dict[str, Any]:
    weights = sum(p.numel() for p in model.parameters())
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "parameters": weights,
        "dtype": str(model.dtype),
    }


def _save(options: argparse.Namespace, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    if options.json:
        payload = {"machine": facts, "prompt": options.prompt, "new": options.new, "rows": rows}
        options.json.write_text(json.dumps(payload, indent=1) + "\n")


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
