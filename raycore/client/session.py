"""One session with one engine incarnation: numbers, slots, what waits to be sent, and the taking in of the engine's frames."""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections.abc import Callable, Iterable
from typing import Any, Protocol, assert_never

import msgspec

from raycore.client.journal import RequestRecord
from raycore.client.meter import DrainMeter
from raycore.client.slots import SlotTable
from raycore.codec import FrameDecoder, FrameEncoder
from raycore.config import Limits
from raycore.errors import ErrorRecord, FrameError
from raycore.ids import CallId, EngineId, SessionId, Slot
from raycore.membership import Member, Membership
from raycore.messages import (
    OUTSIDE_THE_ORDER,
    PROTOCOL_VERSION,
    Abort,
    Add,
    Attach,
    Attached,
    AttachRefused,
    BadFrame,
    Call,
    CallResult,
    CancelCall,
    ClientFrame,
    Detach,
    EngineFailed,
    EngineFrame,
    MembershipChanged,
    NotMember,
    RareToClient,
    Refused,
    Renew,
    SessionExpired,
    StepColumns,
    ToEngine,
)
from raycore.routing.book import LedgerBook
from raycore.routing.ledger import EngineLedger
from raycore.tensors import SharedMemoryFiles, TensorReader
from raycore.transport.channel import ClientChannel, Message

_QUICK_LOSS_S = 1.0
_ITEMS_A_FRAME = 128
"""A burst is sent in frames of so many items, so that the engine begins on it while the rest is still being made."""


class SessionOwner(Protocol):
    """Who decides what follows from a session's own news."""

    def on_attached(self, session: EngineSession) -> None:
        """The session is open."""
        ...

    def on_attach_refused(self, session: EngineSession, reason: str) -> None:
        """The session cannot be opened."""
        ...

    def on_lost(self, session: EngineSession, reason: str) -> None:
        """The session is over, its engine is not."""
        ...

    def on_peer_gone(self, session: EngineSession, reason: str) -> None:
        """The connection ended and nobody listens at the engine's end any more."""
        ...

    def on_engine_failed(self, session: EngineSession, error: ErrorRecord) -> None:
        """The engine's step loop is over."""
        ...

    def on_membership(self, membership: Membership) -> None:
        """An engine told of a newer membership."""
        ...

    def on_engine_told(self, session: EngineSession) -> None:
        """The session's own engine has taken a membership, which this client may have known before."""
        ...


class RequestSink(Protocol):
    """Who decides what follows from the ends of requests and calls."""

    def on_finished(self, record: RequestRecord) -> None:
        """A request got its terminal record; it is woken afterwards."""
        ...

    def on_refused(self, session: EngineSession, record: RequestRecord, error: ErrorRecord) -> None:
        """The engine refused a request."""
        ...

    def on_not_member(self, session: EngineSession, records: list[RequestRecord]) -> None:
        """These requests must go elsewhere."""
        ...

    def on_call_result(self, session: EngineSession, result: CallResult) -> None:
        """A call was answered."""
        ...

    def on_pause_stamp(self) -> None:
        """An engine tells of another pause or resume over all ranks than before."""
        ...


