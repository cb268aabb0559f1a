"""Functions that travel to engines by pickle: only where the pool was launched with `allow_pickle=True`, refused at both ends otherwise."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from raycore.errors import InvalidArgumentsError, PickleRefusedError

METHOD = "collective_rpc"
_REFUSAL = "a function is sent by pickle, and this pool was launched without allow_pickle=True; call a method of the engine by its name"


def with_pickled_function(arguments: dict[str, Any], *, is_allowed: bool) -> dict[str, Any]:
    """The arguments of a collective RPC with a callable `method` made bytes; others are returned as they are.

    PickleRefusedError where it is not allowed, InvalidArgumentsError for what does not pickle.
    """
    function = arguments.get("method")
    if isinstance(function, str) and not arguments.get("pickled"):
        return arguments
    if not callable(function) and not arguments.get("pickled"):
        return arguments  # neither a name nor a function: its type is refused with the others
    if not is_allowed:
        raise PickleRefusedError(_REFUSAL, method=METHOD)
    if not callable(function):
        return arguments
    import cloudpickle  # lambdas and functions of __main__, which pickle itself sends by name

    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        return {**arguments, "method": name, "pickled": cloudpickle.dumps(function)}
    except Exception as error:
        msg = f"the function {name} does not pickle: {error}"
        raise InvalidArgumentsError(msg, method=METHOD) from error


def function_of(pickled: bytes, name: str, *, is_allowed: bool) -> Callable[..., Any]:
    """The function that a client sent. PickleRefusedError, before a byte is unpickled, where the pool does not allow it."""
    if not is_allowed:
        raise PickleRefusedError(_REFUSAL, method=METHOD)
    try:
        function: object = pickle.loads(pickled)
    except Exception as error:
        msg = f"the function {name} does not unpickle here: {type(error).__name__}: {error}"
        raise InvalidArgumentsError(msg, method=METHOD) from error
    if not callable(function):
        msg = f"{name} is no function, but a {type(function).__name__}"
        raise InvalidArgumentsError(msg, method=METHOD)
    return function
