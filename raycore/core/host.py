"""The engine host: one engine core with its engine, sockets and threads; what an actor, or a plain process, holds."""

from __future__ import annotations

import logging
import os
import threading

from raycore.config import EngineSpec
from raycore.core.beats import BeatThread
from raycore.core.engine_core import EngineCore
from raycore.engine import Engine
from raycore.engines import make_engine
from raycore.ids import EngineId, Epoch, Incarnation, Rank, Term
from raycore.membership import Member, Membership
from raycore.transport.beats import BeatPublisher
from raycore.transport.engine_sockets import EngineSockets

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
        self._membership = Membership(spec.pool, Epoch(0), Term(0))
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self) -> Member:
        """Load the engine, bind, begin to beat. Whatever fails leaves nothing behind and is raised as it is."""
        spec = self._spec
        try:
            self._engine = make_engine(spec.engine, spec.model, spec.engine_options, spec.device, rank=spec.rank)
            self._sockets = EngineSockets(spec, node_ip=self._node_ip)
            endpoints = self._sockets.bind()
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
            )
            publisher = BeatPublisher(self._sockets.beat_sockets)
            self._beats = BeatThread(self.id, core.progress, publisher.publish, spec.health.beat_interval_s)
            self._beats.start()
            self._core = core
        except BaseException:
            self.close()
            raise
        member = Member(self.id, endpoints, self._engine.info, os.getpid())
        _log.info("pool %s rank %d is up: %s", spec.pool, spec.rank, self._engine.info.engine)
        return member

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

    def set_membership(self, membership: Membership) -> Membership:
        """Keep `membership` if it is newer, and tell the sessions; returns what is held now."""
        with self._lock:
            if membership.supersedes(self._membership):
                self._membership = membership
                if self._core is not None:
                    self._core.set_membership(membership)
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
        if self._sockets is not None:
            self._sockets.close()
        if self._engine is not None:
            self._engine.close()
