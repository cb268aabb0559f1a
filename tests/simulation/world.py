"""Everything around the simulated engines: the network, Ray's part, a controller that can be killed, clients that count tokens."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any
from unittest import mock

import ray.exceptions

from actors import pool_controller
from actors.fleet import EngineRecord
from actors.groups import GroupRow
from actors.naming import ActorName, Role
from actors.pool_controller import PoolController
from actors.setup import PoolKeys, PoolSetup
from elastic.operation import Phase
from raycore.config import PoolConfig, Timeouts
from raycore.errors import EngineStartError, LockstepError
from raycore.groups import GroupKind
from raycore.health import Verdict
from raycore.ids import EngineId, GroupStamp, Incarnation, Rank
from raycore.membership import Membership, MemberState
from raycore.messages import Beat, Wake
from raycore.waves import Phase as WavePhase
from tests.simulation.client import SimClient
from tests.simulation.engine import GROUP_S, SimEngine, wires_of
from tests.simulation.experts import SimExpertEngine
from tests.simulation.virtual_loop import VirtualLoop
from tests.simulation.watch import Watch
from tests.simulation.wires import Wire

POOL = "sim"
HANG_S = 5.0
TIMEOUTS = Timeouts(capacity_s=10, engine_start_s=20, drain_s=0.5, stop_s=2, group_s=GROUP_S, collective_s=30, control_s=8)
_MEAN_HOP_S = 0.002
_SLOW_HOPS = 0.03
_TROUBLED_HOPS = 0.2
"""Just after something went wrong."""
_TROUBLE_S = 0.05
_LATE_HOPS = 0.004
"""Slower than some limits."""
_OUTLIVES = 0.8
"""Of what a controller sent before it died arrives when another has taken over."""
_MANY_EVENTS = 400_000


class ViolatedError(AssertionError):
    """An invariant does not hold."""


class Controller:
    """One life of the controller; dead, it sends nothing and hears nothing."""

    def __init__(self, world: World) -> None:
        self.world, self.is_dead, self.is_known = world, False, False
        config = PoolConfig(pool=POOL, engine="echo", coordinator="never", timeouts=TIMEOUTS)
        keys = PoolKeys(server_public="", server_secret="", client_public="", client_secret="")
        self.pool = PoolController(PoolSetup(config=config, keys=keys, environment={}), lambda: None)
        fleet: Any = SimFleet(self)
        self.pool._fleet = self.pool.scaler._fleet = fleet
        health: Any = SimHealth(self)
        self.pool._health = health
        self.pool.planned_nodes = self._nodes  # type: ignore[method-assign]
        Watch(self)

    async def _nodes(self, count: int) -> Sequence[str]:
        await self.lives("nodes are planned")
        return ["n"] * count

    async def lives(self, what: str, engine: EngineId | None = None) -> None:
        """One step of the outside world; a controller that died never gets past it."""
        await self.world.hop(what, engine)
        if self.is_dead:
            await asyncio.Event().wait()


class Handle:
    """An actor handle: `handle.method.remote(...)` of one controller."""

    def __init__(self, controller: Controller, engine: EngineId) -> None:
        self._controller, self._engine = controller, engine

    def __getattr__(self, name: str) -> Any:
        return _Method(self._controller, self._engine, name)


class _Method:
    def __init__(self, controller: Controller, engine: EngineId, name: str) -> None:
        self._controller, self._engine, self._name = controller, engine, name

    def remote(self, *args: Any) -> asyncio.Future[Any]:
        return self._controller.world.call(self._controller, self._engine, self._name, args)


class SimFleet:
    """What `Fleet` does, with simulated engine cores."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self._world = controller, controller.world
        self._beside_steps = asyncio.Lock()

    takes_turns = True

    async def give_up(self, record: EngineRecord, members: Sequence[EngineRecord]) -> None:
        """Engines of the simulation share no weights."""

    @contextlib.asynccontextmanager
    async def beside_steps(self) -> AsyncIterator[None]:
        """One at a time, as on GPUs."""
        async with self._beside_steps:
            yield

    async def start_all(self, node_ids: Sequence[str]) -> list[EngineRecord]:
        return [await self.start_one(Rank(rank), node) for rank, node in enumerate(node_ids)]

    async def start_one(self, rank: Rank, node_id: str) -> EngineRecord:
        record = self.new_record(rank)
        await self.reserve(record, node_id)
        await self.start(record)
        return record

    def new_record(self, rank: Rank) -> EngineRecord:
        engine = EngineId(rank, Incarnation(self._world.token()))
        return EngineRecord(engine, f"{engine}")

    async def reserve(self, record: EngineRecord, node_id: str) -> None:
        record.group_id, record.node_id = f"g{record.engine}", node_id
        self._world.groups[record.group_id] = record.engine
        await self._controller.lives(f"{record.engine} has its group")

    async def start(self, record: EngineRecord, *, is_joining: bool = False, members: Sequence[EngineRecord] = ()) -> None:
        world, engine = self._world, record.engine
        record.handle = Handle(self._controller, engine)
        found = world.engines[engine] = world.new_engine(engine, record.group_id, is_joining=is_joining)
        world.spawn(found.run())
        await self._controller.lives(f"{engine} starts", engine)
        async with self.beside_steps() if members else contextlib.nullcontext():
            await world.sleep(0.2)
        await found.thaw() if found.is_alive else None
        await self._controller.lives(f"{engine} has started", engine)
        if not found.is_alive:
            raise EngineStartError(f"rank {engine.rank} could not start: it died", rank=engine.rank, cause="it died")
        record.member, record.pid = found.member, found.member.pid

    async def retire(self, record: EngineRecord, drain_s: float) -> None:
        del drain_s
        await self.dispose(record)

    async def dispose(self, record: EngineRecord) -> None:
        await self._controller.lives(f"{record.engine} is disposed of")
        found = self._world.engines.get(record.engine)
        if found is not None:
            found.die()
        self._world.groups.pop(record.group_id, None)

    async def find(self, name: ActorName, limit_s: float) -> tuple[EngineRecord, Any]:
        engine = name.engine
        record = EngineRecord(engine, f"{engine}", handle=Handle(self._controller, engine), group_id=self._world.engines[engine].group_id)
        try:
            facts = await asyncio.wait_for(record.handle.describe.remote(), limit_s)
        except (TimeoutError, ray.exceptions.RayError):
            return record, None
        record.member, record.pid, record.node_id = facts.member, facts.pid, facts.node_id
        return record, facts


