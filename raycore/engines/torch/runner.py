"""The model with its cache: one step's forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from raycore.engines.torch.attention import CachedStep, PagedStep, ShapeProbe
from raycore.engines.torch.batch import build_batch
from raycore.engines.torch.kv_cache import KVCache, LayerShape
from raycore.engines.torch.scheduler import Chunk
from raycore.engines.torch.sequence import Sequence as TokenSequence
from raycore.errors import ConfigurationError


class ModelRunner:
    """Runs chunks of sequences through the model; owns the weights and the cache tensors."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [S, vocabulary] in float32 of the chunks that end at a sequence's last token, in `sampled_chunks` order."""
        model = self.model
        batch = build_batch(chunks, block_size=self.cache.block_size, dtype=model.dtype, device=model.device)
        step = CachedStep(self.cache, batch)
        logits = _run(model, batch.token_ids, batch.positions, step, batch.logit_rows)
        return logits[0].float()

    def idle(self) -> None:
        """A forward pass over one dummy token, which writes to the scratch block only."""
        dummy = TokenSequence(handle=-1, tokens=[0], prompt_tokens=1, blocks=[0])
        self.forward([Chunk(dummy, 0, 1)])

    def close(self) -> None:
        """Give weights and cache back to the device; the runner cannot run again."""
        self.cache.keys.clear()
        self.cache.values.clear()
        del self.model, self.cache

    def weight_checksum(self) -> str:
        """SHA-256 over names, shapes and bytes of all weights: equal on two engines when they compute the same."""
        digest = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@torch.inference_mode()
def probe_layers(model: PreTrainedModel) -> dict[int, LayerShape]:
    """What each attention layer stores per token, learned from a forward pass over one token.

    Raises ConfigurationError for a model whose layers do not all go through the attention interface with keys and values of their own.
    """
    probe = ShapeProbe()
    zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    name = type(model).__name__
    try:
        _run(model, zero, zero, probe, zero[0])
    except (NotImplementedError, TypeError, RuntimeError) as error:
        raise ConfigurationError(f"the torch engine cannot run {name}: {error}") from error
    expected = int(model.config.get_text_config().num_hidden_layers)
    if sorted(probe.layers) != list(range(expected)):
        raise ConfigurationError(
            f"the torch engine cannot run {name}: {len(probe.layers)} of its {expected} layers have standard attention; "
            "recurrent and shared-cache layers are not supported"
        )
    return probe.layers


def _run(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, step: PagedStep, rows: torch.Tensor) -> torch.Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False, "logits_to_keep": rows, "paged": step}
    return model(**inputs).logits
