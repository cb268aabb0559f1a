"""What a caller over HTTP is told when something is wrong: the OpenAI error shape, and which status each of our errors has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pydantic

from raycore.errors import (
    AdapterError,
    AdmissionError,
    ClientClosedError,
    ConfigurationError,
    DeadlineError,
    EngineError,
    EngineStateError,
    NotSupportedError,
    PauseInProgressError,
    PoolError,
    RaycoreError,
    RequestError,
    RequestFailedError,
    ScalingBusyError,
    TransportError,
    UtilityError,
)
from raycore.errors import CallTimeoutError as CallTimeout
from raycore.errors import InvalidArgumentsError as InvalidArguments
from raycore.sampling import SamplingParams

INVALID, SERVER = "invalid_request_error", "server_error"

_STATUS: tuple[tuple[type[RaycoreError], int, str, str], ...] = (
    (AdmissionError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (RequestFailedError, 500, SERVER, "request_failed"),
    (RequestError, 400, INVALID, "invalid_value"),
    (InvalidArguments, 400, INVALID, "invalid_value"),
    (NotSupportedError, 400, INVALID, "not_supported"),
    (AdapterError, 400, INVALID, "adapter"),
    (PauseInProgressError, 409, "conflict_error", "pause_in_progress"),
    (EngineStateError, 409, "conflict_error", "engine_state"),
    (ScalingBusyError, 409, "conflict_error", "scaling_in_progress"),
    (CallTimeout, 504, SERVER, "timeout"),
    (DeadlineError, 504, SERVER, "timeout"),
    (ConfigurationError, 400, INVALID, "not_supported"),
    (EngineError, 503, SERVER, "engine_unavailable"),
    (PoolError, 503, SERVER, "pool_unavailable"),
    (TransportError, 503, SERVER, "engine_unavailable"),
    (ClientClosedError, 503, SERVER, "shutting_down"),
    (UtilityError, 500, SERVER, "operation_failed"),
)
"""First match wins: a subclass stands before its base."""


class HttpError(Exception):
    """An answer that is an error: its status, and what the body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON object."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def bad_value(message: str, param: str | None = None, code: str = "invalid_value") -> HttpError:
    """A 400 about one argument."""
    return HttpError(400, message, code=code, param=param)


def of_raycore(error: RaycoreError) -> HttpError:
    """The answer to one of our errors; an overload says in `Retry-After` when to try again, in whole seconds as HTTP has it."""
    status, kind, code = next(
        ((status, kind, code) for cls, status, kind, code in _STATUS if isinstance(error, cls)), (500, SERVER, "error")
    )
    headers: dict[str, str] = {}
    if isinstance(error, AdmissionError):
        hint_s = max(0.0, error.retry_after_s)
        # the second is the OpenAI clients' own header, which they prefer
        headers = {"retry-after": str(max(1, math.ceil(hint_s))), "retry-after-ms": str(max(1, math.ceil(hint_s * 1000)))}
    message = str(error) or type(error).__name__
    # the checks of sampling parameters begin with the name of the one that is wrong
    name = message.split(maxsplit=1)[0].rstrip(":")
    param = name if isinstance(error, RequestError) and name in SamplingParams.__struct_fields__ else None
    return HttpError(status, message, kind=kind, code=code, param=param, headers=headers)


def of_validation(error: pydantic.ValidationError) -> HttpError:
    """The answer to a body that is not what it must be; it names the first place that is wrong."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    if first["type"] == "json_invalid":
        return HttpError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    param = _place(first["loc"])
    if first["type"] == "extra_forbidden":
        return HttpError(400, f"unrecognized request argument: {param}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return HttpError(400, f"missing required argument: {param}", param=param, code="missing_required_parameter")
    is_one_of = len(first["loc"]) > 1 and not _is_name(first["loc"][1])
    messages = dict.fromkeys(str(each["msg"]) for each in (found if is_one_of else found[:1]) if each["loc"][:1] == first["loc"][:1])
    text = "; or: ".join(list(messages)[:_MOST_FORMS])
    return bad_value(f"{param}: {text}" if param else text, param)


_MOST_FORMS = 4
_UNION_MEMBERS = frozenset({"str", "int", "float", "bool"})


def _is_name(part: Any) -> bool:
    """Whether this is a field or an index, and not the name that pydantic gives to a member of a union."""
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part not in _UNION_MEMBERS)


def _place(loc: Sequence[Any]) -> str | None:
    """`messages.0.content`."""
    return ".".join(str(part) for part in loc if _is_name(part)) or None
