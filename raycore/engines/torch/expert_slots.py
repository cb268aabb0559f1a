"""One layer's expert tensors on this rank: which expert is in which row, where a coming one goes, and how the tensors change place.

Slots are what the other ranks know; rows are where the weights are. A new placement that needs nothing else than what is here, or finds
rows that nothing refers to any more, moves no weight: only the table from slots to rows is another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch

from raycore.engines.torch.checksums import tensor_checksum
from raycore.engines.torch.expert_map import EMPTY_SLOT
from raycore.errors import LockstepError

CHECKSUM_BYTES = 8


@final
class LayerSlots:
    """Owns the rows of one module of experts."""

    def __init__(self, module: Any, row: Sequence[int]) -> None:
        """`row`: the experts that the module's tensors hold, by row, which are the slots at first."""
        self._module = module
        count = int(module.num_experts)
        self._names = sorted(
            name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() and len(parameter) == count
        )
        self.held: list[int] = [*row, *[EMPTY_SLOT] * (count - len(row))]
        """Experts by row, those that no slot refers to any more included."""
        self._coming: _Coming | None = None
        self._before: _Before | None = None
        self.refer(row)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the module's tensors that hold experts."""
        return tuple(self._names)

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return sum(self._tensor(name)[0].nbytes for name in self._names)

    def refer(self, slots: Sequence[int]) -> None:
        """The slots hold these experts from now on; they must be here."""
        self.slots = tuple(slots)
        rows = [0 if expert == EMPTY_SLOT else self.held.index(expert) for expert in slots]
        self.rows = torch.tensor(rows or [0], dtype=torch.int64, device=self._tensor(self._names[0]).device)
        """[slots] int64: the row of each slot."""

    # -- sending and receiving ------------------------------------------------------------------------------------------------

    def read(self, expert: int) -> torch.Tensor:
        """One expert's weights as bytes [expert_bytes + CHECKSUM_BYTES] uint8, with their checksum behind them."""
        row = self.held.index(expert)
        weights = torch.cat([self._tensor(name)[row].reshape(-1).view(torch.uint8) for name in self._names])
        return torch.cat([weights, _checksum(weights)])

    def write(self, expert: int, sent: torch.Tensor) -> None:
        """What `read` gave on another rank, into the row that `prepare` kept for it. LockstepError when it is not what was sent."""
        coming = self._coming
        if coming is None:
            raise LockstepError(f"expert {expert} came when the change that wanted it had been dropped")
        weights, checksum = sent[:-CHECKSUM_BYTES], sent[-CHECKSUM_BYTES:]
        if not torch.equal(_checksum(weights), checksum):
            raise LockstepError(f"expert {expert} did not arrive as it was sent")
        row, at = coming.held.index(expert), 0
        for name in self._names:
            tensor = coming.tensors.get(name, self._tensor(name))[row]
            tensor.copy_(weights[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            at += tensor.nbytes
        coming.missing.discard(expert)

    # -- another placement ----------------------------------------------------------------------------------------------------

    def prepare(self, slots: Sequence[int]) -> None:
        """Make room for these experts beside the live ones; those that are here already are here at once."""
        wanted = [expert for expert in slots if expert != EMPTY_SLOT]
        missing = [expert for expert in wanted if expert not in self.held]
        live = set(self.slots)
        spare = [row for row, expert in enumerate(self.held) if expert == EMPTY_SLOT or (expert not in live and expert not in wanted)]
        if len(missing) <= len(spare):
            held, tensors = list(self.held), {}
            for expert, row in zip(missing, spare, strict=False):
                held[row] = expert
                self.held[row] = EMPTY_SLOT  # it is being written from now on
        else:
            held = list(slots)
            tensors = {name: self._tensor(name).new_zeros(len(slots), *self._tensor(name).shape[1:]) for name in self._names}
            for row, expert in enumerate(held):
                if expert in self.held:
                    for name, tensor in tensors.items():
                        tensor[row].copy_(self._tensor(name)[self.held.index(expert)])
        self._coming = _Coming(tuple(slots), held, tensors, set(missing))

    def switch(self) -> None:
        """The prepared placement is the live one; what was is kept until `drop`."""
        coming, self._coming = self._coming, None
        assert coming is not None  # noqa: S101
        assert not coming.missing, f"experts {sorted(coming.missing)} have not come"  # noqa: S101
        self._before = _Before(self.slots, self.held, {name: self._tensor(name) for name in coming.tensors})
        self._put(coming.held, coming.tensors)
        self.refer(coming.slots)

    def revert(self) -> None:
        """Undo `switch`."""
        before, self._before = self._before, None
        assert before is not None  # noqa: S101
        self._put(before.held, before.tensors)
        self.refer(before.slots)

    def drop(self) -> None:
        """Free what is not live: what was prepared and not switched to, and what was switched from."""
        self._coming = self._before = None

    def _put(self, held: list[int], tensors: dict[str, torch.Tensor]) -> None:
        self.held = held
        for name, tensor in tensors.items():
            getattr(self._module, name).data = tensor
        self._module.num_experts = len(held)

    def _tensor(self, name: str) -> torch.Tensor:
        return getattr(self._module, name).data


@final
class _Coming:
    """A placement that is being prepared; `tensors` is empty where the live tensors have room."""

    def __init__(self, slots: tuple[int, ...], held: list[int], tensors: dict[str, torch.Tensor], missing: set[int]) -> None:
        self.slots, self.held, self.tensors, self.missing = slots, held, tensors, missing


@final
class _Before:
    """What was live before the last switch."""

    def __init__(self, slots: tuple[int, ...], held: list[int], tensors: dict[str, torch.Tensor]) -> None:
        self.slots, self.held, self.tensors = slots, held, tensors


def _checksum(weights: torch.Tensor) -> torch.Tensor:
    """[CHECKSUM_BYTES] uint8."""
    return torch.tensor(list(bytes.fromhex(tensor_checksum(weights))), dtype=torch.uint8, device=weights.device)
