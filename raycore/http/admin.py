"""Routes about the pool: scaling and its operations, pause and resume, sleep and wake-up, health."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar
from urllib.parse import parse_qsl

import msgspec

from raycore.client.client import EngineCoreClient
from raycore.http.endpoint import Asked, Reply
from raycore.http.errors import SERVER, HttpError, bad_value
from raycore.http.protocol import Body, PauseBody, ScaleBody, SleepBody, WakeUpBody, parse
from raycore.http.replies import encode

_ENDS = frozenset({"done", "undone"})
"""Phases in which an operation has ended (`elastic.operation.Phase`)."""

AnyBody = TypeVar("AnyBody", bound=Body)


class PoolDesk(Protocol):
    """What the front asks of the pool's controller besides what its client can do."""

    async def status(self) -> dict[str, Any]:
        """As `raycore status` shows it; `operations`: the running one and the last ones, newest first."""
        ...

    async def begin_scaling(self, target: int) -> str:
        """Begin to scale and return the operation's id; it goes on by itself. Errors as `EngineCoreClient.scale_elastic_ep`."""
        ...


class Administration:
    """The handlers."""

    def __init__(self, client: EngineCoreClient, desk: PoolDesk | None) -> None:
        self._client = client
        self._desk = desk

    async def scale(self, asked: Asked) -> Reply:
        """POST /scale_elastic_ep: 200 with what was done, or 202 with the operation's id. It goes on when its caller leaves."""
        ask = parse(ScaleBody, asked.body)
        if ask.wait:
            return Reply(msgspec.json.encode(await self._client.scale_elastic_ep(ask.new_data_parallel_size)))
        return Reply(encode({"operation": await self._pool().begin_scaling(ask.new_data_parallel_size)}), status=202)

    async def is_scaling(self, _asked: Asked) -> Reply:
        """GET or POST /is_scaling_elastic_ep."""
        return Reply(encode({"is_scaling_elastic_ep": any(row["phase"] not in _ENDS for row in await self._operations())}))

    async def operations(self, _asked: Asked) -> Reply:
        """GET /operations: the running one and the last ones, newest first."""
        return Reply(encode({"object": "list", "data": await self._operations()}))

    async def operation(self, asked: Asked) -> Reply:
        """GET /operations/{id}, from any replica: the controller knows."""
        wanted = asked.path_params["operation"]
        for row in await self._operations():
            if row["operation"] == wanted:
                return Reply(encode({**row, "is_running": row["phase"] not in _ENDS}))
        raise HttpError(
            404, f"no operation {wanted[:200]!r} is running or among the last ones", code="operation_not_found", param="operation"
        )

    async def pause(self, asked: Asked) -> Reply:
        """POST /pause."""
        ask = _from_body_or_query(PauseBody, asked)
        await self._call("pause_scheduler", mode=ask.mode, clear_cache=ask.clear_cache)
        return Reply(encode({"status": "paused"}))

    async def resume(self, _asked: Asked) -> Reply:
        """POST /resume."""
        await self._call("resume_scheduler")
        return Reply(encode({"status": "resumed"}))

    async def is_paused(self, _asked: Asked) -> Reply:
        """GET /is_paused."""
        return Reply(encode({"is_paused": await self._call("is_scheduler_paused")}))

    async def sleep(self, asked: Asked) -> Reply:
        """POST /sleep."""
        ask = _from_body_or_query(SleepBody, asked)
        await self._call("sleep", level=ask.level, mode=ask.mode)
        return Reply(encode({"status": "sleeping"}))

    async def wake_up(self, asked: Asked) -> Reply:
        """POST /wake_up; `is_awake` false: something is still away."""
        ask = _from_body_or_query(WakeUpBody, asked)
        return Reply(encode({"is_awake": await self._call("wake_up", tags=ask.tags)}))

    async def is_sleeping(self, _asked: Asked) -> Reply:
        """GET /is_sleeping."""
        return Reply(encode({"is_sleeping": await self._call("is_sleeping")}))

    async def health(self, _asked: Asked) -> Reply:
        """GET /health: 200 while a rank serves, as this client sees it; nobody is asked, so nothing can be in the way."""
        ranks = self._client.ranks()
        if not ranks:
            raise HttpError(503, "no rank of the pool serves", kind=SERVER, code="pool_unavailable")
        return Reply(encode({"status": "ok", "ranks": ranks}))

    async def _call(self, operation: str, **arguments: Any) -> Any:
        return await self._client.call_operation(operation, None, None, arguments)

    async def _operations(self) -> list[dict[str, Any]]:
        return (await self._pool().status())["operations"]

    def _pool(self) -> PoolDesk:
        if self._desk is None:
            raise bad_value("this server's engine has no controller, and cannot scale", code="not_supported")
        return self._desk


def _from_body_or_query(kind: type[AnyBody], asked: Asked) -> AnyBody:
    """The arguments of a body, or of a query string, in which a name may come several times (`tags=weights&tags=kv_cache`)."""
    if asked.body or not asked.query:
        return parse(kind, asked.body)
    values: dict[str, Any] = {}
    for name, text in parse_qsl(asked.query, keep_blank_values=True):
        value: Any = {"true": True, "false": False}.get(text.lower(), int(text) if text.isascii() and text.isdigit() else text)
        if name == "tags":
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    return parse(kind, encode(values))
