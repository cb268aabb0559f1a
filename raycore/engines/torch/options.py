"""Options of the torch engine, parsed once."""

from __future__ import annotations

import msgspec

from raycore.errors import ConfigurationError

DTYPES = ("auto", "float32", "bfloat16", "float16")
TASKS = ("auto", "generate", "embed")
DEVICES = ("auto", "cpu", "cuda")


class TorchEngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one engine loads and runs its model."""

    model: str
    """A local checkpoint directory (safetensors), a .gguf file, or a directory with exactly one."""
    task: str = "auto"
    """auto: by the checkpoint; generate; or embed: a vector a prompt."""
    dtype: str = "auto"
    """auto: float32 on CPU, the checkpoint's own on CUDA."""
    device: str = "auto"
    max_batch_tokens: int = 512
    """Tokens computed per step: decodes first, the rest goes to chunks of prompts."""
    max_sequences: int = 64
    """Sequences that run at once; the others wait."""
    block_size: int = 16
    """Tokens per block of the KV cache; a block is the unit of allocation and of prefix reuse."""
    kv_tokens: int | None = None
    """Capacity of the KV cache; None: by memory (see `kv_cache.py`)."""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU that weights and KV cache may take together, when `kv_tokens` is None."""
    max_model_len: int | None = None
    """Prompt plus output tokens of one request; None: the model's own limit. Never above `kv_tokens`."""
    threads: int | None = None
    """CPU threads of torch, for the whole process; None leaves torch's choice."""
    enable_prefix_caching: bool = True
    lean: bool = True
    """Run Llama-like models by `lean.py`, which does the same work in fewer operations; False: by transformers' own modules."""
    cuda_graphs: bool = True
    """Record decode steps as CUDA graphs while loading; what cannot be recorded runs without, and the reason is logged."""
    max_loras: int = 8
    """LoRA adapters loaded at once; 0 takes none."""
    rank: int = 0
    """The data-parallel rank that the engine holds; the pool sets it."""
    data_parallel_size: int = 0
    """Ranks of the pool when the engine is made; the pool sets it. 0: there is no pool."""
    is_joining: bool = False
    """The pool runs already, and this rank has yet to be given its experts; the pool sets it."""
    expert_parallel: bool | None = None
    """Spread a mixture-of-experts model's experts over the pool's ranks; None: where there is a pool and the model has experts that can be.

    False: each rank holds the whole model and steps alone.
    """
    expert_slots: int | None = None
    """Experts that each rank holds in each layer, the hottest first where a plan says so; None: as many as cover all of them once."""
    expert_placement: dict[str, tuple[tuple[int, ...], ...]] | None = None
    """Instead: a layer's number, or "*" for all others, to the experts of each rank, by slot (-1: empty)."""
    max_lora_rank: int = 64
    """Highest rank of an adapter."""


def check_options(options: TorchEngineOptions) -> None:
    """Raise ConfigurationError for a value that can never work; the text names the option."""
    positive = ("max_batch_tokens", "max_sequences", "block_size", "max_lora_rank")
    optional = ("kv_tokens", "max_model_len", "threads", "expert_slots")
    for name in (*positive, *optional):
        value = getattr(options, name)
        if (value is None and name in positive) or (value is not None and value < 1):
            raise ConfigurationError(f"{name} must be at least 1, not {value!r}")
    if options.max_loras < 0:
        raise ConfigurationError(f"max_loras must be at least 0, not {options.max_loras!r}")
    if options.task not in TASKS:
        raise ConfigurationError(f"task must be one of {', '.join(TASKS)}, not {options.task!r}")
    if options.dtype not in DTYPES:
        raise ConfigurationError(f"dtype must be one of {', '.join(DTYPES)}, not {options.dtype!r}")
    if options.device not in DEVICES:
        raise ConfigurationError(f"device must be one of {', '.join(DEVICES)}, not {options.device!r}")
    if not 0 < options.gpu_memory_utilization <= 1:
        raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], not {options.gpu_memory_utilization!r}")
    if options.max_batch_tokens < options.max_sequences:
        raise ConfigurationError(
            f"max_batch_tokens ({options.max_batch_tokens}) must be at least max_sequences ({options.max_sequences}): "
            "every running sequence decodes one token per step"
        )
    if options.kv_tokens is not None and options.kv_tokens < options.block_size:
        raise ConfigurationError(f"kv_tokens ({options.kv_tokens}) must hold at least one block of {options.block_size} tokens")
