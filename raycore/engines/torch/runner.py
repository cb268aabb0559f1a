"""The model with its cache: one step's forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from raycore.engines.torch.attention import CachedStep, ShapeProbe, run_model
from raycore.engines.torch.batch import StepBatch, build_batch
from raycore.engines.torch.blocks import SCRATCH_BLOCK
from raycore.engines.torch.device import device_path
from raycore.engines.torch.kv_cache import KVCache, LayerShape
from raycore.engines.torch.lean import Forward, PlainOperations, lean_decoder
from raycore.engines.torch.scheduler import Chunk
from raycore.engines.torch.sequence import Sequence as TokenSequence
from raycore.engines.torch.windows import DecodeWindow
from raycore.errors import ConfigurationError

_TRIAL_TOKENS = 8
"""Of the forward passes that are compared when a runner is made; they are stored in the scratch block."""


class ModelRunner:
    """Runs chunks of sequences through the model; owns the weights and the cache tensors."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, *, lean: bool = True) -> None:
        """`lean`: run Llama-like models by `lean.py`, where it agrees with transformers' own modules."""
        self.model = model
        self.cache = cache
        self._forward: Forward = partial(run_model, model)
        self._device = device_path(model, cache)
        self._window = DecodeWindow(cache) if model.device.type == "cpu" else None
        self._graph_limits: tuple[int, int] | None = None
        if lean:
            self._make_lean()

    @torch.inference_mode()
    def prepare(self, *, max_sequences: int, max_model_len: int) -> None:
        """Record the decode steps of up to `max_sequences` sequences as CUDA graphs, where that is possible; a failure is logged."""
        self._graph_limits = max_sequences, max_model_len
        if self._device is not None and self.model.device.type == "cuda":
            self._device.record(max_sequences=max_sequences, max_model_len=max_model_len)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], *, as_recorded: bool = True) -> torch.Tensor:
        """Logits in float32: [S, vocabulary] of the chunks that end at a sequence's last token, in `sampled_chunks` order, and behind them
        [Q, vocabulary] of the `prompt_logit_chunks`.

        They are good until the next call. `as_recorded`: a recorded graph will do; False where hooks change what the modules compute.
        """
        if self._device is not None:
            return self._device.forward(chunks, as_recorded=as_recorded)
        batch = self._build(chunks)
        singles = [chunk for chunk in chunks if chunk.length == 1]
        window = self._window.arrange(singles) if len(singles) > 1 and self._window is not None else None
        step = CachedStep(self.cache, batch, window)
        return self._forward(batch.token_ids, batch.positions, step, batch.logit_rows, batch.embeds).float().contiguous()

    def embeddings(self, tensor: Any) -> torch.Tensor:
        """A copy of a request's embeddings [tokens, hidden], torch or numpy, as the model computes with them."""
        return torch.as_tensor(tensor).to(device=self.model.device, dtype=self.model.dtype, copy=True)

    def idle(self) -> None:
        """A forward pass over one dummy token, which writes to the scratch block only."""
        dummy = TokenSequence(handle=-1, tokens=[0], prompt_tokens=1, blocks=[SCRATCH_BLOCK])
        self.forward([Chunk(dummy, 0, 1)])
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache now, its dense copy included."""
        return self.cache.total_bytes + (self._window.total_bytes if self._window is not None else 0)

    def release_cache(self) -> None:
        """Free the cache tensors and their dense copy, and the recorded graphs, which hold addresses of cache and weights."""
        if self._device is not None:
            self._device.close()
        self.forget_window()
        self.cache.release()

    def forget_graphs(self) -> None:
        """Drop the recorded graphs: they hold addresses of weights that are to be others. Steps go on without until `prepare_again`."""
        if self._device is not None:
            self._device.close()

    def forget_window(self) -> None:
        """Drop the dense copy of what decoding sequences hold; the next step fills it from the cache."""
        if self._window is not None:
            self._window.release()

    def prepare_again(self) -> None:
        """Record anew what was recorded, once weights and cache are back."""
        if self._graph_limits is not None:
            self.prepare(max_sequences=self._graph_limits[0], max_model_len=self._graph_limits[1])

    def close(self) -> None:
        """Give weights and cache back to the device; the runner cannot run again."""
        if self._device is not None:
            self._device.close()
            self._device = None
        self._window = None
        self.cache.keys.clear()
        self.cache.values.clear()
        del self.model, self.cache, self._forward

    def weight_checksum(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights: equal on two engines when they compute the same."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _build(self, chunks: Sequence[Chunk]) -> StepBatch:
        return build_batch(chunks, block_size=self.cache.block_size, dtype=self.model.dtype, device=self.model.device)

    def _make_lean(self) -> None:
        count = min(_TRIAL_TOKENS, self.cache.block_size, int(self.model.config.get_text_config().vocab_size))
        trial = Chunk(TokenSequence(handle=-1, tokens=list(range(count)), prompt_tokens=count, blocks=[SCRATCH_BLOCK]), 0, count)
        if self._device is not None:
            self._device.make_lean(trial)
            return
        batch = self._build([trial])
        lean = lean_decoder(self.model, PlainOperations(), (batch.token_ids, batch.positions, CachedStep(self.cache, batch)))
        if lean is not None:
            self._forward = lean
        self.cache.clear([SCRATCH_BLOCK])


@torch.inference_mode()
def probe_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """What each attention layer stores per token, learned from a forward pass over one token.

    Raises ConfigurationError for a model whose layers do not all go through the attention interface with keys and values of their own.
    """
    probe = ShapeProbe()
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    name = type(model).__name__
    try:
        run_model(model, zero, zero, probe, zero[0])
    except (NotImplementedError, TypeError, RuntimeError) as error:
        raise ConfigurationError(f"the torch engine cannot run {name}: {error}") from error
    expected = int(model.config.get_text_config().num_hidden_layers)
    if sorted(probe.layers) != list(range(expected)):
        raise ConfigurationError(
            f"the torch engine cannot run {name}: {len(probe.layers)} of its {expected} layers have standard attention; "
            "recurrent and shared-cache layers are not supported"
        )
    return probe.layers
