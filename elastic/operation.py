"""One scaling operation as a state machine: events in, the next state and what is to be done out. Pure: no clock, no process, no socket.

The phase table is in `docs/scaling.md`. Who carries commands out tells what came of them as events; an event of another operation, from a
stranger or for the second time changes nothing. Times are the driver's: it passes seconds of a monotonic clock.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping

import msgspec

from raycore.ids import EngineId, Rank


class Phase(enum.StrEnum):
    """Where an operation is; the last two are its ends."""

    RESERVE = "reserve"
    SPAWN = "spawn"
    PREPARE = "prepare"
    READY = "ready"
    COMMIT = "commit"
    RETIRE = "retire"
    ROLLING_BACK = "rolling_back"
    DONE = "done"
    UNDONE = "undone"

    @property
    def is_end(self) -> bool:
        """Whether nothing more happens."""
        return self in {Phase.DONE, Phase.UNDONE}

    @property
    def is_decided(self) -> bool:
        """Whether the new topology will be, whatever fails; but for `returned`."""
        return self in {Phase.COMMIT, Phase.RETIRE, Phase.DONE}


class Goal(msgspec.Struct, frozen=True):
    """Who serves when the operation is done: `joining` ranks that do not yet, `leaving` engines that will not any more."""

    stay: tuple[EngineId, ...]
    joining: tuple[Rank, ...] = ()
    leaving: tuple[EngineId, ...] = ()
    is_in_lockstep: bool = False
    """The ranks step together: leavers take part in the switch too, and a loss before the decision undoes, whoever it is."""

    @property
    def target(self) -> int:
        """Ranks afterwards."""
        return len(self.stay) + len(self.joining)


class Transition(msgspec.Struct, frozen=True):
    """When a phase was entered, in seconds of the driver's clock."""

    phase: Phase
    at_s: float


class Operation(msgspec.Struct, frozen=True):
    """One operation from its start to its end. `waiting`: of whom the phase still expects an answer."""

    id: str
    goal: Goal
    phase: Phase
    limits_s: Mapping[Phase, float]
    transitions: tuple[Transition, ...]
    waiting: frozenset[Rank] = frozenset()
    joined: tuple[EngineId, ...] = ()
    """Joiners that were spawned, with their incarnations."""
    error: str = ""
    laggards: tuple[Rank, ...] = ()
    """Who had not answered when a phase's time was over."""
    ignored: int = 0
    """Answers that were late, repeated or from strangers."""

    @property
    def due_s(self) -> float:
        """When the phase's time is over."""
        return self.transitions[-1].at_s + self.limits_s.get(self.phase, float("inf"))

    @property
    def participants(self) -> tuple[EngineId, ...]:
        """Everyone who prepares and switches: members that stay, and joiners."""
        return (*self.goal.stay, *self.joined)


class Command(enum.Enum):
    """What the driver must do now; each is done for everyone in `Operation.waiting` unless it says otherwise."""

    RESERVE = "reserve"
    """A placement group for each joining rank."""
    SPAWN = "spawn"
    """An engine core on each group."""
    PREPARE = "prepare"
    """Ask every participant to prepare."""
    COMPARE = "compare"
    """Bring every joiner to the pool state's newest version."""
    DECIDE = "decide"
    """Give every participant the new membership."""
    RETIRE = "retire"
    """Drain, move, stop and put away every leaver."""
    UNDO = "undo"
    """Undo whatever the participants prepared, put away every joiner, let the leavers serve again."""
    REPORT = "report"
    """Tell whoever waits for the operation."""


Outcome = tuple[Operation, tuple[Command, ...]]


def begin(operation_id: str, goal: Goal, limits_s: Mapping[Phase, float], now_s: float) -> Outcome:
    """A new operation; one that only shrinks has nothing to reserve or spawn."""
    operation = Operation(operation_id, goal, Phase.RESERVE, limits_s, ())
    if not goal.joining and not goal.leaving:
        return _enter(operation, Phase.DONE, now_s)
    return _enter(operation, Phase.RESERVE if goal.joining else Phase.PREPARE, now_s)


def answered(operation: Operation, phase: Phase, rank: Rank, now_s: float, engine: EngineId | None = None) -> Outcome:
    """`rank` has done what `phase` asked of it; with SPAWN, `engine` says as whom."""
    if phase is not operation.phase or rank not in operation.waiting:
        return msgspec.structs.replace(operation, ignored=operation.ignored + 1), ()
    joined = operation.joined if engine is None else (*operation.joined, engine)
    operation = msgspec.structs.replace(operation, waiting=operation.waiting - {rank}, joined=joined)
    return (operation, ()) if operation.waiting else _enter(operation, _NEXT[phase], now_s)


def failed(operation: Operation, cause: str, now_s: float) -> Outcome:
    """Something that the operation cannot do without went wrong: undone before the decision, ignored after it."""
    if operation.phase.is_decided or operation.phase in {Phase.ROLLING_BACK, Phase.UNDONE}:
        return operation, ()
    return _enter(msgspec.structs.replace(operation, error=f"{operation.phase}: {cause}"), Phase.ROLLING_BACK, now_s)


def cancelled(operation: Operation, now_s: float) -> Outcome:
    """Somebody wants it undone; too late after the decision."""
    return failed(operation, "cancelled", now_s)


