"""What travels between clients and engine cores: one frozen struct per message, two closed unions.

Columns are little-endian uint32 in `bytes`, so that numpy and memoryview read them without a copy.
"""

from __future__ import annotations

from typing import Any

import msgspec

from raycore.engine import Detail, EngineInfo, EngineLoad
from raycore.errors import ErrorRecord
from raycore.ids import CallId, EngineId, GroupStamp, RequestId, SessionId, Slot
from raycore.membership import Membership
from raycore.sampling import SamplingParams
from raycore.waves import Phase

PROTOCOL_VERSION = 3


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
    """Admits a request under a free slot of the session. `prompt` and `delivered` are uint32 columns.

    `prompt` is empty where `tensors` has `prompt_embeds`.
    `was_admitted`: an engine took it in before (a replay), so that limits of what may wait do not refuse it.
    """

    slot: Slot
    request_id: RequestId
    prompt: bytes
    sampling: SamplingParams
    delivered: bytes = b""
    priority: int = 0
    tensors: dict[str, Any] | None = None
    lora: str | int | None = None
    embeds: bool = False
    """The task: a vector of the prompt instead of tokens after it."""
    was_admitted: bool = False


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Ends requests early; a slot that is not in use is ignored. `slots` is a uint32 column."""

    slots: bytes


class Call(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A utility call; `arguments` is the operation's argument struct, encoded.

    `pool_call`: its client's name for a call that changes the engines of all ranks, the same at each of them; empty for any other.
    """

    call_id: CallId
    method: str
    arguments: msgspec.Raw
    pool_call: str = ""


class CancelCall(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The caller no longer waits; a call that has not finished is dropped and never answered."""

    call_id: CallId


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Keeps the session's lease when there is nothing else to say."""


class Detach(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Ends the session by choice; its requests are aborted."""


class Wake(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """A member of the group is in this wave: join it. Said by peers and the coordinator, outside the order of any session."""

    stamp: GroupStamp
    wave: int


ToEngine = Attach | Add | Abort | Call | CancelCall | Renew | Detach | Wake

OUTSIDE_THE_ORDER = -1
"""The number of frames between a peer and an engine that have no session."""


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


class LogprobColumns(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities of R tokens: `raycore.engine.LogprobRows` with slots for handles. Little-endian uint32 and float32 columns."""

    slots: bytes
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    widths: bytes
    top_ids: bytes
    top_logprobs: bytes
    of_prompt: bool = False


class StepColumns(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The session's share of one step.

    `slots`: uint32 column of requests that got tokens; empty while `tokens` is not: the slots of the session's previous step. `counts`:
    uint32 tokens of
    each row, empty when each row has one. `finished`: uint32 slots that ended, after their tokens here. `reasons`: one FinishReason byte
    each. `offsets`: (slot, position) of first outputs
    that do not begin at 0 (replays). `stamp_ns`: the engine host's monotonic clock when the step ended. `logprobs`: of this step's tokens
    whose requests asked; nothing is sent again in a replay.
    """

    slots: bytes
    tokens: bytes
    counts: bytes = b""
    finished: bytes = b""
    reasons: bytes = b""
    stamp_ns: int = 0
    details: list[tuple[Slot, Detail]] = []
    offsets: list[tuple[Slot, int]] = []
    logprobs: list[LogprobColumns] = []


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

    `ack`: the highest `ClientFrame.seq` that the step thread had taken in. `load`: the engine's totals with all that was taken in by then;
    `own_requests`: the session's.
    `pause_stamp`: the last pause or resume over all ranks that was carried out here, so that a client notices a rank that missed one.
    """

    seq: int
    ack: int
    load: EngineLoad
    own_requests: int
    items: list[ToClient]
    pause_stamp: int = 0
    is_paused: bool = False
    """Whether new requests wait for a resume."""
    unit_ns: int = 0
    """Nanoseconds that the engine takes for a unit of work (`raycore/routing/work.py`); 0: not known."""


class WaveReport(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank in lockstep is; `since`: counts its changes, so that the newer of two reports is known."""

    stamp: GroupStamp
    phase: Phase
    wave: int
    since: int
    failure: str = ""
    """Why the group is broken here."""


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
    is_sleeping: bool = False
    memory: dict[str, int] = {}
    """Bytes by name, as the engine reports them."""
    cache: dict[str, int | float] = {}
    """Counts and rates of its KV cache."""
    wave: WaveReport | None = None
    """Ranks in lockstep only."""
    is_paused: bool = False
    """Paused, or about to be; a rank that sleeps need not be."""


class RankLoad(msgspec.Struct, frozen=True, array_like=True):
    """One engine's load as last heard by the coordinator."""

    engine: EngineId
    load: EngineLoad
    age_s: float
    """Since it was heard."""


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """Published by the coordinator: the load of every member, and whether a pool in lockstep runs a wave, as its ranks report it."""

    seq: int
    loads: list[RankLoad]
    is_running: bool = False
    wave: int = 0
