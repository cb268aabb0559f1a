"""The engine host: one engine core with its engine, sockets and threads; what an actor, or a plain process, holds."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

from raycore import gloo, nccl
from raycore.config import EngineSpec
from raycore.core.beats import BeatThread
from raycore.core.engine_core import EngineCore
from raycore.core.grouping import GroupKeeper
from raycore.core.reconfiguring import Reconfigurer
from raycore.core.weight_giving import WeightGiving
from raycore.core.weight_taking import WeightTaking, terms_now
from raycore.engine import MEMORY_STATS, SET_RANK, Engine, EngineInfo
from raycore.engines import WITHOUT_WEIGHTS, has_own_options, import_engine, make_engine
from raycore.errors import EngineStateError, LockstepError
from raycore.groups import GroupSet
from raycore.ids import EngineId, Epoch, GroupStamp, Incarnation, Rank, Term
from raycore.load_progress import WeightMeter, WeightProgress
from raycore.membership import Member, Membership
from raycore.transport.beats import BeatPublisher
from raycore.transport.endpoints import this_host
from raycore.transport.engine_sockets import EngineSockets
from raycore.transport.peers import PeerSender
from raycore.weight_copies import WeightOffer, WeightPeer, WeightTerms

_log = logging.getLogger(__name__)


class EngineHost:
    """`start`, then `run` in one thread; the other methods from any thread."""

    def __init__(self, spec: EngineSpec, *, node_ip: str) -> None:
        self._spec = spec
        self._node_ip = node_ip
        self.id = EngineId(Rank(spec.rank), Incarnation(spec.incarnation))
        self._engine: Engine | None = None
        self._sockets: EngineSockets | None = None
        self._core: EngineCore | None = None
        self._beats: BeatThread | None = None
        self._peers: PeerSender | None = None
        self._groups: GroupKeeper | None = None
        self._giving: WeightGiving | None = None
        self._taken: WeightOffer | None = None
        """What of its peers' weights this engine core has."""
        self._meter = WeightMeter()
        self._reconfigurer: Reconfigurer | None = None
        self._membership = Membership(spec.pool, Epoch(0), Term(0))
        self._lock = threading.Lock()
        self._is_closed = False

    def get_ready(self, members: EngineInfo | None) -> None:
        """Have up what needs neither a rank nor a model: imports, the device, what process groups need. `members`: what engines it is to
        stand beside."""
        spec = self._spec
        import_engine(spec.engine, spec.device)
        if members is not None and members.sync_interval:
            gloo.prepare()
            if members.is_expert_parallel and spec.device != "cpu":
                nccl.prepare(spec.device)

    def warm(self, peers: Sequence[WeightPeer] = ()) -> None:
        """For a standby: where the pool wants it, have the model too. `peers`: who gives it its weights.

        Raises what that raises, WeightCopyError where the peers have weights and did not give them: who serves then is asked when a standby
        is made anew.
        """
        spec = self._spec
        if spec.warm_weights or spec.engine in WITHOUT_WEIGHTS:
            self._engine = self._make(None, is_joining=True, peers=peers)

    def _make(self, rank: int | None, *, is_joining: bool, peers: Sequence[WeightPeer]) -> Engine:
        spec = self._spec
        name, size = spec.engine, spec.data_parallel_size
        taking = self._taking(peers, or_disk=rank is not None) if peers and name not in WITHOUT_WEIGHTS else None
        engine = make_engine(name, spec.model, spec.engine_options, spec.device, rank=rank, size=size, is_joining=is_joining, peers=taking)
        self._taken = None if taking is None else taking.taken
        if self._taken is None:
            stats = engine.rpc_methods().get(MEMORY_STATS)
            self._meter.loaded(from_disk_bytes=0 if stats is None else int(stats().get("weights_bytes", 0)))
        return engine

    def _taking(self, peers: Sequence[WeightPeer], *, or_disk: bool) -> WeightTaking:
        spec = self._spec
        return WeightTaking(
            self.id,
            peers,
            self._meter,
            node_ip=self._node_ip,
            host=this_host(),
            device=spec.device,
            timeouts=spec.timeouts,
            portion_bytes=spec.limits.weight_portion_bytes,
            or_disk=or_disk,
        )

    def _drop_stale(self, peers: Sequence[WeightPeer]) -> None:
        """A standby's weights are those of when it was made: it takes them anew where the pool's have another version now.

        Those that it read from disk, when nobody had them, are of no version.
        """
        if self._engine is None or self._spec.engine in WITHOUT_WEIGHTS:
            return
        terms = terms_now(peers, limit_s=self._spec.timeouts.control_s)
        if terms is None:
            return
        had = WeightTerms(terms.digest) if self._taken is None else self._taken.terms
        if terms != had:
            _log.info("%s takes its weights anew: they are %s now, and were %s", self.id, terms, had)
            self._unmake()

    def _unmake(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._taken = None
        self._meter = WeightMeter()

    def become(self, spec: EngineSpec) -> None:
        """The rank is known: `start` is next."""
        self._spec = spec
        self.id = EngineId(Rank(spec.rank), Incarnation(spec.incarnation))
        if has_own_options(spec.engine_options, spec.rank):
            self._unmake()
        set_rank = None if self._engine is None else self._engine.utilities().get(SET_RANK)
        if set_rank is not None:
            set_rank(rank=spec.rank)

    def start(self, peers: Sequence[WeightPeer] = ()) -> Member:
        """Load the engine unless it is, bind, begin to beat. Whatever fails leaves nothing behind and is raised as it is.

        `peers`: ranks that serve, of a pool that this one joins.
        """
        spec = self._spec
        try:
            self._drop_stale(peers)
            if self._engine is None:
                self._engine = self._make(spec.rank, is_joining=spec.is_joining or bool(peers), peers=peers)
            self._sockets = EngineSockets(spec, node_ip=self._node_ip)
            endpoints = self._sockets.bind()
            if self._engine.info.sync_interval:
                self._prepare_lockstep(self._sockets)
            listener = self._sockets.listener
            assert listener is not None  # noqa: S101 -- bind() made it
            core = EngineCore(
                self.id,
                self._engine,
                listener,
                self._membership,
                limits=spec.limits,
                timeouts=spec.timeouts,
                step_budget_s=spec.health.step_budget_s,
                allow_pickle=spec.allow_pickle,
                debug_checks=spec.debug_checks,
                peers=self._peers,
            )
            publisher = BeatPublisher(self._sockets.beat_sockets)
            self._beats = BeatThread(self.id, core.progress, publisher.publish, spec.health.beat_interval_s)
            self._beats.start()
            self._core = core
            self._giving = WeightGiving(self.id, self._engine, core, node_ip=self._node_ip, device=spec.device, timeouts=spec.timeouts)
            if self._groups is not None and core.lockstep is not None:
                core.lockstep.on_stamp = self._groups.confirm
                self._reconfigurer = Reconfigurer(self.id, self._engine, core, core.lockstep, self._groups, spec.timeouts)
        except BaseException:
            self.close()
            raise
        member = Member(self.id, endpoints, self._engine.info, os.getpid())
        _log.info("pool %s rank %d is up: %s", spec.pool, spec.rank, self._engine.info.engine)
        return member

    def _prepare_lockstep(self, sockets: EngineSockets) -> None:
        gloo.prepare()
        spec = self._spec
        self._peers = PeerSender(sockets.context, client_public_key=spec.client_public_key, client_secret_key=spec.client_secret_key)
        self._groups = GroupKeeper(
            self.id,
            node_ip=self._node_ip,
            timeouts=spec.timeouts,
            on_formed=self._take_group,
            on_failed=self._group_failed,
            device=spec.device,
        )

    def _take_group(self, groups: GroupSet, membership: Membership) -> None:
        ranks = tuple(member.engine.rank for member in membership.members)
        lockstep = self.core.lockstep
        if lockstep is not None:
            self.core.post(lambda: lockstep.take_group(groups, ranks))

    def _group_failed(self, stamp: GroupStamp, error: LockstepError) -> None:
        lockstep = self.core.lockstep
        if lockstep is not None:
            self.core.post(lambda: lockstep.fail(stamp, str(error)))

    @property
    def groups(self) -> GroupKeeper:
        """Stores and process groups. LockstepError where the engine steps alone."""
        if self._groups is None:
            msg = f"{self.id} of pool {self._spec.pool} steps alone; it has no process groups"
            raise LockstepError(msg, rank=self.id.rank)
        return self._groups

    @property
    def reconfigurer(self) -> Reconfigurer:
        """This rank's part in switches of groups. LockstepError where the engine steps alone."""
        if self._reconfigurer is None:
            msg = f"{self.id} of pool {self._spec.pool} steps alone; it has no process groups"
            raise LockstepError(msg, rank=self.id.rank)
        return self._reconfigurer

    @property
    def giving(self) -> WeightGiving:
        """What ranks that join ask; known after `start`."""
        if self._giving is None:
            msg = "the engine core has not started"
            raise RuntimeError(msg)
        return self._giving

    @property
    def weight_progress(self) -> WeightProgress:
        """Where this engine core's weights came from, and how much of them is there."""
        return self._meter.progress

    def check_version(self, version: str | None) -> None:
        """EngineStateError when this rank's weights were copied under another version than the pool's."""
        if self._taken is not None and self._taken.version != version:
            msg = f"its weights were copied when they were {self._taken.version!r}, and the pool's are {version!r} now"
            raise EngineStateError(msg)

    @property
    def core(self) -> EngineCore:
        """The engine core; known after `start`."""
        if self._core is None:
            msg = "the engine core has not started"
            raise RuntimeError(msg)
        return self._core

    def run(self) -> str:
        """Step until stopped; raises what the engine's step raised."""
        try:
            self.core.run()
        finally:
            self.close()
        return "stopped"

    def membership(self) -> Membership:
        """The newest membership that this engine was told."""
        with self._lock:
            return self._membership

    def decision(self) -> Membership:
        """The newest membership that was decided as far as this engine knows: told, or kept until it is told to go."""
        with self._lock:
            kept = None if self._reconfigurer is None else self._reconfigurer.kept_decision
            return kept if kept is not None and kept.supersedes(self._membership) else self._membership

    def keep_decision(self, operation: str, term: Term, membership: Membership) -> None:
        """Keep a decision; an engine that is no member yet has nothing to wait for and goes by it. ScalingError when it must not."""
        self.reconfigurer.keep(operation, term, membership)
        if not self.membership().has(self.id):
            self.set_membership(membership)

    def set_membership(self, membership: Membership) -> Membership:
        """Keep `membership` if it is newer, and tell the sessions; returns what is held now."""
        with self._lock:
            if membership.supersedes(self._membership):
                before, self._membership = self._membership, membership
                is_standby = self._reconfigurer is not None and self._reconfigurer.told(before, membership)
                if self._core is not None:
                    self._core.set_membership(membership)
                if self._groups is not None and not is_standby:
                    self._groups.form(membership)
            return self._membership

    def stop(self, drain_s: float) -> None:
        """Refuse new work, drain, abort the rest; `run` then returns."""
        if self._core is not None:
            self._core.stop(drain_s)

    def close(self) -> None:
        """Free threads, sockets, files and the engine. Idempotent; only once `run` has returned or was never called."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._beats is not None:
            self._beats.stop()
        if self._giving is not None:
            self._giving.close()
        if self._core is not None and self._core.lockstep is not None:
            self._core.lockstep.close()
        elif self._peers is not None:
            self._peers.close()
        if self._groups is not None:
            self._groups.close()
        if self._sockets is not None:
            self._sockets.close()
        if self._engine is not None:
            self._engine.close()
