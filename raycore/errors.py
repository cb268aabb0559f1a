"""The error tree, by whose fault it is and what the caller can do.

RaycoreError
├── RequestError            the request is wrong or was refused; fix it or send it elsewhere
│   ├── InvalidRequestError       malformed: prompt, sampling, ids (ValueError)
│   ├── DuplicateRequestError     this id is in flight
│   ├── UnknownRankError          an explicit rank that is no member
│   ├── RequestFailedError        the engine could not run this request; the others go on
│   └── AdmissionError            not now; retry_after_s says when to try again
│       └── OverloadedError             more waits, at the engines or in this client, than may
├── UtilityError            a utility call did not give a result
│   ├── UnknownOperationError     not a declared operation
│   ├── InvalidArgumentsError     arguments do not fit the declaration (TypeError)
│   ├── NotSupportedError         this engine, or this way of running it, cannot do that
│   ├── EngineStateError          not now: the engine sleeps, is awake already, or is at work; the text says what to do first
│   ├── AdapterError              a LoRA adapter that is wrong, unknown, in use, or finds no room
│   ├── SaveError                 weights that could not be written; nothing of them was left
│   ├── RemoteCallError           the method raised on the engine: type, message, method, rank
│   ├── CallTimeoutError          no reply before the deadline (TimeoutError)
│   ├── PickleRefusedError        a pickled function for a pool launched without allow_pickle
│   ├── UnsendableResultError     the call ran, and its result cannot travel
│   ├── PauseInProgressError      a pause or resume of somebody else has not ended
│   └── DisagreementError         ranks answered differently
├── EngineError             an engine is at fault; other ranks go on
│   ├── EngineDeadError           a process died, hung or failed: rank and cause
│   │   └── ExpertsLostError            likewise in an expert-parallel pool, which ended with it; rank: the one that was lost
│   ├── EngineStartError          an engine could not start: rank and cause
│   ├── LockstepError             ranks that step together lost one another
│   ├── WeightCopyError           weights did not come from peers: a rank that joins loads them from disk, a standby is made anew
│   └── RankLeftError             the rank left the pool, and the request was pinned to it
├── PoolError               the deployment as a whole
│   ├── ConfigurationError        the configuration cannot be right (ValueError)
│   ├── CapacityError             the cluster lacks resources: what is missing and where
│   ├── PoolNotFoundError         no pool of that name
│   ├── PoolExistsError           the name is taken
│   ├── NoEngineError             no engine can take work now
│   ├── ScalingError              a scaling operation was undone: its id, the phase, why
│   ├── ScalingBusyError          another scaling operation is running: its id
│   └── DeadlineError             a lifecycle step took too long (TimeoutError)
├── TransportError          bytes: a frame that does not decode, a session that is lost
│   ├── FrameError                a frame that does not decode or breaks its session's order
│   └── SessionLostError          a call's session ended; whether the call ran is not known
└── ClientClosedError       the client was shut down
"""

from __future__ import annotations

from typing import Any

import msgspec


class RaycoreError(Exception):
    """Base of every error that raycore raises on purpose."""


class RequestError(RaycoreError):
    """The request is at fault or was refused; `request_id` names it where known."""

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.__dict__)


class InvalidRequestError(RequestError, ValueError):
    """A prompt, a sampling value or an id that cannot be served as given."""


class DuplicateRequestError(RequestError):
    """A request with this id is in flight."""


class UnknownRankError(RequestError):
    """An explicit `data_parallel_rank` that is not a serving member."""


class RequestFailedError(RequestError):
    """The engine could not run this request; `remote_type` is the error's type there."""

    def __init__(self, message: str, *, request_id: str | None = None, remote_type: str = "", rank: int = -1) -> None:
        super().__init__(message, request_id=request_id)
        self.remote_type = remote_type
        self.rank = rank


class AdmissionError(RequestError):
    """The request cannot be taken in now; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, *, request_id: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class OverloadedError(AdmissionError):
    """As many requests or prompt tokens wait as may (`Limits`); `retry_after_s`: how long what waits will take at the measured rate."""


class UtilityError(RaycoreError):
    """A utility call gave no result; `method` and `rank` say which."""

    def __init__(self, message: str, *, method: str = "", rank: int | None = None) -> None:
        super().__init__(message)
        self.method = method
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.__dict__)


class UnknownOperationError(UtilityError):
    """Only declared operations can be called (`raycore/operations.py`)."""


class InvalidArgumentsError(UtilityError, TypeError):
    """The arguments do not fit the operation's declaration."""


