"""A joiner's side of taking its weights from its peers: rounds in which all of them send, until nothing is missing or nobody is left."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Sequence

from raycore import gloo
from raycore.config import Timeouts
from raycore.copy_groups import CopyMeeting
from raycore.errors import LockstepError, RaycoreError, WeightCopyError
from raycore.groups import ProcessGroup
from raycore.ids import EngineId
from raycore.load_progress import WeightMeter
from raycore.weight_copies import Span, Spans, WeightOffer, WeightPeer, WeightRequest, WeightSink, WeightTerms, dealt, without

_log = logging.getLogger(__name__)


def terms_now(peers: Sequence[WeightPeer], *, limit_s: float) -> WeightTerms | None:
    """On which terms the first peer that answers would give; None where nobody does."""
    for peer in peers:
        try:
            return peer.terms().result(limit_s)
        except (RaycoreError, TimeoutError) as error:
            _log.warning("%s does not say which weights it has: %s", peer.engine, error)
    return None


class WeightTaking:
    """Implements `WeightSource` over a joiner's peers; used by the one thread that makes the engine."""

    def __init__(
        self,
        engine_id: EngineId,
        peers: Sequence[WeightPeer],
        meter: WeightMeter,
        *,
        node_ip: str,
        host: str,
        device: str,
        timeouts: Timeouts,
        portion_bytes: int,
        or_disk: bool = True,
    ) -> None:
        self.or_disk = or_disk
        """An operation does not wait for peers; a standby does: it is made anew, of those who serve then."""
        self.taken: WeightOffer | None = None
        """What was offered and has all come."""
        self._id = engine_id
        self._peers = list(peers)
        self._meter = meter
        self._node_ip = node_ip
        self._host = host
        self._device = device
        self._timeouts = timeouts
        self._portion_bytes = portion_bytes
        self._offer: WeightOffer | None = None
        self._rounds = 0

    def offer(self) -> WeightOffer | None:
        """The offer of the first peer that makes one; those before it are asked for nothing. WeightCopyError as `WeightSource` says."""
        failed: Exception | None = None
        while self._offer is None and self._peers:
            peer = self._peers[0]
            try:
                self._offer = peer.offer().result(self._timeouts.control_s)
            except (RaycoreError, TimeoutError) as error:
                _log.warning("%s offers %s no weights: %s", peer.engine, self._id, error)
                failed = error
            if self._offer is None:
                self._peers.pop(0)
        if self._offer is None and failed is not None and not self.or_disk:
            raise WeightCopyError(f"no peer gives its weights now: {failed}", rank=self._id.rank) from failed
        return self._offer

    def take(self, sink: WeightSink) -> None:
        """Rounds until everything that was offered has come. WeightCopyError when no peer is left."""
        offer = self._offer
        if offer is None:
            raise WeightCopyError("no weights were offered", rank=self._id.rank)
        total = offer.manifest.total_bytes
        self._peers = self._agreeing(offer)
        missing: Spans = (Span(0, total),) if total else ()
        while missing:
            if not self._peers:
                left = sum(span.nbytes for span in missing)
                raise WeightCopyError(f"no peer is left that gives the {left} bytes that are missing of {total}", rank=self._id.rank)
            came, lost = self._round(offer, missing, sink)
            missing = without(missing, came)
            if missing and not came and not lost:
                lost = self._peers[-1:]
            self._peers = [peer for peer in self._peers if peer not in lost]
        self.taken = offer

    def _agreeing(self, offer: WeightOffer) -> list[WeightPeer]:
        """The peers that would give what was offered. Asked before they meet, since one that stays away holds up the others there."""
        asked = [(peer, peer.terms()) for peer in self._peers]
        agreeing: list[WeightPeer] = []
        for peer, answer in asked:
            try:
                has = answer.result(self._timeouts.control_s)
            except (RaycoreError, TimeoutError) as error:
                _log.warning("%s gives %s no weights: %s", peer.engine, self._id, error)
                continue
            if has == offer.terms:
                agreeing.append(peer)
            else:
                _log.warning("%s gives %s no weights: it has others (%s) than were offered (%s)", peer.engine, self._id, has, offer.terms)
        return agreeing

    def _round(self, offer: WeightOffer, missing: Spans, sink: WeightSink) -> tuple[Spans, list[WeightPeer]]:
        """What came of the missing bytes, and the peers that are to blame for what did not."""
        self._rounds += 1
        givers = self._peers[: sum(span.nbytes for span in missing)]
        shares = dealt(missing, len(givers))
        is_one_host = all(peer.host == self._host for peer in givers)
        round_ = _Round(
            CopyMeeting(
                self._rounds,
                gloo.LOOPBACK if is_one_host else self._node_ip,
                local_host=self._node_ip,
                form_s=self._timeouts.group_s,
                collective_s=self._timeouts.collective_s,
                device=self._device,
            )
        )
        asked: list[tuple[WeightPeer, concurrent.futures.Future[int]]] = []
        came: list[Span] = []

        def on_come(span: Span) -> None:
            came.append(span)
            self._meter.add(span.nbytes)

        try:
            for rank, peer in enumerate(givers, start=1):
                request = WeightRequest(self._id, offer.terms, round_.meeting.address, rank, shares, self._portion_bytes)
                asked.append((peer, peer.give(request)))
                asked[-1][1].add_done_callback(round_.on_answer)
            group = round_.form(len(givers) + 1)
            if not self._meter.progress.of_bytes:
                self._meter.begin(offer.manifest.total_bytes)
            sink.receive(group, shares, self._portion_bytes, on_come)
            concurrent.futures.wait([answer for _, answer in asked], timeout=self._timeouts.stop_s)  # they leave the group first
        except LockstepError as error:
            _log.warning("%s lost a peer that sent weights: %s", self._id, error)
        finally:
            round_.leave()
        lost = self._to_blame(asked)
        round_.meeting.close()  # not before: who is on its way to the store would try for long
        return tuple(came), lost

    def _to_blame(self, asked: Sequence[tuple[WeightPeer, concurrent.futures.Future[int]]]) -> list[WeightPeer]:
        """Those who do not say within `stop_s` that they lost somebody else."""
        concurrent.futures.wait([answer for _, answer in asked], timeout=self._timeouts.stop_s)
        lost: list[WeightPeer] = []
        for peer, answer in asked:
            error = answer.exception() if answer.done() else TimeoutError(f"no answer for {self._timeouts.stop_s:g} s")
            if error is not None and not isinstance(error, LockstepError):
                _log.warning("%s gives %s no more weights: %s", peer.engine, self._id, error)
                lost.append(peer)
        return lost


class _Round:
    """A peer that fails ends the round for all, so that nobody waits for it."""

    def __init__(self, meeting: CopyMeeting) -> None:
        self.meeting = meeting
        self._group: ProcessGroup | None = None
        self._has_failed = threading.Event()
        self._lock = threading.Lock()

    def form(self, size: int) -> ProcessGroup:
        """The group with those who were asked. LockstepError when one has failed."""
        group = self.meeting.form(size, self._has_failed.is_set)
        with self._lock:
            self._group = group
        if self._has_failed.is_set():
            self.leave()
        return group

    def on_answer(self, answer: concurrent.futures.Future[int]) -> None:
        """A peer is done; if it failed, the round is over."""
        if answer.cancelled() or answer.exception() is not None:
            self._has_failed.set()
            self.leave()

    def leave(self) -> None:
        """Leave the group; one that is being formed never comes to be. Idempotent."""
        with self._lock:
            group = self._group
        if group is not None:
            group.close()
        elif self.meeting.is_begun:
            self.meeting.close()
