"""What sleep frees and costs, what LoRA adapters add to a decode step, and how fast checksums are: the torch engine on one device.

The model is Llama-like with random weights, so nothing is downloaded; `--model tiny` is for a CPU. Medians of rounds in one process.

    python -m bench.lifecycle --model 1b --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from bench.cuda_engine import MODELS, VOCABULARY
from raycore.engine import EngineRequest
from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams

MIB = 1 << 20
ADAPTERS = 8
STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        engine = _engine(Path(folder), options.model, options.device)
        _measure_checksums(engine)
        _measure_sleep(engine, options.device)
        _measure_adapters(engine, Path(folder), options.batch, options.device)


def _engine(folder: Path, name: str, device: str) -> TorchEngine:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    config = LlamaConfig(**MODELS[name], vocab_size=VOCABULARY if device == "cuda" else 32_000, max_position_embeddings=8192)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "model")
    del model
    threads = 1 if device == "cpu" else None
    return TorchEngine.create(TorchEngineOptions(model=str(folder / "model"), device=device, kv_tokens=32_768, threads=threads))


def _timed(work: Callable[[], object], device: str = "cpu") -> float:
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _stats(engine: TorchEngine) -> str:
    return "  ".join(f"{name.removesuffix('_bytes')} {value / MIB:,.0f}" for name, value in engine.rpc_methods()["memory_stats"]().items())


def _measure_checksums(engine: TorchEngine) -> None:
    held = engine.rpc_methods()["memory_stats"]()["weights_bytes"]
    rounds = [_timed(engine.utilities()["compute_weight_checksums"]) for _ in range(3)]
    print(f"checksums: {held / MIB:,.0f} MiB at {held / 2**30 / statistics.median(rounds):.2f} GiB/s", flush=True)


def _measure_sleep(engine: TorchEngine, device: str) -> None:
    utilities = engine.utilities()
    print(f"awake (MiB): {_stats(engine)}")
    for level in (1, 2, 1):
        sleep_s = _timed(lambda level=level: utilities["sleep"](level=level), device)
        print(f"level {level} (MiB): {_stats(engine)}")
        weights_s = _timed(lambda: utilities["wake_up"](tags=["weights"]), device)
        cache_s = _timed(utilities["wake_up"], device)
        print(
            f"level {level}: asleep in {sleep_s:.2f} s, weights back {weights_s:.2f} s, cache and graphs {cache_s:.2f} s",
            flush=True,
        )
    print(f"awake (MiB): {_stats(engine)}")


def _measure_adapters(engine: TorchEngine, folder: Path, batch: int, device: str) -> None:
    fitted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16),
        LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    )
    for name, parameter in fitted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    fitted.save_pretrained(folder / "adapter")
    del fitted
    loads = [
        _timed(lambda i=i: engine.utilities()["add_lora"](lora_id=i, name=f"a{i}", path=str(folder / "adapter")))
        for i in range(1, ADAPTERS + 1)
    ]
    print(f"an adapter of rank 16 on every projection loads in {statistics.median(loads):.2f} s")
    for round_number in range(2):
        for count in (0, 1, 4, ADAPTERS):
            step_s = _decode_step_s(engine, batch, count, device)
            print(f"round {round_number}: batch {batch}, {count} adapters in it: {step_s * 1e3:.2f} ms a decode step", flush=True)


def _decode_step_s(engine: TorchEngine, batch: int, adapters: int, device: str) -> float:
    sampling = SamplingParams(max_tokens=STEPS + 8, ignore_eos=True)
    for i in range(batch):
        lora = 1 + i % adapters if adapters else None
        prompt = np.full(16, 5 + i, np.uint32)
        engine.add(EngineRequest(Handle(i), RequestId(f"r{i}"), prompt, sampling, lora=lora))
    for _ in range(4):
        engine.step()
    steps = [_timed(engine.step, device) for _ in range(STEPS)]
    engine.abort(list(range(batch)))
    return statistics.median(steps)


if __name__ == "__main__":
    main()