class NotSupportedError(UtilityError):
    """This engine, or this way of running it, cannot do the operation."""


class EngineStateError(UtilityError):
    """The engine is not in a state for this operation; the text says what to do first."""


class AdapterError(UtilityError):
    """A LoRA adapter that cannot be loaded, found, removed or given room; the engine goes on as it was."""


class SaveError(UtilityError):
    """Weights could not be written; nothing half written is left."""


class RemoteCallError(UtilityError):
    """The method raised on the engine."""

    def __init__(self, message: str, *, method: str = "", rank: int | None = None, remote_type: str = "", traceback: str = "") -> None:
        super().__init__(message, method=method, rank=rank)
        self.remote_type = remote_type
        self.traceback = traceback


class CallTimeoutError(UtilityError, TimeoutError):
    """No reply before the call's deadline."""


class PickleRefusedError(UtilityError):
    """A function can be sent only to a pool that was launched with `allow_pickle=True`; nothing was unpickled."""


class UnsendableResultError(UtilityError):
    """The call ran on the engine, and what it returned cannot be sent."""


class PauseInProgressError(UtilityError):
    """A pause (or resume) is in progress and has not completed; nothing was changed. Try again when it has, or end it first."""


class DisagreementError(UtilityError):
    """Ranks answered differently; `results` holds each rank's answer."""

    def __init__(self, message: str, *, method: str = "", results: dict[int, Any] | None = None) -> None:
        super().__init__(message, method=method)
        self.results = results or {}


class EngineError(RaycoreError):
    """An engine is at fault; `rank` and `cause` say which and why."""

    def __init__(self, message: str, *, rank: int = -1, cause: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.__dict__)


class EngineDeadError(EngineError):
    """The engine's process died, hung, or its step loop failed."""


class ExpertsLostError(EngineDeadError):
    """An expert-parallel pool lost a rank and its experts, and has ended; `rank` and `cause` are those of the rank that was lost."""


class LockstepError(EngineError):
    """Ranks that step together lost one another: a collective failed, or took too long, or no new group came."""


class WeightCopyError(EngineError):
    """Weights that peers offered did not come, or do not fit what is to be made of them."""


class EngineStartError(EngineError):
    """The engine could not start."""


class RankLeftError(EngineError):
    """The rank left the pool by choice, and the request may run on no other."""


class PoolError(RaycoreError):
    """The deployment as a whole is at fault."""


class ConfigurationError(PoolError, ValueError):
    """The configuration cannot be right."""


class CapacityError(PoolError):
    """The cluster lacks resources; the text says what is missing and where."""


class PoolNotFoundError(PoolError):
    """There is no pool of that name."""


class PoolExistsError(PoolError):
    """A pool of that name runs already."""


class NoEngineError(PoolError):
    """No engine of the pool can take work now."""


class ScalingError(PoolError):
    """A scaling operation failed and was undone; the old topology serves. `operation`, `phase`: which one, and where it failed."""

    def __init__(self, message: str, *, operation: str = "", phase: str = "") -> None:
        super().__init__(message)
        self.operation = operation
        self.phase = phase

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.__dict__)


class ScalingBusyError(ScalingError):
    """Another scaling operation is running; nothing was done. `operation` and `phase` say which and where it is."""


class DeadlineError(PoolError, TimeoutError):
    """A lifecycle step took longer than its limit."""


class TransportError(RaycoreError):
    """A channel is closed or a peer cannot be reached."""


class FrameError(TransportError):
    """A frame that does not decode or breaks the session's order."""


class SessionLostError(TransportError):
    """The session that carried a call ended before its answer; the call may or may not have run."""


class ClientClosedError(RaycoreError):
    """The client was shut down while, or before, this was asked."""


def sendable(text: str) -> str:
    """`text` without lone surrogates, which an undecodable file name brings into a message and which no encoder takes."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class ErrorRecord(msgspec.Struct, frozen=True, array_like=True):
    """An error on the wire: the type's name, its text, optionally the remote traceback, and when to try again."""

    type: str
    message: str
    traceback: str = ""
    retry_after_s: float | None = None


def _rebuild(kind: type[RaycoreError], message: str, state: dict[str, Any]) -> RaycoreError:
    """Rebuild an error with keyword fields when it is unpickled (Ray carries errors between processes)."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error
