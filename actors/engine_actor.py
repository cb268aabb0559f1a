"""The engine actor: one `EngineHost` behind Ray calls. It holds no decision of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import ray

from actors.setup import EngineSetup
from actors.weights import Giver, RayPeer
from raycore.client.control import PoolAccess
from raycore.config import log_level
from raycore.engine import EngineInfo
from raycore.engines.expert_change import ExpertReport
from raycore.errors import EngineStartError, EngineStateError
from raycore.groups import GroupKind
from raycore.ids import EngineId, GroupStamp, Rank, Term
from raycore.load_progress import LoadProgress, WeightProgress, load_progress
from raycore.logs import log_everything_as, rank_name
from raycore.membership import GroupAddress, Member, Membership, ReconfigureDistributedRequest
from raycore.pool_state import PoolState
from raycore.weight_copies import WeightOffer, WeightRequest, WeightTerms

if TYPE_CHECKING:
    from raycore.core.host import EngineHost

_RAY_SETS = "OMP_NUM_THREADS"
"""Ray gives this to every worker, so that it being set says nothing about the node's wishes."""

_DRAIN_POLL_S = 0.01
_REBALANCING_POLL_S = 0.05

Result = TypeVar("Result")


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller that was restarted needs of an engine to adopt it."""

    engine: EngineId
    pid: int
    node_id: str
    group_id: str
    member: Member | None
    membership: Membership


# An async actor with concurrency groups: each group has an event loop of its own, so a stuck control call cannot hide
# the health group, and an outstanding watch call costs a coroutine, not a thread (a threaded actor would need one per client).
_OPTIONS: dict[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    # Copies of weights last long, and a joiner waits until all its senders have come: calls that queued could wait for one another.
    "concurrency_groups": {"control": 16, "weights": 1_000, "watch": 10_000, "health": 2},
}


@ray.remote(**_OPTIONS)
class EngineActor:
    """One rank of a pool. Created on its ready placement group; ends by `ray.kill` after `stop`."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self._host: EngineHost | None = None
        self._warm: EngineHost | None = None
        self._starting: EngineHost | None = None
        """The one whose weights are being loaded, or were last."""
        self._member: Member | None = None
        self._ended: concurrent.futures.Future[str] = concurrent.futures.Future()
        _set_where_absent(setup.environment)

    def __repr__(self) -> str:
        return f"rank {self._setup.spec.rank} {self._setup.spec.pool}"

    @ray.method(concurrency_group="control")
    async def start(self, givers: Sequence[Giver] = ()) -> Member:
        """Load the engine, bind its sockets and begin to step; raises what the engine raises. `givers`: who serves already."""
        member: Member = await asyncio.wrap_future(_in_thread("raycore-start", lambda: self._start_host(givers)))
        return self._begin_steps(member)

    def _begin_steps(self, member: Member) -> Member:
        self._member = member
        _in_thread("raycore-steps", self._step_until_stopped)
        return member

    @ray.method(concurrency_group="control")
    async def get_ready(self, members: EngineInfo | None, is_standby: bool) -> int:
        """Have up what takes long and needs no weights, before `warm` or `start`; the process's pid. `members`: their engines."""
        await asyncio.wrap_future(_in_thread("raycore-ready", lambda: self._ready_host(members, is_standby=is_standby)))
        return os.getpid()

    @ray.method(concurrency_group="control")
    async def warm(self, givers: Sequence[Giver] = ()) -> None:
        """Have everything up that needs no rank, for a standby. Raises what the engine raises."""
        host = self._warm
        if host is not None:
            await asyncio.wrap_future(_in_thread("raycore-warm", lambda: host.warm([RayPeer(giver) for giver in givers])))

    @ray.method(concurrency_group="control")
    async def promote(self, rank: Rank, givers: Sequence[Giver] = ()) -> Member:
        """`start` as this rank."""
        self._setup = self._setup.as_rank(rank)
        member: Member = await asyncio.wrap_future(_in_thread("raycore-start", lambda: self._start_host(givers)))
        return self._begin_steps(member)

    @ray.method(concurrency_group="watch")
    async def wait_closed(self) -> str:
        """The sentinel call of the controller and of every client: pending while the engine core steps, failing by Ray with the process.

        Returns "stopped" after `stop`; raises what the engine raised.
        """
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    @ray.method(concurrency_group="control")
    async def membership(self) -> Membership:
        """What this engine holds."""
        return self._held()

    @ray.method(concurrency_group="control")
    async def set_membership(self, membership: Membership) -> Membership:
        """Offer a membership; returns what is held now, which is newer when the offer was stale."""
        return self._started().set_membership(membership)

    @ray.method(concurrency_group="control")
    async def pool_state(self) -> PoolState:
        """What calls to all ranks have made of this engine."""
        return await asyncio.wrap_future(self._started().core.pool_state())

    @ray.method(concurrency_group="control")
    async def take_pool_state(self, state: PoolState) -> PoolState:
        """Become like the member whose state this is, before joining; raises what the engine raises."""
        self._started().check_version(state.weight_version)
        return await asyncio.wrap_future(self._started().core.take_pool_state(state))

    @ray.method(concurrency_group="weights")
    async def weight_offer(self) -> WeightOffer | None:
        """What a rank that joins can have from here; None: nothing."""
        giving = self._started().giving
        return await asyncio.wrap_future(_in_thread("raycore-offer", giving.offer))

    @ray.method(concurrency_group="weights")
    async def weight_terms(self) -> WeightTerms | None:
        """The same in short."""
        giving = self._started().giving
        return await asyncio.wrap_future(_in_thread("raycore-offer", giving.terms))

    @ray.method(concurrency_group="weights")
    async def give_weights(self, request: WeightRequest) -> int:
        """Send a joiner its share while steps go on; the bytes."""
        giving = self._started().giving
        return await asyncio.wrap_future(_in_thread("raycore-weights", lambda: giving.give(request)))

    @ray.method(concurrency_group="control")
    async def end_giving(self, joiner: EngineId) -> None:
        """This joiner is gone: what is being sent to it is given up."""
        self._started().giving.end(joiner)

    @ray.method(concurrency_group="control")
    async def expert_report(self, limit_s: float) -> ExpertReport:
        """Where the experts of an expert-parallel model are, and how much this rank's tokens wanted each; once no rebalancing runs.

        EngineStateError when one still runs after `limit_s` seconds.
        """
        core, clock = self._started().core, asyncio.get_running_loop().time
        until_s = clock() + limit_s
        while True:
            answers = await asyncio.wrap_future(core.ask_engine("expert_placement", "expert_load", "expert_traffic"))
            placement, load, traffic = answers
            if not traffic["is_rebalancing"]:
                return ExpertReport(placement, load)
            if clock() > until_s:
                message = f"rank {self._setup.spec.rank} still rebalances its experts after {limit_s:g} s"
                raise EngineStateError(message)
            await asyncio.sleep(_REBALANCING_POLL_S)

    @ray.method(concurrency_group="control")
    async def allocate_stateless_group_ports(self, membership: Membership, kinds: tuple[GroupKind, ...]) -> GroupAddress:
        """Bind the listeners of an epoch's groups, whose group rank 0 this is, and serve their stores (ranks in lockstep)."""
        groups = self._started().groups
        return await asyncio.wrap_future(_in_thread("raycore-stores", lambda: groups.open_stores_of(membership, kinds)))

    @ray.method(concurrency_group="control")
    async def group_formed(self, stamp: GroupStamp) -> None:
        """Wait until this engine has the process groups of this stamp, and where they were switched to, until a round in them is complete.

        LockstepError when they were not formed, or were overtaken by newer ones.
        """
        await asyncio.shield(asyncio.wrap_future(self._started().groups.formed(stamp)))

    @ray.method(concurrency_group="control")
    async def reconfigure(self, request: ReconfigureDistributedRequest) -> EngineId:
        """Prepare for a topology beside the one that serves; the answer is READY. Typed errors say why not."""
        host = self._started()
        reconfigurer, live = host.reconfigurer, host.membership()
        await asyncio.wrap_future(_in_thread("raycore-prepare", lambda: reconfigurer.prepare(request, live)))
        return self._setup.engine

    @ray.method(concurrency_group="control")
    async def undo_reconfiguration(self, operation: str, term: Term) -> None:
        """Let go of what was prepared for this operation, and begin nothing of it any more."""
        self._started().reconfigurer.undo(operation, term)

    @ray.method(concurrency_group="control")
    async def keep_decision(self, operation: str, term: Term, membership: Membership) -> None:
        """Keep the decision of an operation: from here on it is finished, whoever asks."""
        self._started().keep_decision(operation, term, membership)

    @ray.method(concurrency_group="control")
    async def release_groups(self, stamp: GroupStamp) -> None:
        """Every member has confirmed the groups of this stamp; the ones before them go."""
        self._started().reconfigurer.release(stamp)

    @ray.method(concurrency_group="control")
    async def access(self) -> PoolAccess:
        """What a client needs to reach the pool, for when the controller is down."""
        return msgspec.structs.replace(self._setup.access, membership=self._held())

    @ray.method(concurrency_group="control")
    async def describe(self) -> EngineDescription:
        """Facts for a restarted controller."""
        return EngineDescription(
            engine=self._setup.engine,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            group_id=self._setup.group_id,
            member=self._member,
            membership=self._held() if self._host is None else self._host.decision(),
        )

    @ray.method(concurrency_group="control")
    async def stop(self, drain_s: float) -> None:
        """Refuse new work, let running requests end for up to `drain_s`, abort the rest, end the step loop."""
        host = self._host
        if host is None or self._ended.done():
            return
        await asyncio.wrap_future(_in_thread("raycore-stop", lambda: host.stop(drain_s)))
        with contextlib.suppress(Exception):  # how the steps ended is for the sentinel call to tell
            await asyncio.shield(asyncio.wrap_future(self._ended))

    @ray.method(concurrency_group="control")
    async def drain(self, limit_s: float) -> bool:
        """Wait until no request is left here, for up to `limit_s` seconds; whether it came so far. Who is to take nothing new is a member
        that is leaving."""
        until_s = asyncio.get_running_loop().time() + limit_s
        while self._host is not None and not self._ended.done() and self._host.core.requests:
            if asyncio.get_running_loop().time() >= until_s:
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return True

    @ray.method(concurrency_group="health")
    async def load_progress(self) -> LoadProgress:
        """How far the weights are loaded."""
        return load_progress()

    @ray.method(concurrency_group="health")
    async def weight_progress(self) -> WeightProgress:
        """How much of the weights came from peers so far, and how much from disk."""
        host = self._starting or self._host
        return WeightProgress() if host is None else host.weight_progress

    @ray.method(concurrency_group="health")
    async def ping(self) -> int:
        """This process's pid, answered whatever the control group does."""
        return os.getpid()

    def _started(self) -> EngineHost:
        if self._host is None:
            message = f"{self._setup.engine} has not started"
            raise EngineStartError(message, rank=self._setup.spec.rank, cause=message)
        return self._host

    def _held(self) -> Membership:
        return self._setup.access.membership if self._host is None else self._host.membership()

    def _new_host(self) -> EngineHost:
        # Here, not at the top: the engine's libraries must see the forwarded environment.
        from raycore.core.host import EngineHost

        return EngineHost(self._setup.spec, node_ip=ray.util.get_node_ip_address())

    def _ready_host(self, members: EngineInfo | None, *, is_standby: bool) -> None:
        spec = self._setup.spec
        log_everything_as(spec.pool, f"standby {spec.incarnation}" if is_standby else rank_name(spec.rank), log_level())
        host = self._starting = self._new_host()
        host.get_ready(members)
        self._warm = host

    def _start_host(self, givers: Sequence[Giver]) -> Member:
        log_everything_as(self._setup.spec.pool, rank_name(self._setup.spec.rank), log_level())
        if self._warm is None:
            host = self._new_host()
        else:
            host = self._warm
            host.become(self._setup.spec)
        self._starting = host
        member = host.start([RayPeer(giver) for giver in givers])
        self._host = host
        return member

    def _step_until_stopped(self) -> None:
        if self._host is None:
            return
        try:
            outcome = self._host.run()
        except BaseException as error:  # noqa: BLE001 -- it is what the sentinel call raises
            self._ended.set_exception(error)
        else:
            self._ended.set_result(outcome)
        finally:
            self._host.close()


def _in_thread(name: str, function: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Run in a daemon thread: the executor's threads of `asyncio.to_thread` would be joined at exit, and a hung engine never joins."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 -- carried to whoever awaits the future
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def _set_where_absent(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        if name == _RAY_SETS or name not in os.environ:
            os.environ[name] = value
