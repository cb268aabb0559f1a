"""An engine that keeps what utility calls make of it, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.scripted import ScriptedEngine


class StatefulEngine(ScriptedEngine):
    """Keeps what calls make of an engine, refuses to be told twice, and to step while it sleeps."""

    def __init__(self, max_loras: int = 4) -> None:
        super().__init__()
        self.loras: dict[int, str] = {}
        self.pinned: set[int] = set()
        self.version: str | None = None
        self.away: set[str] = set()
        self.calls: list[str] = []
        self._max_loras = max_loras
        self.rpc["steps"] = lambda: sum(what == "step" for what, _ in self.log)
        self.rpc["what_it_is"] = lambda: [sorted(self.loras.items()), sorted(self.pinned), self.version, sorted(self.away)]
        self.methods = {
            "add_lora": self._add,
            "remove_lora": self._remove,
            "pin_lora": self._pin,
            "list_loras": lambda: set(self.loras),
            "set_weight_version": self._set_version,
            "get_weight_version": lambda: self.version,
            "sleep": self._sleep,
            "wake_up": self._wake_up,
            "reset_prefix_cache": lambda **_arguments: True,
        }

    def step(self) -> Any:
        assert not self.away, "a step of a sleeping engine"
        return super().step()

    def what_it_is(self) -> tuple[Any, ...]:
        return self.loras, self.pinned, self.version, self.away

    def _add(self, lora_id: int, name: str, path: str) -> bool:
        self.calls.append("add_lora")
        assert lora_id not in self.loras, "loaded twice"
        if path.startswith("/tmp") or path == "/missing":
            Path(path).stat()
        if len(self.loras) == self._max_loras:
            self.loras.pop(next(iter(self.loras)))
        self.loras[lora_id] = f"{name} of {path}"
        return True

    def _remove(self, lora_id: int) -> bool:
        self.calls.append("remove_lora")
        return self.loras.pop(lora_id, None) is not None

    def _pin(self, lora_id: int) -> bool:
        self.pinned.add(lora_id)
        return True

    def _set_version(self, version: str) -> None:
        self.calls.append("set_weight_version")
        self.version = version

    def _sleep(self, level: int) -> None:
        assert level
        assert not self.away, "asleep twice"
        self.away = {"weights", "kv_cache"}

    def _wake_up(self, tags: list[str] | None) -> bool:
        self.away -= set(tags or self.away)
        return not self.away


def make(**_: Any) -> StatefulEngine:
    """As an engine factory of a pool."""
    return StatefulEngine()