class EngineSession:
    """Created for one member; `open` attaches; ends by `close`, loss or the engine's death, and is never reused."""

    def __init__(
        self,
        member: Member,
        make_channel: Callable[[Member, SessionId], ClientChannel],
        owner: SessionOwner,
        sink: RequestSink,
        *,
        pool: str,
        client: str,
        pid: int,
        limits: Limits,
        files: SharedMemoryFiles | None,
        replaces: SessionId | None = None,
        quick_losses: int = 0,
        book: LedgerBook,
        meter: DrainMeter | None = None,
    ) -> None:
        session_id = b"\x01" + secrets.token_bytes(15)  # ZeroMQ keeps ids that begin with a zero byte for itself
        self.id = SessionId(session_id)
        self.member = member
        self.engine: EngineId = member.engine
        info = member.info
        self.ledger = EngineLedger(member.engine, book, kv_capacity=info.kv_tokens, steps_together=info.sync_interval > 0)
        self._slots = SlotTable(self.ledger, book, limits.session_requests, self._finished, meter)
        self.is_attached = False
        self.is_closed = False
        self.sent_at_s = 0.0
        self.pause_stamp = 0
        """The last pause or resume over all ranks that the engine told of."""
        self.decoder = FrameDecoder(EngineFrame, TensorReader(pool))
        self._channel = make_channel(member, self.id)
        self._owner = owner
        self._sink = sink
        self._pool = pool
        self._client = client
        self._pid = pid
        self._limits = limits
        self._files = files
        self._replaces = replaces
        self._encoder = FrameEncoder(inline_bytes=limits.inline_tensor_bytes, shared_memory_bytes=limits.shared_memory_bytes)
        self._outbox: list[ToEngine] = []
        self._call_files: dict[int, tuple[str, ...]] = {}
        self._is_flush_due = False
        self._next_out = 0
        self._next_in = 0
        self._loop = asyncio.get_running_loop()
        self._opened_at_s = self._loop.time()
        self._quick_losses = quick_losses
        self._report: EngineFrame | None = None
        self._is_open = False
        self._probe = ""

    def quick_losses_with(self, now_s: float) -> int:
        """How many sessions with this engine, this one included, were lost soon after they were made."""
        return self._quick_losses + 1 if now_s - self._opened_at_s < _QUICK_LOSS_S else 0

    # -- to the engine ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect and attach; what was submitted before follows in order."""
        if self.is_closed or self._is_open:
            return
        self._is_open = True
        self._channel.open(self._on_messages, self._on_closed)
        if self._files is not None:
            self._probe = self._write_probe(self._files)
        incarnation, lease_s = self.engine.incarnation, self._limits.lease_s
        attach = Attach(PROTOCOL_VERSION, self._pool, incarnation, self._client, lease_s, self._replaces, self._probe, self._pid)
        self._outbox.insert(0, attach)
        self._schedule_flush()

    @staticmethod
    def _write_probe(files: SharedMemoryFiles) -> str:
        try:
            name = files.write(memoryview(b"\0"))
        except OSError:
            return ""  # no shared memory here: tensors go as frames
        files.take_names()
        return name

    def submit(self, record: RequestRecord) -> None:
        """Send a request to this engine, with the tokens that its caller has already. TypeError for tensors that cannot be sent."""
        tensors: Any = self._encode_tensors(record) if record.tensors else None
        slot = self._slots.add(record)
        record.session = self
        record.served_rank = self.engine.rank
        delivered = array("I", record.tokens).tobytes() if record.tokens else b""
        add = Add(
            slot,
            record.request_id,
            record.prompt,
            record.sampling,
            delivered,
            record.priority,
            tensors,  # type: ignore[arg-type]
            record.lora,
            record.embeds,
            record.was_admitted,
        )
        self._post(add)

    def abort(self, records: Iterable[RequestRecord]) -> None:
        """Ask the engine to end these; their terminal records follow."""
        self._post(Abort(array("I", [record.slot for record in records]).tobytes()))

    def _encode_tensors(self, record: RequestRecord) -> msgspec.Raw:
        self._discard_files(record)
        try:
            return self._encoder.encode_part(record.tensors)
        except TypeError:
            if self._files is not None:
                self._files.discard_all()
            raise
        finally:
            record.files = () if self._files is None else self._files.take_names()

    def call(self, call_id: CallId, method: str, arguments: msgspec.Struct, pool_call: str = "") -> None:
        """Send a utility call. TypeError for arguments that cannot be sent."""
        try:
            encoded = self._encoder.encode_part(arguments)
        except TypeError:
            if self._files is not None:
                self._files.discard_all()
            raise
        if self._files is not None and self._files.has_names:
            self._call_files[call_id] = self._files.take_names()
        self._post(Call(call_id, method, encoded, pool_call))

    def end_call(self, call_id: CallId) -> None:
        """The call is over: its files are not needed any more."""
        if self._call_files and self._files is not None:
            for name in self._call_files.pop(call_id, ()):
                self._files.discard(name)

    def cancel_call(self, call_id: CallId) -> None:
        """Tell the engine that nobody waits for this call any more."""
        self.end_call(call_id)
        if not self.is_closed:
            self._post(CancelCall(call_id))

    def renew(self, now_s: float) -> None:
        """Keep the lease if nothing has been sent for a third of it."""
        if now_s - self.sent_at_s > self._limits.lease_s / 3:
            self._post(Renew())

    def close(self, *, farewell: bool = False) -> None:
        """Leave; no callback follows. With `farewell` the engine is told, otherwise it is gone or must not matter."""
        if self.is_closed:
            return
        self.is_closed = True
        self.is_attached = False
        self.ledger.is_usable = False
        if farewell and self._is_open:
            self._outbox.append(Detach())
            self._send_outbox()
            self._channel.flush_and_close()
        else:
            self._channel.close()
        if self._files is not None and self._probe:
            self._files.discard(self._probe)
        for call_id in list(self._call_files):
            self.end_call(CallId(call_id))

    def release_records(self) -> list[RequestRecord]:
        """Every request that has no terminal record yet; the session keeps none of them."""
        left = self._slots.clear()
        for record in left:
            self._discard_files(record)
        return left

    def live(self) -> list[RequestRecord]:
        """Every request that has no terminal record yet."""
        return self._slots.live()

    def _post(self, item: ToEngine) -> None:
        self._outbox.append(item)
        if not self._is_open:
            return
        if len(self._outbox) >= _ITEMS_A_FRAME:
            self._send_outbox()
        elif not self._is_flush_due:
            self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if not self.is_closed and self._outbox:
            self._send_outbox()

    def _send_outbox(self) -> None:
        items, self._outbox = self._outbox, []
        frame = ClientFrame(self._next_out, items)
        self._next_out += 1
        message = self._encoder.encode(frame)
        self.ledger.sent(frame.seq)
        self.sent_at_s = self._loop.time()
        self._channel.send(message)

    def _discard_files(self, record: RequestRecord) -> None:
        if record.files and self._files is not None:
            for name in record.files:
                self._files.discard(name)
            record.files = ()

    @property
    def room(self) -> int:
        """How many more requests it may have."""
        return self._slots.room

    @property
    def stamp_ns(self) -> int:
        """The engine host's monotonic clock at the end of the last step that was taken in."""
        return self._slots.stamp_ns

    # -- from the engine ----------------------------------------------------------------------------------------------

    def _on_messages(self, messages: list[Message]) -> None:
        """Take in everything that is ready, then wake each request once."""
        for message in messages:
            problem = self._take_message(message)
            if self.is_closed:
                return
            if problem:
                self._slots.settle()
                self._owner.on_lost(self, problem)
                return
        self._slots.settle()
        self._take_report()

    def _take_report(self) -> None:
        """The newest frame's totals, after the outputs of all: what came together is one report."""
        frame, self._report = self._report, None
        if frame is not None:
            self.ledger.report(frame.load, frame.ack, frame.unit_ns, is_paused=frame.is_paused)

    def _on_closed(self, reason: str, peer_is_gone: bool) -> None:
        """The connection ended."""
        if self.is_closed:
            return
        self._slots.settle()
        if peer_is_gone:
            self._owner.on_peer_gone(self, reason)
        else:
            self._owner.on_lost(self, reason)

    def _take_message(self, message: Message) -> str | None:
        """Take in one frame; why the session cannot go on, if it cannot."""
        try:
            frame = self.decoder.decode(message)
        except FrameError as error:
            return str(error)
        if frame.seq == self._next_in:
            self._next_in += 1
            self._report = frame
        elif frame.seq != OUTSIDE_THE_ORDER:
            return f"frame {frame.seq} came where {self._next_in} was due"
        if frame.pause_stamp != self.pause_stamp and frame.seq != OUTSIDE_THE_ORDER:
            self.pause_stamp = frame.pause_stamp
            self._sink.on_pause_stamp()
        for item in frame.items:
            if isinstance(item, StepColumns):
                problem = self._slots.take(item)
                if problem:
                    return problem
            else:
                self._take_rare(item)
                if self.is_closed:
                    return None  # the item ended the session; what follows it is stale
        return None

    def _finished(self, record: RequestRecord) -> None:
        if record.files:
            self._discard_files(record)
        self._sink.on_finished(record)

    def _take_rare(self, item: RareToClient) -> None:  # noqa: C901 -- one case per message
        match item:
            case CallResult():
                self._sink.on_call_result(self, item)
            case Attached():
                self._take_attached(item)
            case Refused():
                record = self._free_slot(item.slot)
                if record is not None:
                    self._sink.on_refused(self, record, item.error)
            case NotMember():
                self._take_not_member(item)
            case MembershipChanged():
                self._owner.on_membership(item.membership)
                self._owner.on_engine_told(self)
            case SessionExpired():
                self._owner.on_lost(self, item.reason)
            case EngineFailed():
                self._owner.on_engine_failed(self, item.error)
            case AttachRefused():
                self._owner.on_attach_refused(self, item.reason)
            case BadFrame():
                self._owner.on_lost(self, item.error.message)
            case _:
                assert_never(item)

    def _take_not_member(self, item: NotMember) -> None:
        freed = [self._free_slot(Slot(slot)) for slot in memoryview(item.slots).cast("I").tolist()]
        self._owner.on_membership(item.membership)
        self._sink.on_not_member(self, [record for record in freed if record is not None])

    def _take_attached(self, attached: Attached) -> None:
        if self._files is not None and attached.can_share_memory and self._probe:
            self._encoder.share_memory(self._files)
        self.is_attached = True
        self.ledger.is_usable = True
        self._owner.on_attached(self)
        self._owner.on_membership(attached.membership)

    def _free_slot(self, slot: int) -> RequestRecord | None:
        record = self._slots.free(slot)
        if record is not None:
            self._discard_files(record)
        return record
