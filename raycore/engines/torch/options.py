"""Options of the torch engine, parsed once."""

from __future__ import annotations

import msgspec

from raycore.errors import ConfigurationError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


class TorchEngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one engine loads and runs its model."""

    model: str
    """A local checkpoint directory (safetensors), a .gguf file, or a directory with exactly one."""
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


def check_options(options: TorchEngineOptions) -> None:
    """Raise ConfigurationError for a value that can never work; the text names the option."""
    positive = ("max_batch_tokens", "max_sequences", "block_size")
    optional = ("kv_tokens", "max_model_len", "threads")
    for name in (*positive, *optional):
        value = getattr(options, name)
        if (value is None and name in positive) or (value is not None and value < 1):
            raise ConfigurationError(f"{name} must be at least 1, not {value!r}")
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
