"""One engine core's pool state: what calls to all ranks did here, and such calls that wait because this rank is about to join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raycore import pool_state
from raycore.engine import Engine
from raycore.operations import Arguments, Operation, SleepPhaseArguments, WakeUpArguments
from raycore.pool_state import DoneCall, PoolState

if TYPE_CHECKING:
    from raycore.core.calls import CallToken

Perform = Callable[[str, Arguments], Any]
"""Carries an operation out here and now; raises what it raises."""


@dataclass(slots=True, frozen=True)
class HeldCall:
    """A call to all ranks that came before this rank has the pool's state: carried out then, unless the state has it already."""

    token: CallToken
    operation: Operation
    arguments: Arguments
    call: str


class PoolLog:
    """Owns the state. Used on the step thread only."""

    def __init__(self, engine: Engine, *, is_member: bool) -> None:
        self.state = PoolState()
        self.is_open = is_member
        """Whether calls to all ranks are carried out when they come."""
        self._engine = engine
        self._held: list[HeldCall] = []

    def hold(self, held: HeldCall) -> None:
        """Keep a call until this rank has the pool's state."""
        self._held.append(held)

    def open(self) -> list[HeldCall]:
        """This rank has the pool's state, or is of those that began it; what was held, in order."""
        self.is_open = True
        held, self._held = self._held, []
        return held

    def answer_to(self, call: str) -> DoneCall | None:
        """What was answered when this call was carried out, here or where the state came from."""
        return self.state.answer_to(call) if call else None

    def record(self, call: str, method: str, arguments: Arguments, result: Any) -> None:
        """A call to all ranks was carried out here."""
        self.state = pool_state.after(self.state, call, method, arguments, result)
        loaded = self._engine.utilities().get("list_loras") if method == "add_lora" else None
        if loaded is not None:  # the engine may have put another one away
            self.state = pool_state.with_only(self.state, set(loaded()))

    def record_pause(self, stamp: int) -> None:
        """A pause or resume over all ranks was carried out here."""
        self.state = pool_state.after_pause(self.state, stamp)

    def take(self, wanted: PoolState, perform: Perform, set_paused: Callable[[int], None]) -> None:
        """Make this engine, which is new, like the member whose state this is. What an operation raises leaves the state not taken."""
        for method, arguments in pool_state.calls_before_pause(wanted):
            perform(method, arguments)
        if wanted.pause_stamp > self.state.pause_stamp:
            set_paused(wanted.pause_stamp)
        if wanted.sleep is not None:
            perform("sleep_phase", SleepPhaseArguments(level=wanted.sleep.level, resumes=wanted.sleep.resumes))  # type: ignore[arg-type]
            if wanted.sleep.woken:
                perform("wake_phase", WakeUpArguments(tags=list(wanted.sleep.woken)))  # type: ignore[arg-type]
        stamp = max(wanted.pause_stamp, self.state.pause_stamp)
        self.state = pool_state.PoolState(wanted.version, wanted.loras, wanted.weight_version, wanted.sleep, stamp, wanted.done)
