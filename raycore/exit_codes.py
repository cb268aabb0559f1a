"""What the exit code of `raycore` means, and which error ends with which."""

from __future__ import annotations

import enum

from raycore.errors import (
    CallTimeoutError,
    CapacityError,
    ConfigurationError,
    DeadlineError,
    EngineStateError,
    InvalidArgumentsError,
    InvalidRequestError,
    NoEngineError,
    OverloadedError,
    PauseInProgressError,
    PoolExistsError,
    PoolNotFoundError,
    RaycoreError,
    ScalingBusyError,
    UnknownRankError,
)


class ExitCode(enum.IntEnum):
    """For scripts; documented in `docs/usage.md` and in `raycore --help`."""

    DONE = 0
    FAILED = 1
    WRONG_USAGE = 2
    NOT_FOUND = 3
    NO_CAPACITY = 4
    NOT_NOW = 5
    TOO_LATE = 6
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed",
    ExitCode.WRONG_USAGE: "wrong usage",
    ExitCode.NOT_FOUND: "no such pool or rank",
    ExitCode.NO_CAPACITY: "the cluster or the pool has no room",
    ExitCode.NOT_NOW: "what the pool does is in the way; later it may work",
    ExitCode.TOO_LATE: "no answer in time",
    ExitCode.INTERRUPTED: "interrupted",
}

_OF_ERRORS: tuple[tuple[ExitCode, tuple[type[RaycoreError], ...]], ...] = (
    (ExitCode.WRONG_USAGE, (ConfigurationError, InvalidRequestError, InvalidArgumentsError)),
    (ExitCode.NOT_FOUND, (PoolNotFoundError, UnknownRankError)),
    (ExitCode.NO_CAPACITY, (CapacityError, NoEngineError, OverloadedError)),
    (ExitCode.NOT_NOW, (ScalingBusyError, PauseInProgressError, EngineStateError, PoolExistsError)),
    (ExitCode.TOO_LATE, (DeadlineError, CallTimeoutError)),
)


def exit_code(error: RaycoreError) -> ExitCode:
    """The code of a command that ends with this error."""
    return next((code for code, kinds in _OF_ERRORS if isinstance(error, kinds)), ExitCode.FAILED)