def died(operation: Operation, engine: EngineId, cause: str, now_s: float) -> Outcome:
    """An engine core is gone. A leaver is what was wanted; anyone else undoes before the decision and is not waited for after it."""
    if operation.phase.is_end:
        return operation, ()
    if engine in operation.goal.leaving:
        if operation.goal.is_in_lockstep and operation.phase in {Phase.PREPARE, Phase.READY}:
            return failed(operation, f"{engine} died, and with it the groups in which the others step: {cause}", now_s)
        goal = msgspec.structs.replace(operation.goal, leaving=tuple(e for e in operation.goal.leaving if e != engine))
        operation = msgspec.structs.replace(operation, goal=goal)
        return _no_longer(operation, engine.rank, now_s) if operation.phase in {Phase.RETIRE, Phase.ROLLING_BACK} else (operation, ())
    if engine not in operation.participants:
        return operation, ()
    if operation.phase is Phase.COMMIT or operation.phase is Phase.ROLLING_BACK:
        return _no_longer(operation, engine.rank, now_s)
    return failed(operation, f"{engine} died: {cause}", now_s)


def expired(operation: Operation, now_s: float) -> Outcome:
    """The phase's time is over, if it is: before the decision that undoes; later the laggards are named and the driver ends them."""
    if operation.phase.is_end or now_s < operation.due_s:
        return operation, ()
    laggards = tuple(sorted(operation.waiting))
    operation = msgspec.structs.replace(operation, laggards=(*operation.laggards, *laggards))
    names = ", ".join(f"rank {rank}" for rank in laggards) or "the controller"
    if operation.phase in {Phase.COMMIT, Phase.RETIRE, Phase.ROLLING_BACK}:
        return _enter(msgspec.structs.replace(operation, waiting=frozenset()), _NEXT[operation.phase], now_s)
    limit_s = operation.limits_s[operation.phase]
    return failed(operation, f"{names} took longer than {limit_s:g} s", now_s)


def returned(operation: Operation, cause: str, now_s: float) -> Outcome:
    """The members were told to go back to where they were, for a joiner was lost on which the new topology depends: it is undone.

    The one way from the decision to an undo. Who decides it has not told anybody to let go of what was before, and will not.
    """
    if operation.phase is not Phase.COMMIT:
        return operation, ()
    return _enter(msgspec.structs.replace(operation, error=f"{operation.phase}: {cause}"), Phase.ROLLING_BACK, now_s)


def taken_over(operation: Operation, decided: Iterable[EngineId], now_s: float) -> Outcome:
    """A new controller found these participants holding the decision: any, and it is finished; none, and it is undone."""
    if operation.phase.is_end:
        return operation, ()
    if any(True for _ in decided):
        if operation.phase is Phase.ROLLING_BACK:
            msg = f"operation {operation.id} is being undone, and somebody holds its decision"
            raise ValueError(msg)
        return _enter(operation, Phase.COMMIT, now_s)
    if operation.phase.is_decided:
        msg = f"operation {operation.id} is in {operation.phase}, and nobody holds its decision"
        raise ValueError(msg)
    return failed(operation, "the controller was lost", now_s)


_NEXT = {
    Phase.RESERVE: Phase.SPAWN,
    Phase.SPAWN: Phase.PREPARE,
    Phase.PREPARE: Phase.READY,
    Phase.READY: Phase.COMMIT,
    Phase.COMMIT: Phase.RETIRE,
    Phase.RETIRE: Phase.DONE,
    Phase.ROLLING_BACK: Phase.UNDONE,
}
_COMMANDS = {
    Phase.RESERVE: Command.RESERVE,
    Phase.SPAWN: Command.SPAWN,
    Phase.PREPARE: Command.PREPARE,
    Phase.READY: Command.COMPARE,
    Phase.COMMIT: Command.DECIDE,
    Phase.RETIRE: Command.RETIRE,
    Phase.ROLLING_BACK: Command.UNDO,
    Phase.DONE: Command.REPORT,
    Phase.UNDONE: Command.REPORT,
}


def _enter(operation: Operation, phase: Phase, now_s: float) -> Outcome:
    """Go to a phase, and on through those that have nothing to wait for."""
    commands: list[Command] = []
    while True:
        transitions = (*operation.transitions, Transition(phase, now_s))
        operation = msgspec.structs.replace(operation, phase=phase, transitions=transitions, waiting=_expected(operation, phase))
        commands.append(_COMMANDS[phase])
        if phase.is_end or operation.waiting:
            return operation, tuple(commands)
        phase = _NEXT[phase]


def _expected(operation: Operation, phase: Phase) -> frozenset[Rank]:
    goal = operation.goal
    match phase:
        case Phase.RESERVE | Phase.SPAWN:
            return frozenset(goal.joining)
        case Phase.PREPARE | Phase.COMMIT:
            leavers = goal.leaving if goal.is_in_lockstep and phase is Phase.PREPARE else ()
            return frozenset(engine.rank for engine in (*operation.participants, *leavers))
        case Phase.READY:
            return frozenset(engine.rank for engine in operation.joined)
        case Phase.RETIRE:
            return frozenset(engine.rank for engine in goal.leaving)
        case Phase.ROLLING_BACK:
            return frozenset({*(e.rank for e in goal.stay), *(e.rank for e in goal.leaving), *goal.joining})
        case _:
            return frozenset()


def _no_longer(operation: Operation, rank: Rank, now_s: float) -> Outcome:
    """Nobody waits for this rank any more."""
    joined = tuple(engine for engine in operation.joined if engine.rank != rank)
    stay = tuple(engine for engine in operation.goal.stay if engine.rank != rank)
    goal = msgspec.structs.replace(operation.goal, stay=stay)
    was_waited_for = rank in operation.waiting
    operation = msgspec.structs.replace(operation, goal=goal, joined=joined, waiting=operation.waiting - {rank})
    if operation.waiting or not was_waited_for:
        return operation, ()
    return _enter(operation, _NEXT[operation.phase], now_s)
