"""The operations of one torch engine that are not requests: sleep, adapters, saving, versions, checksums."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from raycore.engine import SET_RANK
from raycore.engines.torch.checksums import weight_checksums
from raycore.engines.torch.expert_parallel import ExpertParallel
from raycore.engines.torch.lora import LoraRegistry
from raycore.engines.torch.lora_layers import LoraLayers
from raycore.engines.torch.sharded import save_checkpoint
from raycore.engines.torch.sleep import Sleep
from raycore.engines.torch.weights import Weights
from raycore.tokenizer import Tokenizer


class Controls:
    """Carries out operations on the parts of an engine.

    Without `adapters` and `layers` the engine takes none; `experts`: what spreads its experts over ranks. `has_work`: whether requests
    need its parts; `cache_bytes`: what the KV cache takes now.
    """

    def __init__(
        self,
        weights: Weights,
        sleep: Sleep,
        adapters: LoraRegistry | None,
        layers: LoraLayers | None,
        *,
        tokenizer: Tokenizer | None,
        rank: int,
        has_work: Callable[[], bool],
        cache_bytes: Callable[[], int],
        experts: ExpertParallel | None = None,
    ) -> None:
        self._weights = weights
        self._sleep = sleep
        self._adapters = adapters
        self._layers = layers
        self._tokenizer = tokenizer
        self._rank = rank
        self._has_work = has_work
        self._cache_bytes = cache_bytes
        self._experts = experts

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        """By the names of `raycore/operations.py`; `sleep` and `wake_up` are called while the engine core is paused."""
        return {
            **self._of_generation(),
            "sleep": self._sleep.sleep,
            "wake_up": self._sleep.wake_up,
            "save_sharded_state": self.save_sharded_state,
            "set_weight_version": self.set_weight_version,
            "get_weight_version": lambda: self._weights.version,
            "compute_weight_checksums": self.compute_weight_checksums,
            SET_RANK: self.set_rank,
            "reset_mm_cache": _reset_nothing,
            "reset_encoder_cache": _reset_nothing,
        }

    def _of_generation(self) -> dict[str, Callable[..., Any]]:
        if self._adapters is None:
            return {}
        return {
            "release_kv_cache_memory": self.release_kv_cache_memory,
            "add_lora": self.add_lora,
            "remove_lora": self.remove_lora,
            "list_loras": self._adapters.ids,
            "lora_names": self._adapters.names,
            "pin_lora": self._adapters.pin,
        }

    def release_kv_cache_memory(self) -> None:
        """Free the KV cache of an idle engine; the next request brings it back."""
        self._sleep.release_kv_cache(has_work=self._has_work())

    def add_lora(self, lora_id: int, name: str, path: str) -> bool:
        """Load an adapter; see `LoraRegistry.add`."""
        assert self._adapters is not None  # noqa: S101
        assert self._layers is not None  # noqa: S101
        self._sleep.check_awake("add_lora")
        added = self._adapters.add(lora_id, name, path)
        self._layers.release()  # one that it evicted may be packed
        return added

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; see `LoraRegistry.remove`."""
        assert self._adapters is not None  # noqa: S101
        assert self._layers is not None  # noqa: S101
        removed = self._adapters.remove(lora_id)
        self._layers.release()
        return removed

    def set_rank(self, rank: int) -> None:
        """What was loaded before its rank was known is told it."""
        self._rank = rank

    def save_sharded_state(self, path: str, pattern: str | None = None, max_size: int | None = None) -> None:
        """Write a checkpoint; see `sharded.py`."""
        model = self._weights.present()
        if self._experts is not None:
            self._experts.check_whole("save_sharded_state")
        save_checkpoint(model, self._tokenizer, path, rank=self._rank, pattern=pattern, max_bytes=max_size)

    def set_weight_version(self, version: str) -> None:
        """Name the weights from now on."""
        self._weights.version = version

    def compute_weight_checksums(self) -> dict[str, str]:
        """Checksums by tensor, and by expert where a tensor holds several."""
        return weight_checksums(self._weights.present(), self._experts.labels() if self._experts is not None else None)

    def memory_stats(self) -> dict[str, int]:
        """Bytes now. Weights, KV cache, adapters: on the engine's device; weights_host: a sleeping engine's copies; resident: the process.

        On CUDA also what torch has allocated and what it has reserved from the device, caches included.
        """
        stats = {
            "weights_bytes": self._weights.device_bytes,
            "weights_host_bytes": self._weights.host_bytes,
            "kv_cache_bytes": self._cache_bytes(),
            "lora_bytes": self._layers.total_bytes if self._layers is not None else 0,
            "resident_bytes": resident_bytes(),
        }
        device = self._weights.model.device
        if device.type == "cuda":
            stats["device_allocated_bytes"] = torch.cuda.memory_allocated(device)
            stats["device_reserved_bytes"] = torch.cuda.memory_reserved(device)
        return stats


def resident_bytes() -> int:
    """What the process holds of main memory, file mappings included; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _reset_nothing() -> None:
    """Text models have no such cache: after the reset nothing of it is left, as asked."""