class SimHealth:
    """Notices what hangs, and tells what engines say of their waves."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self._watched = controller, dict[EngineId, None]()

    def watch(self, member: Any) -> None:
        self._watched[member.engine] = None

    def forget(self, engine: EngineId) -> None:
        self._watched.pop(engine, None)

    def verdict(self, engine: EngineId) -> Verdict:
        return Verdict.ALIVE

    def last_beat(self, engine: EngineId) -> Beat | None:
        found = self._controller.world.engines.get(engine)
        report = None if found is None or found.lockstep is None else found.lockstep._progress.wave
        return mock.Mock(wave=report) if report is not None else None

    async def run(self) -> None:
        world = self._controller.world
        silent: dict[EngineId, float] = {}
        while not self._controller.is_dead:
            await world.sleep(0.25)
            for engine in list(self._watched):
                found, now_s = world.engines[engine], world.loop.time()
                is_silent = found.is_alive and found.frozen_until_s > now_s
                silent.setdefault(engine, now_s) if is_silent else silent.pop(engine, None)
                if is_silent and now_s - silent[engine] > HANG_S and not self._controller.is_dead:
                    silent.pop(engine)
                    self._controller.pool._on_suspect(engine, "no beat")

    def close(self) -> None:
        self._watched.clear()


class World:
    """One schedule: a seed, what goes wrong and when, and all that is there."""

    def __init__(self, seed: int, *, sync_interval: int, faults: dict[int, str], is_expert_parallel: bool = False) -> None:
        self.seed, self.sync_interval, self.faults = seed, sync_interval, faults
        self.is_expert_parallel = is_expert_parallel
        self.size = 0
        """Ranks that the pool starts with."""
        self.random = random.Random(seed)
        self.loop = VirtualLoop()
        self.engines: dict[EngineId, SimEngine] = {}
        self.groups: dict[str, EngineId] = {}
        self.client = SimClient(self)
        self.controller: Controller | None = None
        self.trace: list[str] = []
        self.violations: list[str] = []
        self.hops = 0
        self.at_phase: dict[Phase, tuple[str, str, float]] = {}
        """What goes wrong when an operation enters a phase: the fault, whom it hits, seconds afterwards."""
        self.troubled_until_s = 0.0
        self.is_calm = False
        """Nothing goes wrong any more."""
        self._pids = itertools.count(1)
        self.returned: set[GroupStamp] = set()
        """Groups that were decided, and gone back from."""
        self._stores: dict[tuple[GroupStamp, bool], tuple[EngineId, dict[EngineId, asyncio.Future[Any]]]] = {}
        """By stamp, those where leavers meet the others apart."""
        self._switches: dict[tuple[GroupStamp, GroupStamp], list[int]] = {}
        self._channels: dict[EngineId, float] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def new_engine(self, engine: EngineId, group_id: str, *, is_joining: bool) -> SimEngine:
        if self.is_expert_parallel:
            return SimExpertEngine(self, engine, group_id, self.sync_interval, is_joining=is_joining, size=self.size)
        return SimEngine(self, engine, group_id, self.sync_interval)

    def next_pid(self) -> int:
        return next(self._pids)

    def token(self) -> str:
        return f"{self.random.getrandbits(32):08x}"

    def note(self, text: str) -> None:
        self.trace.append(f"{self.loop.time():.5f} {text}")

    def check(self, holds: Any, text: str) -> None:
        if not holds:
            self.violations.append(f"{self.loop.time():.3f}: {text}")

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.check(False, f"a task failed: {task.exception()!r}")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def hop(self, what: str, target: EngineId | None = None) -> None:
        """A message on its way, or a step outside; here everything may go wrong."""
        self.hops += 1
        if self.hops > _MANY_EVENTS:
            raise ViolatedError("the schedule does not end")
        self.note(what)
        fault = self.faults.get(self.hops)
        if fault is not None and not self.is_calm:
            self._strike(fault, target)
        delay_s = self.random.expovariate(1 / _MEAN_HOP_S)
        is_troubled = self.loop.time() < self.troubled_until_s and not self.is_calm
        if self.random.random() < (_TROUBLED_HOPS if is_troubled else _SLOW_HOPS):
            delay_s += self.random.uniform(0.02, 0.6)
        if self.random.random() < _LATE_HOPS and not self.is_calm:
            delay_s += self.random.uniform(1.0, 4.0)
        await asyncio.sleep(delay_s)

    def on_phase(self, phase: Phase, people: dict[str, list[EngineId]]) -> None:
        """An operation enters a phase; the fault that was planned for it comes a moment later."""
        planned = self.at_phase.pop(phase, None)
        if planned is None:
            return
        fault, whom, after_s = planned
        self.troubled_until_s = self.loop.time() + after_s + _TROUBLE_S

        def strike() -> None:
            if not self.is_calm:
                self._strike(fault, self.random.choice(people[whom]) if people[whom] else None, is_sure=True)

        self.loop.call_later(after_s, strike)

    def _strike(self, fault: str, target: EngineId | None, *, is_sure: bool = False) -> None:
        alive = [engine for engine, found in self.engines.items() if found.is_alive]
        hits = target in alive and (is_sure or self.random.random() < 0.5)
        victim = target if hits else self.random.choice(alive) if alive else None
        self.note(f"FAULT {fault} {victim}")
        self.troubled_until_s = self.loop.time() + _TROUBLE_S
        if fault == "controller":
            self.spawn(self._replace_controller())
        elif victim is None:
            return
        elif fault == "crash":
            if self._others_serve(victim):
                self.engines[victim].die()
        elif fault == "freeze":
            self.engines[victim].frozen_until_s = self.loop.time() + self.random.choice((0.1, 0.5, 1.0, 3.0))
        elif fault == "hang":
            if self._others_serve(victim):
                self.engines[victim].frozen_until_s = 1e9
        elif fault == "cancel" and self.controller is not None:
            running = self.controller.pool.scaler.status()
            if running:
                self.controller.pool.scaler.cancel(running[0]["operation"])

    def _others_serve(self, victim: EngineId) -> bool:
        """Whether a rank that stays is left: a pool that loses all of them is over, and there is nothing to check."""
        assert self.controller is not None
        pool, now_s = self.controller.pool, self.loop.time()
        running = pool.scaler._operation
        leaving = () if running is None else running.goal.leaving
        sound = [engine for engine, found in self.engines.items() if found.is_alive and found.frozen_until_s < now_s + 10]
        return any(pool.membership.serves(engine) and engine not in leaving and engine != victim for engine in sound)

    async def _replace_controller(self) -> None:
        """Killed, and restarted by Ray a while later."""
        if self.controller is None or self.controller.is_dead or not self.controller.pool._records:
            return
        self.controller.is_dead = True
        self.note("the controller dies")
        await self.sleep(self.random.uniform(0.3, 2.0))
        self.controller = Controller(self)
        await self.controller.pool.recover()
        self.controller.is_known = True
        self.note("the controller is back")

    def switched(self, engine: EngineId, before: GroupStamp, after: GroupStamp, begun: list[int]) -> None:
        """Who goes over by vote leaves the old groups after the same collective as the others."""
        first = self._switches.setdefault((before, after), begun)
        self.check(first == begun, f"{engine} went over to {after} after {begun} collectives, another after {first}")

    # -- calls ----------------------------------------------------------------------------------------------------------------

    def call(self, controller: Controller, engine: EngineId, name: str, args: tuple[Any, ...]) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = self.loop.create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not controller.is_dead:
            self.spawn(self._carry(controller, engine, name, args, answer))
        return answer

    async def _carry(self, controller: Controller, engine: EngineId, name: str, args: tuple[Any, ...], answer: asyncio.Future[Any]) -> None:
        await self.hop(f"{name} to {engine}", engine)
        if controller.is_dead and not self.is_calm and self.random.random() < _OUTLIVES:
            await self.sleep(self.random.uniform(0.3, 3.0))
        copies = 2 if name != "wait_closed" and self.random.random() < 0.02 else 1
        outcomes = await asyncio.gather(*(self._run(engine, name, args) for _ in range(copies)), return_exceptions=True)
        await self.hop(f"{name} from {engine}", engine)
        if answer.done() or controller.is_dead:
            return
        outcome = outcomes[0]
        if not self.engines[engine].is_alive:
            outcome = ray.exceptions.RayActorError()
        answer.set_exception(outcome) if isinstance(outcome, BaseException) else answer.set_result(outcome)

    async def _run(self, engine: EngineId, name: str, args: tuple[Any, ...]) -> Any:
        found = self.engines[engine]
        if name == "wait_closed":
            await asyncio.shield(found.died)
            raise ray.exceptions.RayActorError()
        work = asyncio.ensure_future(self._served(found, name, args))
        await asyncio.wait({work, found.died}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise ray.exceptions.RayActorError()
        return work.result()

    async def _served(self, found: SimEngine, name: str, args: tuple[Any, ...]) -> Any:
        await found.thaw()
        return await getattr(found, name)(*args)

    def post_wake(self, engine: EngineId, wake: Wake) -> None:
        async def carry() -> None:
            await self.hop(f"wake to {engine}", engine)
            found = self.engines.get(engine)
            if found is not None and found.is_alive and self.random.random() > 0.1:
                found.take_wake(wake)

        self.spawn(carry())

    def tell_client(self, kind: str, engine: EngineId, request: int, admission: int, what: Any) -> None:
        """In order on each engine's channel."""
        due_s = max(self._channels.get(engine, 0.0), self.loop.time() + self.random.expovariate(1 / 0.0005))
        self._channels[engine] = due_s + 1e-6
        self.loop.call_at(due_s, self.client.take, kind, engine, request, admission, what)

    # -- where groups meet ----------------------------------------------------------------------------------------------------

    def open_stores(self, stamp: GroupStamp, leader: EngineId, *, is_handover: bool = False) -> None:
        self._stores.setdefault((stamp, is_handover), (leader, {}))

    def close_stores(self, stamp: GroupStamp, engine: EngineId) -> None:
        for is_handover in (False, True):
            store = self._stores.get((stamp, is_handover))
            if store is None or store[0] != engine:
                continue
            del self._stores[stamp, is_handover]
            for waiting in store[1].values():
                if not waiting.done():
                    waiting.set_exception(LockstepError(f"the stores of {stamp} were closed"))

    async def meet(self, stamp: GroupStamp, members: tuple[EngineId, ...], me: SimEngine, *, is_handover: bool = False) -> dict[Any, Wire]:
        await self.hop(f"{me.id} meets the others of {stamp}", me.id)
        await me.thaw()
        store = self._stores.get((stamp, is_handover))
        if store is None or not self.engines[store[0]].is_alive:
            raise LockstepError(f"the stores of {stamp} cannot be reached")
        waiting = store[1].setdefault(me.id, self.loop.create_future())
        if set(store[1]) == set(members):
            wires = wires_of(stamp, members)
            for future in store[1].values():
                if not future.done():
                    future.set_result(wires)
        try:
            return await asyncio.wait_for(asyncio.shield(waiting), GROUP_S)
        except TimeoutError:
            raise LockstepError(f"the groups of {stamp} were not formed in time") from None

    # -- the schedule's end ---------------------------------------------------------------------------------------------------

    def alive(self) -> list[SimEngine]:
        return [found for found in self.engines.values() if found.is_alive]

    def is_over(self) -> bool:
        """Whether an expert-parallel pool has ended with a rank that it lost, and nothing of it is left."""
        pool = None if self.controller is None or self.controller.is_dead else self.controller.pool
        has_ended = pool is not None and pool._down is not None and pool._down.done()
        return self.is_expert_parallel and has_ended and not self.alive() and not self.groups

    def unsettled(self) -> str:
        """What is not at its end yet; empty when everything is as it should be."""
        controller = self.controller
        if self.is_over():
            return ""
        if controller is None or controller.is_dead or not controller.pool._records:
            return "there is no controller"
        scaler, now = controller.pool.scaler, controller.pool.membership
        members = {member.engine for member in now.members}
        alive, ours = {found.id for found in self.alive()}, ", ".join(map(str, members))
        problems = {
            f"an operation is running: {scaler.status()[:1]}": scaler._operation is not None,
            f"alive are {', '.join(map(str, alive))}; members are {ours}": alive != members,
            f"placement groups are {sorted(self.groups)}; members are {ours}": set(self.groups.values()) != members,
            f"requests {sorted(self.client.open)} are not answered": bool(self.client.open),
            f"not all members serve: {now.members}": any(member.state is not MemberState.SERVING for member in now.members),
            f"somebody joins: {now.joining}": bool(now.joining),
            **{f"{found.id}: {problem}": True for found in self.alive() for problem in self._of_engine(found, now)},
        }
        return next((text for text, holds in problems.items() if holds), "")

    def _of_engine(self, found: SimEngine, now: Membership) -> list[str]:
        held, lockstep = found.membership, found.lockstep
        problems = {
            "it is frozen": found.frozen_until_s > self.loop.time(),
            f"it holds {held.term}/{held.epoch}, decided is {now.term}/{now.epoch}": (held.term, held.epoch) != (now.term, now.epoch),
        }
        if lockstep is not None:
            wave, rack = lockstep.wave, lockstep._rack
            open_stamps = {end.wire.stamp for end in found.ends if not end.is_closed}
            problems |= {
                f"its wave is {wave.phase.name}: {lockstep._failure}": wave.phase not in (WavePhase.RESTING, WavePhase.STEPPING),
                f"it is in {wave.stamp}, decided is {now.group}": now.group is None or wave.stamp != now.group.stamp,
                "it holds standby groups": rack.standby is not None or wave.standby is not None,
                "it holds the groups of before": rack.kept is not None,
                f"groups of {len(open_stamps)} epochs are open": len(open_stamps) != 1,
                "its engine keeps experts of before": isinstance(found, SimExpertEngine) and (found.before or found.coming),
                "its engine has another group than the live one": rack.live is None or found.group is not rack.live[GroupKind.EP],
            }
        return [text for text, holds in problems.items() if holds]

    @contextlib.contextmanager
    def surroundings(self) -> Iterator[None]:
        """What the controller asks Ray, answered from here."""

        def names(_pool: str) -> list[ActorName]:
            return [ActorName(POOL, Role.ENGINE, found.id.rank, found.id.incarnation) for found in self.alive()]

        def rows(_pool: str) -> list[GroupRow]:
            named = [(ActorName(POOL, Role.ENGINE, engine.rank, engine.incarnation), group) for group, engine in self.groups.items()]
            return [GroupRow(name, group, "CREATED") for name, group in named]

        async def remove(group_id: str, *, limit_s: float) -> bool:
            del limit_s
            self.groups.pop(group_id, None)
            return True

        async def end_clients(_pool: str, *, limit_s: float) -> None:
            del limit_s

        async def end_coordinator(_keeper: Any) -> None:
            """There is none."""

        with (
            mock.patch.object(pool_controller, "named_actors", names),
            mock.patch.object(pool_controller, "pool_groups", rows),
            mock.patch.object(pool_controller, "remove_group", remove),
            mock.patch.object(pool_controller, "end_clients", end_clients),
            mock.patch.object(pool_controller.CoordinatorKeeper, "end", end_coordinator),
            mock.patch("secrets.token_hex", lambda size=4: f"{self.random.getrandbits(8 * size):0{2 * size}x}"),
        ):
            yield
