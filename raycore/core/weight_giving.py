"""One engine core's side of giving weights to ranks that join: what it offers, and the sending of what it is asked for."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from raycore.config import Timeouts
from raycore.copy_groups import join_copy
from raycore.engine import Engine
from raycore.errors import RaycoreError, WeightCopyError
from raycore.groups import ProcessGroup
from raycore.ids import EngineId
from raycore.pool_state import PoolState
from raycore.weight_copies import LentWeights, WeightGiver, WeightOffer, WeightRequest, WeightTerms

_log = logging.getLogger(__name__)


class StepThread(Protocol):
    """The engine core, as far as this needs it."""

    def ask(self, question: Callable[[], LentWeights | None]) -> concurrent.futures.Future[LentWeights | None]:
        """Have the step thread answer between two steps."""
        ...

    def pool_state(self) -> concurrent.futures.Future[PoolState]:
        """What calls to all ranks have made of the engine."""
        ...


class WeightGiving:
    """From any thread; each method blocks its caller and no step."""

    def __init__(self, engine_id: EngineId, engine: Engine, core: StepThread, *, node_ip: str, device: str, timeouts: Timeouts) -> None:
        self._id = engine_id
        self._giver = engine if isinstance(engine, WeightGiver) else None
        self._core = core
        self._node_ip = node_ip
        self._device = device
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._groups: dict[EngineId, ProcessGroup] = {}
        """Of the joiners that are being sent to."""

    def offer(self) -> WeightOffer | None:
        """What a joiner is told; None where this engine gives nothing. EngineStateError while the weights are away."""
        lent, version = self._lend()
        return None if lent is None else WeightOffer(lent.manifest, lent.files(), lent.task, version)

    def terms(self) -> WeightTerms | None:
        """The same in short."""
        lent, version = self._lend()
        return None if lent is None else WeightTerms(lent.manifest.digest, version)

    def give(self, request: WeightRequest) -> int:
        """Send what is asked for; the bytes. WeightCopyError for what was offered otherwise, LockstepError when somebody is lost."""
        lent, version = self._lend()
        has = None if lent is None else WeightTerms(lent.manifest.digest, version)
        if lent is None or has != request.terms:
            raise WeightCopyError(f"{self._id} has other weights ({has}) than were offered ({request.terms})", rank=self._id.rank)
        self.end(request.joiner)  # it lost somebody, and asks anew
        group = join_copy(
            request.address,
            request.group_rank,
            len(request.shares) + 1,
            local_host=self._node_ip,
            form_s=self._timeouts.group_s,
            collective_s=self._timeouts.collective_s,
            device=self._device,
        )
        with self._lock:
            self._groups[request.joiner] = group
        try:
            sent = lent.give(group, request.shares, request.portion_bytes)
        finally:
            group.close()
            with self._lock:
                if self._groups.get(request.joiner) is group:
                    del self._groups[request.joiner]
        _log.info("%s sent %d bytes of weights to %s", self._id, sent, request.joiner)
        return sent

    def close(self) -> None:
        """Leave every group; the joiners take what is missing from others. Idempotent."""
        with self._lock:
            joiners = list(self._groups)
        for joiner in joiners:
            self.end(joiner)

    def end(self, joiner: EngineId) -> None:
        """Leave its group, if it is being sent to. Idempotent."""
        with self._lock:
            group = self._groups.pop(joiner, None)
        if group is not None:
            group.close()

    def _lend(self) -> tuple[LentWeights | None, str | None]:
        giver = self._giver
        if giver is None:
            return None, None
        limit_s = self._timeouts.control_s
        try:
            # The version first: weights that change in between are then named by the older one, which is noticed when the rank is ready.
            version = self._core.pool_state().result(limit_s).weight_version
            return self._core.ask(giver.lend_weights).result(limit_s), version
        except TimeoutError as error:
            if isinstance(error, RaycoreError):
                raise
            raise WeightCopyError(f"{self._id} was in one step for {limit_s:g} s", rank=self._id.rank) from error
