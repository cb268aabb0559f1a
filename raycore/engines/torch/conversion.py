"""A GGUF file as a safetensors checkpoint, made once and kept in the user's cache.

transformers reads a GGUF file in pure Python, several times over (configuration, tokenizer, weights): about 40 s for a 135 M model on one
core, at every start of every engine. The converted checkpoint loads in one or two.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raycore.engines.torch.loading import Source, load_model
from raycore.engines.torch.options import TorchEngineOptions

_log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/raycore/models`, or the same under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "raycore" / "models"


def converted(gguf: Path, directory: Path | None = None) -> Path:
    """The safetensors checkpoint (float32, exactly what the GGUF file dequantises to) of `gguf`; made when it is not there.

    Two processes that convert at once do the work twice, and one result is kept. ConfigurationError as for loading.
    """
    facts = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}:{facts.st_size}:{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    root = directory or cache_directory()
    target = root / f"{gguf.stem}-{key}"
    if target.is_dir():
        return target
    _log.info("converting %s once, to %s", gguf.name, target)
    root.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{gguf.stem}-", dir=root))
    try:
        _convert(gguf, workplace)
        workplace.rename(target)
    except OSError:
        if not target.is_dir():  # somebody else was first
            raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return target


def _convert(gguf: Path, target: Path) -> None:
    loaded = load_model(Source(gguf.parent, gguf.name), TorchEngineOptions(model=str(gguf), dtype="float32", device="cpu"))
    config = copy.deepcopy(loaded.config)
    # transformers marks a model that came from a GGUF file as quantised, although its weights are not any more, and refuses to save it
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, local_files_only=True).save_pretrained(target)
