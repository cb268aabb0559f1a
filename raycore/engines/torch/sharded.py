"""Saving the weights as a checkpoint that transformers loads again: safetensors shards, an index, configuration and tokenizer.

transformers' own `save_pretrained` writes it (tied weights once, fused weights under the names that checkpoints have); what is added here
are the names of the shards, the tokenizer, and that the directory appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from raycore.errors import InvalidArgumentsError, SaveError
from raycore.tokenizer import Tokenizer

DEFAULT_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
DEFAULT_MAX_BYTES = 5 << 30
"""As transformers has it: files that any file system and tool can hold."""


def save_checkpoint(
    model: PreTrainedModel, tokenizer: Tokenizer | None, path: str, *, rank: int, pattern: str | None, max_bytes: int | None
) -> Path:
    """Write a complete checkpoint to the new directory `path` and return it; `{rank}` in `path` is replaced.

    `pattern`: name of each shard, with `{part}` (five digits, from 1) and perhaps `{rank}`. `max_bytes`: of tensors in a shard; a single
    larger tensor has a shard of its own. InvalidArgumentsError for a wrong name or size, SaveError when `path` is taken or writing fails;
    then nothing is left.
    """
    try:
        target = Path(_filled(path, "path", {"rank": rank})).expanduser()
        is_taken = target.exists() or target.is_symlink()
    except (OSError, RuntimeError) as error:  # a name too long, a place that may not be looked at, a home that nobody has
        raise SaveError(f"cannot save to {path!r}: {error}") from error
    _check(target, pattern or DEFAULT_PATTERN, max_bytes, is_taken=is_taken)
    workplace: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        _write(model, tokenizer, workplace, rank=rank, pattern=pattern or DEFAULT_PATTERN, max_bytes=max_bytes or DEFAULT_MAX_BYTES)
        workplace.chmod(0o755)  # mkdtemp gives 0700
        workplace.rename(target)  # fails when somebody else made it meanwhile, unless it is empty
    except Exception as error:
        raise SaveError(f"cannot save to {str(target)!r}: {error}; nothing was left there") from error
    finally:
        if workplace is not None:
            shutil.rmtree(workplace, ignore_errors=True)
    return target


def _check(target: Path, pattern: str, max_bytes: int | None, *, is_taken: bool) -> None:
    name = _filled(pattern, "pattern", {"rank": 0, "part": "00001"})
    if Path(name).name != name or not name.endswith(".safetensors") or name.startswith("."):
        raise InvalidArgumentsError(f"pattern must be the name of a .safetensors file without a directory, not {pattern!r}")
    # the same name for two parts: it does not hold {part}, or cuts it short as "{part:.3}" does
    if name == _filled(pattern, "pattern", {"rank": 0, "part": "00002"}):
        raise InvalidArgumentsError(f"pattern must hold {{part}}, or shards would overwrite each other: {pattern!r}")
    if max_bytes is not None and max_bytes < 1:
        raise InvalidArgumentsError(f"max_size must be a number of bytes above 0, not {max_bytes!r}")
    if not target.name:
        raise InvalidArgumentsError("path must name a new directory")
    if is_taken:
        raise SaveError(f"{str(target)!r} exists: name a new directory, or put {{rank}} into the path where every rank shall write its own")


def _fields(text: str, what: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise InvalidArgumentsError(f"{what} {text!r}: {error}") from error


def _filled(text: str, what: str, values: dict[str, int | str]) -> str:
    unknown = _fields(text, what) - values.keys()
    if unknown:
        known = " and ".join(f"{{{name}}}" for name in values)
        raise InvalidArgumentsError(f"{what} may hold {known}, not {{{min(unknown)}}}: {text!r}")
    try:
        return text.format(**values)
    except (ValueError, LookupError, AttributeError) as error:
        raise InvalidArgumentsError(f"{what} {text!r}: {error}") from error


def _write(model: PreTrainedModel, tokenizer: Tokenizer | None, folder: Path, *, rank: int, pattern: str, max_bytes: int) -> None:
    with _ready_to_save(model):
        model.save_pretrained(folder, max_shard_size=max_bytes)
    _rename_shards(folder, rank, pattern)
    if tokenizer is not None:
        tokenizer.save(folder)


def _rename_shards(folder: Path, rank: int, pattern: str) -> None:
    """Give the shards their names and write the index, which a checkpoint of one shard needs too once it is not called as usual."""
    index_file = folder / SAFE_WEIGHTS_INDEX_NAME
    if index_file.is_file():
        index = json.loads(index_file.read_text())
    else:
        from safetensors import safe_open

        with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as shard:
            names = list(shard.keys())
        size = (folder / SAFE_WEIGHTS_NAME).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, SAFE_WEIGHTS_NAME)}
    old_names = sorted(set(index["weight_map"].values()))
    new_names = {old: pattern.format(rank=rank, part=f"{part:05d}") for part, old in enumerate(old_names, start=1)}
    for old, new in new_names.items():
        (folder / old).rename(folder / new)
    index["weight_map"] = {name: new_names[old] for name, old in index["weight_map"].items()}
    index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def _ready_to_save(model: PreTrainedModel) -> Iterator[None]:
    """A model that came from a GGUF file is dequantised, but transformers marks it as quantised and refuses to save it.

    A copy of the configuration, since saving writes to it.
    """
    marked: Any = model
    quantizer, config = getattr(marked, "hf_quantizer", None), marked.config
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        delattr(plain, "quantization_config")
    if quantizer is not None:
        marked.hf_quantizer = None
    marked.config = plain
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        marked.config = config
        if quantizer is not None:
            marked.hf_quantizer = quantizer
        if bars:
            logging.enable_progress_bar()
