"""What must hold at every step of an operation, looked at where the shipped scaler takes it; and faults that come with a phase."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elastic.operation import Operation, Outcome, Phase
from raycore.ids import EngineId
from raycore.membership import Membership
from raycore.participation import Stage

if TYPE_CHECKING:
    from tests.simulation.world import Controller

_REPEATED = 0.15
"""Of the answers to the operation come a second time, late."""
_LATE_S = 3.0


class Watch:
    """Stands between a controller's scaler and its operation machine; a controller that is dead is not looked at."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self._world = controller, controller.world
        self._scaler: Any = controller.pool.scaler
        self._lost: set[EngineId] = set()
        self._seen: dict[str, int] = {}
        self._take, self._on_lost, self._answer = self._scaler._take, self._scaler.on_lost, self._scaler.answer
        self._scaler._take, self._scaler.on_lost, self._scaler.answer = self.take, self.on_lost, self.answer
        self._pool: Any = controller.pool
        self._decide, self._pool._decide = self._pool._decide, self.decide
        self._lose, controller.pool.lose = controller.pool.lose, self.lose  # type: ignore[method-assign]

    def take(self, outcome: Outcome) -> None:
        operation = outcome[0]
        seen = self._seen.get(operation.id, 0)
        self._seen[operation.id] = len(operation.transitions)
        if not self._controller.is_dead:
            for number in range(seen, len(operation.transitions)):
                self._check(operation, operation.transitions[number].phase, [step.phase for step in operation.transitions[:number]])
                self._world.on_phase(operation.transitions[number].phase, self._people(operation))
        self._take(outcome)

    def on_lost(self, engine: EngineId, cause: str) -> None:
        before = self._scaler._operation
        self._lost.add(engine)
        self._on_lost(engine, cause)
        after = self._scaler._operation
        if before is None or before.phase.is_decided or engine not in before.participants or self._controller.is_dead:
            return
        goes_on = after is not None and after.id == before.id and after.phase is not Phase.ROLLING_BACK
        self._hold(before, not goes_on, f"{engine} was lost in {before.phase}, and it goes on")

    async def lose(self, engine: EngineId, cause: str) -> None:
        """Only who does not answer is ended; who refuses lives, and says why."""
        self._world.check(not self._is_sound(engine) or "longer than" in cause, f"{engine} answers, and is ended: {cause}")
        await self._lose(engine, cause)

    async def decide(self, membership: Membership) -> None:
        """A pool ends with a rank that it cannot do without, and with no joiner that it can."""
        before, operation, switch = self._pool.membership, self._scaler._operation, self._scaler._switch
        await self._decide(membership)
        now = self._pool.membership
        if switch is not None and now.group is not None and now.group.goes_back:
            self._world.returned.add(switch.stamp)
        if now.lost_with_another() and not before.lost_with_another() and not self._controller.is_dead:
            is_committed = operation is not None and operation.phase is Phase.COMMIT and not operation.goal.leaving
            stay = () if operation is None else operation.goal.stay
            is_late = any("longer than" in departure.cause for departure in now.departed)
            is_whole = is_committed and not is_late and all(self._is_sound(engine) for engine in stay)
            self._world.check(not is_whole, f"the pool ends, and {stay} have all that they had: {now.departed}")

    def _is_sound(self, engine: EngineId) -> bool:
        found = self._world.engines[engine]
        return found.is_alive and found.frozen_until_s <= self._world.loop.time()

    def answer(self, *arguments: Any) -> None:
        self._answer(*arguments)
        if self._world.random.random() < _REPEATED:
            self._world.loop.call_later(self._world.random.uniform(0.0, _LATE_S), self._answer_again, arguments)

    def _answer_again(self, arguments: tuple[Any, ...]) -> None:
        if not self._controller.is_dead:
            self._answer(*arguments)

    def _check(self, operation: Operation, phase: Phase, before: list[Phase]) -> None:
        if phase in (Phase.ROLLING_BACK, Phase.UNDONE):
            went_back = self._scaler._switch is not None and self._scaler._switch.is_returned and self._world.is_expert_parallel
            self._hold(operation, went_back or not any(each.is_decided for each in before), f"it was decided, and is {phase}")
        if phase is Phase.COMMIT:
            self._check_decision(operation)

    def _check_decision(self, operation: Operation) -> None:
        goal, engines = operation.goal, self._world.engines
        membership = self._controller.pool.membership
        lost = self._lost & set(operation.participants)
        self._hold(operation, not lost, f"it is decided without {lost}, who were lost before")
        self._hold(operation, len(operation.joined) == len(goal.joining), f"of {goal.joining} joined {operation.joined}")
        new = [engine for engine in goal.leaving if membership.serves(engine)]
        self._hold(operation, not new, f"{new} leave, and take new requests")
        without = [engine for engine in operation.joined if engines[engine].is_alive and not engines[engine].has_pool_state]
        self._hold(operation, not without, f"{without} join without the pool's state")
        if goal.is_in_lockstep:
            parts = {engine: engines[engine].part for engine in operation.participants if engines[engine].is_alive}
            unready = [engine for engine, part in parts.items() if (part.operation, part.stage) != (operation.id, Stage.READY)]
            self._hold(operation, not unready, f"it is decided, and {unready} are not ready")

    def _people(self, operation: Operation) -> dict[str, list[EngineId]]:
        joiners = [record.engine for record in self._scaler._work.joiners.values()]
        return {"joiner": joiners, "member": list(operation.goal.stay), "leaver": list(operation.goal.leaving)}

    def _hold(self, operation: Operation, holds: bool, text: str) -> None:
        self._world.check(holds, f"operation {operation.id} to {operation.goal.target}: {text}")
