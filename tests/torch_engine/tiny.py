"""Tiny random models on disk, and engines on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from raycore.engines.torch import TorchEngine, TorchEngineOptions
from raycore.engines.torch.upcycle import upcycle
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import DEVICE, Driver

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
}
"""Weights large enough that greedy answers depend on the prompt."""
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def save_llama(path: Path, seed: int = 0, **config: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**TINY, **config})).save_pretrained(path)
    return path


def save_mixture(folder: Path) -> Path:
    """A mixture of four experts that says what the dense model beside it, `folder / "dense"`, says."""
    upcycle(str(save_llama(folder / "dense")), str(folder / "moe"))
    return folder / "moe"


def save_mixtral(path: Path) -> Path:
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3)).save_pretrained(path)
    return path


def save_tokenizer(path: Path) -> Path:
    """Words "w3" to "w96" for the tiny models' ids, beside a checkpoint."""
    words = WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return path


def engine_on(path: Path, **options: Any) -> TorchEngine:
    return TorchEngine.create(TorchEngineOptions(model=str(path), **{"kv_tokens": 1024, "threads": 1, "device": DEVICE, **options}))


def driver_of(path: Path, **options: Any) -> Driver:
    return Driver(engine_on(path, **options))


def prompts(count: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (count, length), generator=generator).tolist()
