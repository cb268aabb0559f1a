"""Pool state: what calls to all ranks have made of a pool's engines, so that a rank that joins can be made alike. Pure.

Every member keeps one: each call that changes engines and went to all ranks appends to it. A joiner takes a member's, and is compared
with the members' before it is decided that it joins (`docs/scaling.md`). What leaves nothing behind (a cleared cache) is only remembered
as done.
"""

from __future__ import annotations

from typing import Any

import msgspec

from raycore.operations import (
    AddLoraArguments,
    Arguments,
    LoraIdArguments,
    SleepPhaseArguments,
    WakeReport,
    WakeUpArguments,
    WeightVersionArguments,
)

_DONE_KEPT = 256
"""Calls that are remembered by their name: more than can be on their way to a rank that takes the state."""


class LoraState(msgspec.Struct, frozen=True, array_like=True):
    """A loaded adapter."""

    lora_id: int
    name: str
    path: str
    is_pinned: bool = False


class SleepState(msgspec.Struct, frozen=True, array_like=True):
    """How the pool sleeps: `resumes`: whether waking up ends the pause; `woken`: what has been brought back already."""

    level: int
    resumes: bool
    woken: tuple[str, ...] = ()


class DoneCall(msgspec.Struct, frozen=True, array_like=True):
    """A call to all ranks that was carried out: its client's name for it, and the answer."""

    call: str
    result: Any = None


class PoolState(msgspec.Struct, frozen=True, array_like=True):
    """One rank's view; `version` counts the calls and decisions behind it."""

    version: int = 0
    loras: tuple[LoraState, ...] = ()
    """In the order in which they were loaded."""
    weight_version: str | None = None
    sleep: SleepState | None = None
    pause_stamp: int = 0
    """The last pause or resume over all ranks."""
    done: tuple[DoneCall, ...] = ()

    def agrees_with(self, other: PoolState) -> bool:
        """Whether two ranks are alike, whatever the order in which they were told."""
        return _content(self) == _content(other)

    def answer_to(self, call: str) -> DoneCall | None:
        """What a call that was carried out was answered."""
        return next((done for done in reversed(self.done) if done.call == call), None)


def after(state: PoolState, call: str, method: str, arguments: Arguments, result: Any) -> PoolState:
    """The state when `call` has been carried out with this result."""
    done = (*state.done, DoneCall(call, msgspec.to_builtins(result)))[-_DONE_KEPT:]
    changes: dict[str, Any] = {"version": state.version + 1, "done": done}
    match arguments:
        case AddLoraArguments() if result:
            changes["loras"] = _with_lora(state.loras, arguments)
        case LoraIdArguments() if method == "pin_lora" and result:
            changes["loras"] = _pinned(state.loras, arguments.lora_id)
        case LoraIdArguments() if method == "remove_lora":
            changes["loras"] = tuple(adapter for adapter in state.loras if adapter.lora_id != arguments.lora_id)
        case WeightVersionArguments():
            changes["weight_version"] = arguments.version
        case SleepPhaseArguments():
            changes["sleep"] = SleepState(arguments.level, arguments.resumes)
        case WakeUpArguments():
            changes["sleep"] = _woken(state.sleep, arguments, result)
        case _:
            pass
    return msgspec.structs.replace(state, **changes)


def after_pause(state: PoolState, stamp: int) -> PoolState:
    """The state when a pause or resume over all ranks was carried out; one that is asked for during sleep outlasts the sleep."""
    sleep = state.sleep if state.sleep is None else msgspec.structs.replace(state.sleep, resumes=False)
    return msgspec.structs.replace(state, version=state.version + 1, pause_stamp=stamp, sleep=sleep)


def with_only(state: PoolState, lora_ids: set[int]) -> PoolState:
    """The state without adapters that the engine has put away to make room."""
    return msgspec.structs.replace(state, loras=tuple(adapter for adapter in state.loras if adapter.lora_id in lora_ids))


def calls_before_pause(wanted: PoolState) -> list[tuple[str, Arguments]]:
    """What makes a new engine like `wanted`, in order, its pause and sleep aside."""
    calls: list[tuple[str, Arguments]] = []
    for adapter in wanted.loras:
        calls.append(("add_lora", AddLoraArguments(lora_id=adapter.lora_id, name=adapter.name, path=adapter.path)))
        if adapter.is_pinned:
            calls.append(("pin_lora", LoraIdArguments(lora_id=adapter.lora_id)))
    if wanted.weight_version is not None:
        calls.append(("set_weight_version", WeightVersionArguments(version=wanted.weight_version)))
    return calls


def differences(state: PoolState, other: PoolState) -> str:
    """For people: where two states do not agree."""
    mine, theirs = _content(state), _content(other)
    return ", ".join(f"{name}: {mine[name]!r:.200} and {theirs[name]!r:.200}" for name in mine if mine[name] != theirs[name])


def _content(state: PoolState) -> dict[str, Any]:
    loras = sorted((a.lora_id, a.name, a.path, a.is_pinned) for a in state.loras)
    return {"adapters": loras, "weight version": state.weight_version, "sleep": state.sleep, "pause": state.pause_stamp}


def _with_lora(loras: tuple[LoraState, ...], arguments: AddLoraArguments) -> tuple[LoraState, ...]:
    if any(adapter.lora_id == arguments.lora_id for adapter in loras):
        return loras  # loaded already
    return (*loras, LoraState(arguments.lora_id, arguments.name, arguments.path))


def _pinned(loras: tuple[LoraState, ...], lora_id: int) -> tuple[LoraState, ...]:
    return tuple(msgspec.structs.replace(a, is_pinned=a.is_pinned or a.lora_id == lora_id) for a in loras)


def _woken(sleep: SleepState | None, arguments: WakeUpArguments, result: Any) -> SleepState | None:
    is_awake = result.is_awake if isinstance(result, WakeReport) else bool(result)
    if sleep is None or is_awake:
        return None
    return msgspec.structs.replace(sleep, woken=tuple(sorted({*sleep.woken, *(arguments.tags or ())})))
