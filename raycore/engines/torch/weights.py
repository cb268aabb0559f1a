"""The model's weights: where they are now, what they take, and how they go and come back.

The modules stay as they are and keep their parameters; only the parameters' data moves, so that whatever refers to the model
still does afterwards. Buffers stay: they are small, and some are computed when a model is made and stored nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from raycore.errors import ConfigurationError, EngineStateError


class Weights:
    """Moves and drops the parameters of one model; `reload` loads its checkpoint anew, onto the same device."""

    def __init__(self, model: PreTrainedModel, reload: Callable[[], PreTrainedModel]) -> None:
        self.model = model
        self.version: str | None = None
        self._reload = reload
        self._host: dict[str, torch.Tensor] = {}
        self._is_here = True
        self.measure()
        self._buffer_bytes = sum(b.nbytes for b in model.buffers())

    def measure(self) -> None:
        """Note the sizes, again where parameters have got other ones."""
        self._facts = {name: (p.dtype, p.shape) for name, p in self.model.named_parameters()}
        self._own_bytes = sum(p.nbytes for p in self.model.parameters())

    @property
    def device_bytes(self) -> int:
        """Bytes on the engine's device now."""
        return self._buffer_bytes + (self._own_bytes if self._is_here else 0)

    @property
    def host_bytes(self) -> int:
        """Bytes of the copies in host memory while the weights are away."""
        return sum(tensor.nbytes for tensor in self._host.values())

    def present(self) -> PreTrainedModel:
        """The model with its weights. EngineStateError while they are away."""
        if not self._is_here:
            raise EngineStateError("the weights are away while the engine sleeps: call wake_up first")
        return self.model

    def to_host(self) -> None:
        """Copy the weights to host memory and free them on the device; on a CPU they are there already and stay."""
        if self.model.device.type == "cpu":
            return
        # Page-locked memory is copied to and from at several times the speed, but locking it costs time once: `docs/torch-engine.md`.
        host = {name: torch.empty(p.shape, dtype=p.dtype, pin_memory=True) for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            host[name].copy_(parameter.data, non_blocking=True)
        torch.cuda.synchronize(self.model.device)
        self._host = host
        self._forget()

    def drop(self) -> None:
        """Free the weights; they come back from the checkpoint."""
        self._forget()

    def restore(self) -> None:
        """Bring back what `to_host` or `drop` took away. What goes wrong leaves them away.

        EngineStateError when the checkpoint is gone or is another one now.
        """
        if self._is_here:
            return
        if self._host:
            device = self.model.device
            source = {name: tensor.to(device, non_blocking=True) for name, tensor in self._host.items()}
            torch.cuda.synchronize(device)
        else:
            source = self._from_checkpoint()
        for name, parameter in self.model.named_parameters():
            parameter.data = source[name]
        self._host = {}
        self._is_here = True

    def _from_checkpoint(self) -> dict[str, torch.Tensor]:
        try:
            fresh = self._reload()
        except ConfigurationError as error:
            raise EngineStateError(f"the weights cannot be read again: {error}; put the checkpoint back and call wake_up again") from error
        source = {name: p.data for name, p in fresh.named_parameters()}
        facts = {name: (tensor.dtype, tensor.shape) for name, tensor in source.items()}
        wrong = sorted(name for name in {*facts, *self._facts} if facts.get(name) != self._facts.get(name))
        if wrong:
            raise EngineStateError(
                f"the checkpoint is another one now: {wrong[0]} was {self._facts.get(wrong[0])}, is {facts.get(wrong[0])}"
            )
        return source

    def _forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)
        self._is_here = False
