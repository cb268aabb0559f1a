"""A joiner is made like the members of its pool before it is decided that it joins."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from actors.fleet import EngineRecord
from actors.remote import remote_call
from raycore.errors import EngineStartError, EngineStateError, PoolError, RaycoreError
from raycore.ids import EngineId
from raycore.membership import Membership
from raycore.pool_state import PoolState, differences

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.05
"""A call to all ranks reaches them one after the other, within milliseconds unless it loads something."""


class Members(Protocol):
    """Who is asked."""

    @property
    def membership(self) -> Membership:
        """The newest decision."""
        ...

    def record(self, engine: EngineId) -> EngineRecord | None:
        """What is known of a member."""
        ...


async def make_alike(joiner: EngineRecord, members: Members, *, limit_s: float) -> None:
    """Give the joiner the state of the lowest rank, and wait until it agrees with some member's.

    Clients tell a joiner what they tell all ranks from the moment at which the members know of it, and it holds that until it has the
    state; so what is missing in the state comes by itself. A call that is on its way may be at some ranks only: agreeing with one is
    enough, for its client brings the others to it. EngineStateError where ranks in lockstep sleep; EngineStartError for a joiner that
    cannot be made alike.
    """
    engines = [member.engine for member in members.membership.members]
    if not engines:
        return  # whoever had a state is gone
    wanted = await _state_of(_known(members, engines[0]), limit_s)
    if members.membership.is_in_lockstep and wanted.sleep is not None:
        raise EngineStateError("the pool sleeps: ranks that step together cannot be joined now; call wake_up first")
    what = f"{joiner.engine}: the pool's state"
    try:
        has: PoolState = await remote_call(joiner.handle.take_pool_state.remote(wanted), limit_s=limit_s, what=what, engine=joiner.engine)
    except RaycoreError as error:
        message = f"rank {joiner.engine.rank} could not be made like the others: {error}"
        raise EngineStartError(message, rank=joiner.engine.rank, cause=str(error)) from error
    is_first = True
    while True:
        states = await asyncio.gather(*(_state_of(_known(members, engine), limit_s) for engine in engines), return_exceptions=True)
        told = [state for state in states if isinstance(state, PoolState)]
        if any(state.agrees_with(has) for state in told):
            return
        if not told:
            raise next((error for error in states if isinstance(error, RaycoreError)), PoolError("no member tells the pool's state"))
        if is_first:
            logger.info("%s waits for calls on their way: %s", joiner.engine, differences(has, told[0]))
        is_first = False
        await asyncio.sleep(_LOOK_AGAIN_S)
        has = await _state_of(joiner, limit_s)


def _known(members: Members, engine: EngineId) -> EngineRecord:
    record = members.record(engine)
    if record is None:
        message = f"{engine} is no member any more"
        raise PoolError(message)
    return record


async def _state_of(record: EngineRecord, limit_s: float) -> PoolState:
    return await remote_call(record.handle.pool_state.remote(), limit_s=limit_s, what=f"{record.engine}: pool state", engine=record.engine)
