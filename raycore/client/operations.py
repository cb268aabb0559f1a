"""One method per row of the operation table, made from the table: `client.operations.pause_scheduler(mode="wait")`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from raycore.errors import InvalidArgumentsError, UnknownOperationError
from raycore.operations import OPERATIONS, TABLE, Arguments, Operation


class Caller(Protocol):
    """Whoever carries out a call: the async client, or its blocking façade."""

    def call_operation(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """Call with the operation's own fan-out, or on one rank."""
        ...


def arguments_of(method: str, values: dict[str, Any]) -> tuple[Operation, Arguments]:
    """The operation and its checked arguments. UnknownOperationError or InvalidArgumentsError before anything is sent."""
    operation = OPERATIONS.get(method)
    if operation is None:
        msg = f"{method!r} is not a declared operation; there are: {', '.join(OPERATIONS)}"
        raise UnknownOperationError(msg, method=method)
    if not values and method in _WITHOUT_ARGUMENTS:
        return _WITHOUT_ARGUMENTS[method]
    fields = _FIELDS[method]
    unknown = values.keys() - fields.keys()
    if unknown:
        msg = f"{method} has no argument {', '.join(sorted(unknown))}"
        raise InvalidArgumentsError(msg, method=method)
    missing = [name for name, field in fields.items() if field.required and name not in values]
    if missing:
        msg = f"{method} needs {', '.join(missing)}"
        raise InvalidArgumentsError(msg, method=method)
    for name, value in values.items():
        try:
            msgspec.convert(value, fields[name].type)
        except msgspec.ValidationError as error:
            msg = f"{method}: {name}: {error}"
            raise InvalidArgumentsError(msg, method=method) from error
    return operation, operation.arguments(**values)


_FIELDS = {operation.name: {field.name: field for field in msgspec.structs.fields(operation.arguments)} for operation in TABLE}
"""Looked up once: asking a struct for its fields costs more than a call."""

_WITHOUT_ARGUMENTS = {
    name: (OPERATIONS[name], OPERATIONS[name].arguments())
    for name, fields in _FIELDS.items()
    if not any(f.required for f in fields.values())
}


class AsyncOperations:
    """The table's operations as coroutine methods; each also takes `rank` (one rank instead of the declared fan-out) and `timeout_s`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller


class BlockingOperations(AsyncOperations):
    """The same names, blocking: the façade's `call_operation` waits."""


def _method(operation: Operation) -> Callable[..., Any]:
    def call(self: AsyncOperations, *, rank: int | None = None, timeout_s: float | None = None, **arguments: Any) -> Any:
        return self._caller.call_operation(operation.name, rank, timeout_s, arguments)

    fields = msgspec.structs.fields(operation.arguments)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(
            inspect.Parameter(
                field.name,
                keyword,
                default=inspect.Parameter.empty if field.required else field.default if field.default is not msgspec.NODEFAULT else None,
                annotation=field.type,
            )
            for field in fields
        ),
        inspect.Parameter("rank", keyword, default=None, annotation=int | None),
        inspect.Parameter("timeout_s", keyword, default=None, annotation=float | None),
    ]
    call.__name__ = operation.name
    call.__qualname__ = f"Operations.{operation.name}"
    call.__doc__ = f"{operation.summary} Fan-out: {operation.fan_out.value}. {operation.arguments.__doc__}"
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


for _operation in TABLE:
    setattr(AsyncOperations, _operation.name, _method(_operation))
