"""Checksums of weights: one 64-bit number per tensor, and per expert where a tensor holds several.

The hash is integer arithmetic in torch, so that it runs where the weights are: a GPU reads its own memory instead of sending it to
the host. Sums wrap and do not depend on an order, so that equal bytes give equal numbers on every device. It tells accidents apart
(another checkpoint, a lost or swapped tensor, a flipped bit), not forgeries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import nn

_CHUNK_WORDS = 1 << 16
"""Words of a step on CPU: 512 KiB stay in its cache (measured: 2.0 times the speed of 8 MiB)."""
_CHUNK_WORDS_CUDA = 1 << 24
_WORD_BYTES = 8
_EXPERTS = "experts"
"""The module name under which transformers keeps the experts of every mixture-of-experts model."""


def weight_checksums(model: nn.Module, labels: Mapping[str, Sequence[int]] | None = None) -> dict[str, str]:
    """16 hexadecimal digits by parameter or persistent buffer, tied ones once.

    A tensor [experts, ...] of fused experts gives one for each: `….experts.3.down_proj`, as if they were stored one by one. `labels`:
    which experts a module's rows are, where they are not all of them in order; negative ones are left out.
    """
    checksums: dict[str, str] = {}
    fused = _fused_experts(model)
    for name, tensor in _stored(model).items():
        if name in fused:
            prefix, leaf = name.rsplit(".", 1)
            experts = (labels or {}).get(prefix) or range(len(tensor))
            for expert, part in zip(experts, tensor, strict=True):
                if expert >= 0:
                    checksums[f"{prefix}.{expert}.{leaf}"] = tensor_checksum(part)
        else:
            checksums[name] = tensor_checksum(tensor)
    return checksums


@torch.inference_mode()
def tensor_checksum(tensor: torch.Tensor) -> str:
    """The checksum of one tensor's dtype, shape and bytes."""
    facts = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    words = _words(tensor.detach())
    chunk = _CHUNK_WORDS_CUDA if words.is_cuda else _CHUNK_WORDS
    # A word's place is mixed in, so that two words that change places change the sum.
    places = torch.arange(1, min(chunk, words.numel()) + 1, dtype=torch.int64, device=words.device).mul_(_signed(0x9E3779B97F4A7C15))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, words.numel(), chunk):
        part = words[begin : begin + chunk]
        total += _mixed(places[: part.numel()] + _signed(begin * 0x9E3779B97F4A7C15), part).sum()
    value = (int(total) + int.from_bytes(facts.digest())) % 2**64
    return f"{value:016x}"


def _mixed(places: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Each word with its place, every bit spread over all (the finaliser of splitmix64, Steele et al. 2014, with arithmetic shifts)."""
    mixed = places.bitwise_xor_(words)
    mixed ^= mixed >> 30
    mixed *= _signed(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> 27
    mixed *= _signed(0x94D049BB133111EB)
    mixed ^= mixed >> 31
    return mixed


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes as int64 [ceil(bytes / 8)], padded with zeros."""
    as_bytes = tensor.contiguous().reshape(-1).view(torch.uint8)
    left = -as_bytes.numel() % _WORD_BYTES
    if left or as_bytes.storage_offset() % _WORD_BYTES:
        padded = as_bytes.new_zeros(as_bytes.numel() + left)
        padded[: as_bytes.numel()] = as_bytes
        as_bytes = padded
    return as_bytes.view(torch.int64)


def _signed(value: int) -> int:
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def _stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold, each tensor once under its first name, in order of names."""
    kept = set(model.state_dict())
    tensors = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in kept}}
    return dict(sorted(tensors.items()))


def _fused_experts(model: nn.Module) -> set[str]:
    """Names of the parameters whose first dimension counts experts."""
    return {
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if path.rsplit(".", 1)[-1] == _EXPERTS and not isinstance(module, nn.ModuleList)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1
    }
