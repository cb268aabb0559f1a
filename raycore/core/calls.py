"""Utility calls on one engine core: only declared operations, arguments checked, errors kept as what they are."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from raycore.core.pause import PauseConflictError
from raycore.core.profiler import Profiler, PythonTrace
from raycore.core.sessions import Session
from raycore.engine import MAKE_TRACE, Engine
from raycore.errors import (
    ErrorRecord,
    FrameError,
    InvalidArgumentsError,
    NotSupportedError,
    PauseInProgressError,
    UnknownOperationError,
    sendable,
)
from raycore.ids import CallId
from raycore.operations import OPERATIONS, PHASES, Arguments, CollectiveRpcArguments, Operation, ProfileArguments
from raycore.pickled import function_of


class Deferred:
    """Returned by a method whose answer comes later."""


DEFERRED = Deferred()


@dataclass(slots=True, frozen=True)
class CallToken:
    """One call of one session; equal to itself only while it is pending."""

    session: Session
    call_id: CallId


CoreMethod = Callable[[Any, CallToken], Any]
"""A method of the engine core: its arguments, and the token to answer later."""


class CallDispatcher:
    """Finds and runs the method of a call; never raises for what a caller did wrong."""

    def __init__(self, engine: Engine, rank: int, core_methods: Mapping[str, CoreMethod], *, allow_pickle: bool) -> None:
        self._engine = engine
        self._allow_pickle = allow_pickle
        self._core_methods = {**core_methods, "collective_rpc": self._collective_rpc, "profile": self._profile}
        self.profiler = Profiler(rank)

    def run(self, operation: Operation, arguments: Arguments, token: CallToken) -> Any:
        """The result, or DEFERRED; raises what the method raises."""
        if operation.by_core:
            return self._core_methods[operation.name](arguments, token)
        method = self._engine.utilities().get(operation.name)
        if method is None:
            msg = f"{operation.name} is not supported by the engine {self._engine.info.engine!r}"
            raise NotSupportedError(msg, method=operation.name)
        return method(**msgspec.structs.asdict(arguments))

    def _collective_rpc(self, arguments: CollectiveRpcArguments, _token: CallToken) -> Any:
        args = arguments.args
        if arguments.pickled:
            method = function_of(arguments.pickled, arguments.method, is_allowed=self._allow_pickle)
            args = [self._engine, *args]
        else:
            method = self._rpc_method(arguments.method)
        try:
            signature = inspect.signature(method)
        except ValueError:
            signature = None  # a builtin that does not tell; it checks for itself
        try:
            if signature is not None:
                signature.bind(*args, **arguments.kwargs)
        except TypeError as error:
            msg = f"{arguments.method}: {error}"
            raise InvalidArgumentsError(msg, method="collective_rpc") from error
        try:
            return method(*args, **arguments.kwargs)
        except Exception:
            raise
        except BaseException as error:
            # SystemExit, KeyboardInterrupt: what somebody's function raises ends that call, not the engine and its requests
            message = f"{arguments.method} raised {type(error).__name__}: {_text_of(error)}"
            raise RuntimeError(message) from error

    def _rpc_method(self, name: str) -> Callable[..., Any]:
        method = self._engine.rpc_methods().get(name)
        if method is None:
            known = ", ".join(sorted(self._engine.rpc_methods())) or "none"
            msg = f"the engine {self._engine.info.engine!r} has no RPC method {name!r}; it has: {known}"
            raise NotSupportedError(msg, method="collective_rpc")
        return method

    def _profile(self, arguments: ProfileArguments, _token: CallToken) -> str:
        if not arguments.start:
            return self.profiler.stop()
        make_trace = self._engine.utilities().get(MAKE_TRACE, PythonTrace)
        return self.profiler.start(arguments, make_trace())


def find_operation(name: str) -> Operation:
    """The declared operation; UnknownOperationError for anything else."""
    operation = PHASES.get(name) or OPERATIONS.get(name)
    if operation is None:
        msg = f"{name!r} is not a declared operation"
        raise UnknownOperationError(msg, method=name)
    return operation


def error_record(error: BaseException) -> ErrorRecord:
    """An error as it travels: type, text and traceback."""
    text = sendable(_text_of(error))
    if isinstance(error, PauseConflictError):
        return ErrorRecord(PauseInProgressError.__name__, text)
    if isinstance(error, FrameError):
        return ErrorRecord(InvalidArgumentsError.__name__, text)
    return ErrorRecord(type(error).__name__, text, sendable("".join(traceback.format_exception(error))))


def _text_of(error: BaseException) -> str:
    try:
        return str(error) or repr(error)
    except BaseException as failure:  # noqa: BLE001 -- the error of a function or engine of others, and whatever its text raises
        return f"its text raised {type(failure).__name__}"
