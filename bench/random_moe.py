"""A mixture-of-experts checkpoint of random weights and a chosen size, for measurements where answers need not make sense."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 32_000
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 64, "num_attention_heads": 4},
    "8b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_experts": 64, "moe_intermediate_size": 1408, "num_attention_heads": 16},
    "16b": {"hidden_size": 2048, "num_hidden_layers": 28, "num_experts": 64, "moe_intermediate_size": 1408, "num_attention_heads": 16},
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What `model_of` reads."""
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint with at least 32,000 token ids, instead of --size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--directory", type=Path, default=None, help="where the model is written meanwhile")


@contextlib.contextmanager
def model_of(options: argparse.Namespace) -> Iterator[tuple[Path, int]]:
    """Where the model is, and its parameters, 0 where they are not known; one that was written here is gone afterwards."""
    if options.model is not None:
        yield options.model, _parameters(options.model)
        return
    target = Path(tempfile.mkdtemp(prefix="raycore-experts-", dir=options.directory))
    try:
        begin_s = time.perf_counter()
        # in a process of its own: this one stays without torch and without a device
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            parameters = pool.apply(write_model, (options.size, options.dtype, options.device, str(target)))
        print(f"{options.size}: {parameters / 1e9:.2f} B parameters written in {time.perf_counter() - begin_s:.1f} s", flush=True)
        yield target, parameters
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _parameters(model: Path) -> int:
    index = model / "model.safetensors.index.json"
    return int(json.loads(index.read_text()).get("metadata", {}).get("total_parameters", 0)) if index.is_file() else 0


def write_model(size: str, dtype_name: str, device: str, target: str) -> int:
    """Random weights, a file a layer, with each expert's tensors under its number as checkpoints have them. The number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    shape = SIZES[size]
    dtype = getattr(torch, dtype_name)
    heads = shape["num_attention_heads"]
    head_dim = shape["hidden_size"] // heads
    config = Qwen3MoeConfig(
        **shape,
        vocab_size=VOCABULARY,
        num_key_value_heads=max(1, heads // 4),
        **{"head_dim": head_dim},
        intermediate_size=shape["hidden_size"] * 2,
        num_experts_per_tok=min(8, shape["num_experts"] // 2),
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=dtype_name,
        eos_token_id=None,
        bos_token_id=None,
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(target)
    torch.manual_seed(0)
    hidden, inner, key_dim = shape["hidden_size"], shape["moe_intermediate_size"], config.num_key_value_heads * head_dim
    index: dict[str, str] = {}
    count = 0

    def random(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, device=device, dtype=torch.float32) / columns**0.5).to(dtype).cpu()

    def save(name: str, tensors: dict[str, Any]) -> None:
        nonlocal count
        save_file(tensors, f"{target}/{name}", {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
        count += sum(tensor.numel() for tensor in tensors.values())

    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        tensors = {
            f"{at}self_attn.q_proj.weight": random(heads * head_dim, hidden),
            f"{at}self_attn.k_proj.weight": random(key_dim, hidden),
            f"{at}self_attn.v_proj.weight": random(key_dim, hidden),
            f"{at}self_attn.o_proj.weight": random(hidden, heads * head_dim),
            f"{at}mlp.gate.weight": random(shape["num_experts"], hidden),
        }
        tensors |= {f"{at}self_attn.{name}_norm.weight": torch.ones(head_dim, dtype=dtype) for name in "qk"}
        tensors |= {f"{at}{name}_layernorm.weight": torch.ones(hidden, dtype=dtype) for name in ("input", "post_attention")}
        for expert in range(shape["num_experts"]):
            tensors[f"{at}mlp.experts.{expert}.gate_proj.weight"] = random(inner, hidden)
            tensors[f"{at}mlp.experts.{expert}.up_proj.weight"] = random(inner, hidden)
            tensors[f"{at}mlp.experts.{expert}.down_proj.weight"] = random(hidden, inner)
        save(f"layer-{layer:03}.safetensors", tensors)
    save(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": random(VOCABULARY, hidden),
            "lm_head.weight": random(VOCABULARY, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=dtype),
        },
    )
    Path(target, "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_parameters": count}, "weight_map": index}))
    return count
