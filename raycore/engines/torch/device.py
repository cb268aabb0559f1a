"""The forward pass on a CUDA device: kernels for attention, recorded graphs for decodes, and when to use which."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from raycore.engines.torch.attention import run_model
from raycore.engines.torch.kv_cache import KVCache
from raycore.engines.torch.lean import Forward, lean_decoder
from raycore.engines.torch.scheduler import Chunk

if TYPE_CHECKING:
    from raycore.engines.torch.device_step import DeviceInput, Heads
    from raycore.engines.torch.graphs import DecodeGraphs

_log = logging.getLogger(__name__)


def device_path(model: PreTrainedModel, cache: KVCache) -> DevicePath | None:
    """The path for a model on a CUDA device; None on other devices, and, with a logged reason, where the kernels cannot serve the model."""
    if model.device.type != "cuda":
        return None
    try:
        from raycore.engines.torch.device_step import uniform_heads
    except ImportError as error:  # Triton comes with torch for CUDA on Linux, not everywhere
        _log.warning("attention without kernels: %s", error)
        return None
    heads = uniform_heads(cache.layers)
    if heads is None:
        _log.warning("attention without kernels: the layers of %s differ in heads", type(model).__name__)
        return None
    return DevicePath(model, cache, heads)


class DevicePath:
    """Runs steps of one model on one cache through the kernels; decodes alone as recorded graphs once `record` has succeeded."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, heads: Heads) -> None:
        self._model = model
        self._cache = cache
        self._heads = heads
        self._forward: Forward = partial(run_model, model)
        self._graphs: DecodeGraphs | None = None

    def make_lean(self, trial: Chunk) -> None:
        """Run the model by `lean.py` from here on, if the two agree on the tokens of `trial`."""
        from raycore.engines.torch.device_operations import DeviceOperations
        from raycore.engines.torch.device_step import build_input

        inputs = build_input([trial], self._cache, self._heads, self._model.device)
        lean = lean_decoder(self._model, DeviceOperations(), (inputs.token_ids, inputs.positions, inputs.step))
        if lean is not None:
            self._forward = lean
        self._cache.clear(trial.sequence.blocks)

    def record(self, *, max_sequences: int, max_model_len: int) -> None:
        """Record decodes of up to `max_sequences` sequences; what cannot be recorded runs as before, and the reason is logged."""
        from raycore.engines.torch.graphs import DecodeGraphs

        cache = self._cache
        graphs = DecodeGraphs(
            cache,
            self._heads,
            vocab_size=int(self._model.config.get_text_config().vocab_size),
            max_sequences=max_sequences,
            max_blocks=-(-max_model_len // cache.block_size),
            device=self._model.device,
        )
        try:
            graphs.record(self._run)
        except Exception as error:  # noqa: BLE001 -- whatever a model does that cannot be recorded, it runs without
            _log.warning("no CUDA graphs for %s: %s", type(self._model).__name__, error)
            graphs.close()
            return
        self._graphs = graphs

    def forward(self, chunks: Sequence[Chunk], *, as_recorded: bool) -> torch.Tensor:
        """Logits [S, vocabulary] float32, good until the next call; without `as_recorded` the modules are called, with their hooks."""
        if as_recorded and self._graphs is not None and self._graphs.accepts(chunks):
            return self._graphs.replay(chunks)
        from raycore.engines.torch.device_step import build_input

        return self._run(build_input(chunks, self._cache, self._heads, self._model.device)).float()

    def close(self) -> None:
        """Give the graphs back."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    def _run(self, inputs: DeviceInput) -> torch.Tensor:
        return self._forward(inputs.token_ids, inputs.positions, inputs.step, inputs.logit_rows, inputs.embeds)
