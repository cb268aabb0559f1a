"""What travels between clients and engine cores: one frozen struct per message, two closed unions.

Columns are little-endian uint32 in `bytes`, so that numpy and memoryview read them without a copy.
"""

from __future__ import annotations

from typing import Any

import msgspec

from raycore.engine import Detail, EngineInfo, EngineLoad
from raycore.errors import ErrorRecord
from raycore.ids import CallId, EngineId, RequestId, SessionId, Slot
from raycore.membership import Membership
from raycore.sampling import SamplingParams

PROTOCOL_VERSION = 1


class Attach(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Opens a session; always the first item of frame 0.

    `replaces` is the client's ended session with this engine, if any: its requests are aborted at once. `memory_probe` names a file in
    shared memory.
    """

    version: int
    pool: str
    incarnation: str
    client: str
    lease_s: float
    replaces: SessionId | None = None
    memory_probe: str = ""
    pid: int = 0


class Add(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Admits a request under a free slot of the session. `prompt` and `delivered` are uint32 columns."""

    slot: Slot
    request_id: RequestId
    prompt: bytes
    sampling: SamplingParams
    delivered: bytes = b""
    priority: int = 0
    tensors: dict[str, Any] | None = None


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Ends requests early; a slot that is not in use is ignored. `slots` is a uint32 column."""

    slots: bytes


class Call(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A utility call; `arguments` is the operation's argument struct, encoded."""

    call_id: CallId
    method: str
    arguments: msgspec.Raw


class CancelCall(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The caller no longer waits; a call that has not finished is dropped and never answered."""

    call_id: CallId


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Keeps the session's lease when there is nothing else to say."""


class Detach(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Ends the session by choice; its requests are aborted."""


ToEngine = Attach | Add | Abort | Call | CancelCall | Renew | Detach


class ClientFrame(msgspec.Struct, frozen=True, array_like=True):
    """All that a client says to one engine in one loop tick, in order."""

    seq: int
    items: list[ToEngine]


class Attached(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The session is open."""

    engine: EngineId
    info: EngineInfo
    membership: Membership
    can_share_memory: bool
    """Whether the engine could read the client's probe, i.e. both see the same `/dev/shm`."""


class StepColumns(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The session's share of one step.

    `slots`: uint32 column of requests that got tokens; empty while `tokens` is not: the slots of the session's previous step. `counts`:
    uint32 tokens of
    each row, empty when each row has one. `finished`: uint32 slots that ended, after their tokens here. `reasons`: one FinishReason byte
    each. `offsets`: (slot, position) of first outputs
    that do not begin at 0 (replays). `stamp_ns`: the engine host's monotonic clock when the step ended.
    """

    slots: bytes
    tokens: bytes
    counts: bytes = b""
    finished: bytes = b""
    reasons: bytes = b""
    stamp_ns: int = 0
    details: list[tuple[Slot, Detail]] = []
    offsets: list[tuple[Slot, int]] = []


class CallResult(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A utility call's answer: an encoded result, or an error."""

    call_id: CallId
    result: msgspec.Raw
    error: ErrorRecord | None = None


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A request was refused at admission; terminal for its slot."""

    slot: Slot
    error: ErrorRecord


class NotMember(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """This engine takes no new work; terminal for the slots (uint32 column), whose requests go elsewhere."""

    slots: bytes
    membership: Membership


class MembershipChanged(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A newer membership than the session was told before."""

    membership: Membership


class SessionExpired(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """The engine does not know this session (any more); nothing of it is running."""

    reason: str


class EngineFailed(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The step loop ended with an error; the last item an engine sends."""

    error: ErrorRecord


class AttachRefused(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The session cannot be opened: wrong pool, incarnation or protocol version."""

    reason: str


class BadFrame(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A frame of this session did not decode; the session goes on if its order is intact."""

    error: ErrorRecord
    request_id: RequestId | None = None


RareToClient = Attached | CallResult | Refused | NotMember | MembershipChanged | SessionExpired | EngineFailed | AttachRefused | BadFrame
"""Everything but a step's columns."""

ToClient = StepColumns | RareToClient


class EngineFrame(msgspec.Struct, frozen=True, array_like=True):
    """All that an engine says to one session after one step.

    `ack`: the highest `ClientFrame.seq` that the step thread had taken in. `load`: the engine's totals; `own_running`: the session's share.
    """

    seq: int
    ack: int
    load: EngineLoad
    own_requests: int
    items: list[ToClient]


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """Published by an engine core's beat thread, also while a long step runs."""

    engine: EngineId
    seq: int
    step: int
    """Counts finished activities; it moves whenever the step thread does."""
    activity: str
    """What the step thread is doing: "" when idle."""
    busy_s: float
    """How long it has been doing that."""
    budget_s: float
    """How long that may take."""
    load: EngineLoad
