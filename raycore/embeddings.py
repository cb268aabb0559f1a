"""A prompt given as embeddings: the tensor `prompt_embeds` of a request, and the check that both doors run on it."""

from __future__ import annotations

from typing import Any

import numpy as np

from raycore.engine import EngineInfo
from raycore.sampling import SamplingParams

PROMPT_EMBEDS = "prompt_embeds"
"""The name in a request's `tensors`; shape [prompt tokens, `EngineInfo.embedding_size`], floating point, torch or numpy."""

_FLOATS = frozenset(("float16", "bfloat16", "float32", "float64"))
_DIMENSIONS = 2


def problem_with(tensor: Any, sampling: SamplingParams, info: EngineInfo) -> str | None:
    """Why this cannot be the prompt of such a request to such an engine, or None. torch is not imported."""
    if not info.embedding_size:
        return f"{PROMPT_EMBEDS}: engine {info.engine!r} takes token ids only"
    if sampling.prompt_logprobs is not None:
        return f"prompt_logprobs needs a prompt of token ids; {PROMPT_EMBEDS} has none"
    shape, dtype = getattr(tensor, "shape", None), str(getattr(tensor, "dtype", "")).removeprefix("torch.")
    if shape is None or dtype not in _FLOATS:
        return f"{PROMPT_EMBEDS} must be a floating point tensor, not {dtype or type(tensor).__name__}"
    if len(shape) != _DIMENSIONS or not shape[0] or shape[1] != info.embedding_size:
        return f"{PROMPT_EMBEDS} must have the shape [prompt tokens, {info.embedding_size}], not {list(shape)}"
    if shape[0] >= info.max_model_len:
        return f"{PROMPT_EMBEDS} has {shape[0]} tokens; with one output token the model's context takes at most {info.max_model_len}"
    return _problem_with_values(tensor)


def _problem_with_values(tensor: Any) -> str | None:
    try:
        is_finite = bool((np.isfinite(tensor) if isinstance(tensor, np.ndarray) else tensor.isfinite()).all())
    except (RuntimeError, NotImplementedError) as error:  # a tensor without values of its own: meta, sparse
        return f"{PROMPT_EMBEDS} cannot be read: {error}"
    return None if is_finite else f"{PROMPT_EMBEDS} holds values that are not finite"
