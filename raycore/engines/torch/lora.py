"""The adapters of one engine: which are loaded, who uses them, and which goes when room is needed. No tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from raycore.engines.torch.adapters import AdapterWeights
from raycore.errors import AdapterError, InvalidArgumentsError


@dataclass(slots=True, eq=False)
class Adapter:
    """One loaded adapter. `namespace` names this load for the prefix cache: another adapter under the same id is another one."""

    lora_id: int
    name: str
    path: str
    weights: AdapterWeights
    namespace: bytes
    is_pinned: bool = False
    users: int = 0
    """Requests that run or wait with it."""


_NAMED = 16
"""Adapters that an error names."""


class LoraRegistry:
    """At most `capacity` adapters, least recently used first; a request keeps its adapter until it ends."""

    def __init__(self, capacity: int, load: Callable[[str], AdapterWeights]) -> None:
        self._capacity = capacity
        self._load = load
        self._adapters: OrderedDict[int, Adapter] = OrderedDict()
        self._loads = 0

    def add(self, lora_id: int, name: str, path: str) -> bool:
        """Load an adapter; it is there afterwards. AdapterError, and nothing is changed, when it is wrong or finds no room.

        The same id, name and path again change nothing; another name or path under a taken id or name is refused.
        """
        if lora_id < 1 or not name:
            raise InvalidArgumentsError(f"an adapter has an id of at least 1 and a name, not {lora_id!r} and {name!r:.200}")
        for other in self._adapters.values():
            if (other.lora_id, other.name, other.path) == (lora_id, name, path):
                self._adapters.move_to_end(lora_id)
                return True
            if other.lora_id == lora_id or other.name == name:
                owner = f"id {other.lora_id} and name {other.name!r:.200} belong to the adapter of {other.path!r:.200}"
                raise AdapterError(f"{owner}; remove it first")
        victim = self._victim()  # before the work of loading, and gone only after it
        weights = self._load(path)
        if victim is not None:
            del self._adapters[victim.lora_id]
        self._loads += 1
        self._adapters[lora_id] = Adapter(lora_id, name, path, weights, f"lora {self._loads}".encode())
        return True

    def remove(self, lora_id: int) -> bool:
        """Forget an adapter; False when there is none of that id. AdapterError while requests use it."""
        adapter = self._adapters.get(lora_id)
        if adapter is None:
            return False
        if adapter.users:
            raise AdapterError(f"adapter {adapter.name!r:.200} is in use by {adapter.users} requests: let them end or abort them first")
        del self._adapters[lora_id]
        return True

    def pin(self, lora_id: int) -> bool:
        """Keep an adapter from eviction until it is removed. AdapterError when there is none of that id."""
        adapter = self._adapters.get(lora_id)
        if adapter is None:
            raise AdapterError(f"no adapter has the id {lora_id}; {self._there_are()}")
        adapter.is_pinned = True
        return True

    def ids(self) -> set[int]:
        """Ids of the loaded adapters."""
        return set(self._adapters)

    def names(self) -> dict[str, int]:
        """Names of the loaded adapters, with their ids."""
        return {adapter.name: adapter.lora_id for adapter in self._adapters.values()}

    def loaded(self) -> list[Adapter]:
        """The loaded adapters, least recently used first."""
        return list(self._adapters.values())

    def find(self, reference: str | int) -> Adapter | None:
        """The adapter of this name or id."""
        if isinstance(reference, int):
            return self._adapters.get(reference)
        return next((a for a in self._adapters.values() if a.name == reference), None)

    def missing(self, reference: str | int | None) -> str:
        """Why a request that names this adapter cannot be served."""
        return f"no LoRA adapter {reference!r:.200} is loaded; {self._there_are()}"

    def acquire(self, adapter: Adapter) -> None:
        """A request uses it from now on."""
        adapter.users += 1
        self._adapters.move_to_end(adapter.lora_id)

    def release(self, adapter: Adapter) -> None:
        """A request of it ended."""
        adapter.users -= 1
        assert adapter.users >= 0  # noqa: S101

    def _victim(self) -> Adapter | None:
        """Which adapter makes room; None when there is room."""
        if len(self._adapters) < self._capacity:
            return None
        for adapter in self._adapters.values():
            if not adapter.is_pinned and not adapter.users:
                return adapter
        if not self._capacity:
            raise AdapterError("this engine takes no adapters: max_loras is 0")
        raise AdapterError(f"no room: all {self._capacity} adapters (max_loras) are pinned or in use; remove one, or wait")

    def _there_are(self) -> str:
        shown = [f"{a.name!r:.80} ({a.lora_id})" for _, a in sorted(self._adapters.items())]
        names = ", ".join(shown[:_NAMED]) + (f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else "")
        return f"there are {names}" if names else "there is none"
