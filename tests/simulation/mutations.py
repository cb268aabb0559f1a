"""Faults put into the shipped logic, each of which the schedules must find."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec

from actors import operation_work, pool_controller, scaling
from actors.operation_work import OperationWork
from actors.scaling import PoolScaler
from actors.switching import GroupSwitch
from elastic import operation as machine
from elastic.operation import Operation, Outcome, Phase
from raycore import participation, waves
from raycore.errors import PoolError, RaycoreError
from raycore.ids import Epoch
from raycore.membership import Membership, MemberState
from raycore.participation import Part
from raycore.waves import Verdict, Wave, WaveStep
from tests.simulation.experts import SimExpertEngine

Mutation = Callable[[], contextlib.AbstractContextManager[Any]]


async def _nothing(*_args: Any, **_named: Any) -> None:
    """Do nothing."""


def an_undo_is_not_sent() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(GroupSwitch, "undo", _nothing)


def an_undo_does_not_drop() -> contextlib.AbstractContextManager[Any]:
    real = participation.on_undo

    def keeps(*args: Any) -> Part:
        return msgspec.structs.replace(real(*args), drops=None)

    return mock.patch.object(participation, "on_undo", keeps)


def old_groups_are_never_released() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(waves, "on_released", lambda wave, _stamp: WaveStep(wave, is_stale=True))


def a_switch_does_not_wait_for_the_vote() -> contextlib.AbstractContextManager[Any]:
    real = waves._decided

    def at_once(wave: Wave) -> WaveStep:
        step = real(wave)
        return WaveStep(waves._switched(step.wave, keeps=True)) if step.wave.is_decided else step

    return mock.patch.object(waves, "_decided", at_once)


def all_votes_but_one_are_enough() -> contextlib.AbstractContextManager[Any]:
    real = waves.verdict

    def nearly(wave: Wave, sums: Any) -> Verdict:
        said = real(wave, sums)
        votes = sums[len(waves.Column) :]
        return msgspec.structs.replace(
            said, carried=tuple(slot for slot, count in enumerate(votes) if count and count >= len(wave.members) - 1)
        )

    return mock.patch.object(waves, "verdict", nearly)


def a_decided_operation_is_undone() -> contextlib.AbstractContextManager[Any]:
    def failed(operation: Operation, cause: str, now_s: float) -> Outcome:
        if operation.phase in {Phase.ROLLING_BACK, Phase.UNDONE, Phase.DONE}:
            return operation, ()
        changed = msgspec.structs.replace(operation, error=f"{operation.phase}: {cause}")
        return machine._enter(changed, Phase.ROLLING_BACK, now_s)

    return mock.patch.object(machine, "failed", failed)


def a_death_is_not_heard() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(machine, "died", lambda operation, *_args: (operation, ()))


def a_phase_has_no_deadline() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(machine, "expired", lambda operation, _now_s: (operation, ()))


def an_answer_counts_for_another_phase() -> contextlib.AbstractContextManager[Any]:
    real = machine.answered

    def any_phase(operation: Operation, phase: Phase, rank: Any, now_s: float, engine: Any = None) -> Outcome:
        return (
            real(operation, operation.phase, rank, now_s, engine)
            if phase is not Phase.SPAWN
            else real(operation, phase, rank, now_s, engine)
        )

    return mock.patch.object(machine, "answered", any_phase)


def joiners_are_not_put_away() -> contextlib.AbstractContextManager[Any]:
    real = OperationWork._undo

    async def forgets(self: OperationWork, operation: Operation) -> None:
        self.joiners = {}
        await real(self, operation)

    return mock.patch.object(OperationWork, "_undo", forgets)


def leavers_do_not_serve_again() -> contextlib.AbstractContextManager[Any]:
    def keeps(membership: Membership, changes: Any, was: Any = None) -> Membership:
        back = MemberState.SERVING
        kept = {engine: state for engine, state in changes.items() if state is not back}
        return real(membership, kept, {} if was is None else was)

    real = operation_work.with_states
    return mock.patch.object(operation_work, "with_states", keeps)


def leavers_take_new_requests() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(
        scaling, "with_states", lambda membership, *_args: msgspec.structs.replace(membership, epoch=Epoch(membership.epoch + 1))
    )


def a_lower_term_is_not_fenced() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(participation, "_fence", return_value=None)


def an_answer_counts_for_the_next_operation() -> contextlib.AbstractContextManager[Any]:
    def counts(self: Any, operation: Operation, phase: Phase, rank: Any, engine: Any = None) -> None:
        del operation
        if self._operation is not None:
            self._take(machine.answered(self._operation, phase, rank, self._now(), engine))

    return mock.patch.object(PoolScaler, "answer", counts)


def a_refusal_is_a_loss() -> contextlib.AbstractContextManager[Any]:
    real = GroupSwitch.keep

    async def keep(self: GroupSwitch, operation: Operation) -> dict[Any, RaycoreError]:
        return {engine: PoolError(str(error)) for engine, error in (await real(self, operation)).items()}

    return mock.patch.object(GroupSwitch, "keep", keep)


def what_failed_leaves_others_running() -> contextlib.AbstractContextManager[Any]:
    async def gather(work: Any) -> Any:
        return await asyncio.gather(*work)

    return mock.patch.object(operation_work, "all_of", gather)


def a_successor_takes_the_oldest_view() -> contextlib.AbstractContextManager[Any]:
    from actors import roster

    def oldest(views: Any, pool: str) -> Membership:
        found = list(views)
        return min(found, key=lambda view: (view.term, view.epoch)) if found else Membership(pool=pool)

    return mock.patch.object(roster, "newest", oldest)


def epochs_are_used_twice() -> contextlib.AbstractContextManager[Any]:
    real = pool_controller.PoolController._decide

    async def decide(self: Any, membership: Membership) -> None:
        self._reserved_epoch = Epoch(0)
        await real(self, membership)

    return mock.patch.object(pool_controller.PoolController, "_decide", decide)


def a_lost_joiner_ends_the_pool() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(GroupSwitch, "without_joiners", return_value=None)


def who_went_back_is_told_to_let_go() -> contextlib.AbstractContextManager[Any]:
    real = PoolScaler.on_returned

    def on_returned(self: PoolScaler, joiners: Any, cause: str) -> None:
        switch = self._switch
        real(self, joiners, cause)
        if switch is not None and self._operation is not None and self._work is not None:
            self._work.spawn(switch.release(), self._operation)

    return mock.patch.object(PoolScaler, "on_returned", on_returned)


def experts_are_not_taken_back() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(SimExpertEngine, "switch_back", SimExpertEngine.release)


ALL: tuple[Mutation, ...] = (
    an_undo_is_not_sent,
    an_undo_does_not_drop,
    old_groups_are_never_released,
    a_switch_does_not_wait_for_the_vote,
    all_votes_but_one_are_enough,
    a_decided_operation_is_undone,
    a_death_is_not_heard,
    a_phase_has_no_deadline,
    an_answer_counts_for_another_phase,
    joiners_are_not_put_away,
    leavers_do_not_serve_again,
    leavers_take_new_requests,
    a_lower_term_is_not_fenced,
    an_answer_counts_for_the_next_operation,
    a_refusal_is_a_loss,
    what_failed_leaves_others_running,
    a_successor_takes_the_oldest_view,
    epochs_are_used_twice,
    a_lost_joiner_ends_the_pool,
    who_went_back_is_told_to_let_go,
    experts_are_not_taken_back,
)

QUICK: tuple[Mutation, ...] = (
    an_undo_is_not_sent,
    an_undo_does_not_drop,
    old_groups_are_never_released,
    a_switch_does_not_wait_for_the_vote,
    all_votes_but_one_are_enough,
    a_death_is_not_heard,
    a_phase_has_no_deadline,
    joiners_are_not_put_away,
    leavers_do_not_serve_again,
    leavers_take_new_requests,
    what_failed_leaves_others_running,
    a_successor_takes_the_oldest_view,
    a_lost_joiner_ends_the_pool,
    who_went_back_is_told_to_let_go,
)
"""Found within some tens of seeds; `python -m tests.simulation --mutations` tries all."""
