"""Ray Serve: replicas that are HTTP fronts of one pool, which lives outside of them.

`serve run actors.serving:build model=/path data_parallel_size=2`, the import path of `examples/serve.yaml`, and `raycore serve`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import msgspec
import pydantic
from ray import serve

from actors.control_plane import RayControlPlane, find_actor
from actors.launch import connect
from actors.naming import controller_name
from actors.standing_pool import detached, ensure_pool
from raycore.config import API_KEY_VARIABLE, PoolConfig, parse_config
from raycore.errors import ConfigurationError, PoolNotFoundError
from raycore.http.app import FrontSettings, HttpApp
from raycore.http.keys import digest_of

DEPLOYMENT = "OpenAIFront"

ONGOING_REQUESTS = 4096
"""Requests that a replica may have at once. Serve's default of 5 would queue them in its proxy; the engines' own limits refuse with 429."""


class ReplicaOptions(pydantic.BaseModel):
    """What `build` takes besides the fields of `raycore.config.PoolConfig`."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    served_model_name: str | None = None
    """The name in requests; None: the last part of the model's path, or the engine's name."""
    num_replicas: int = pydantic.Field(default=1, ge=1)
    """Fronts of the pool; each has a client with a router of its own."""
    api_key: str | None = None
    """None: RAYCORE_API_KEY where `build` runs, then where the replica runs. Only its digest goes into Serve's state."""
    replica_num_cpus: float = pydantic.Field(default=0, ge=0)
    max_ongoing_requests: int = pydantic.Field(default=ONGOING_REQUESTS, ge=1)


class FrontReplica:
    """One front: connects to the pool, which it launches when it is the first. Its end leaves the pool alone."""

    async def __init__(self, config: PoolConfig, settings: FrontSettings) -> None:
        # Ray lets an actor without GPUs see all of its node's; whatever a tokenizer's library looks for, here are none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._config = config
        replica = serve.get_replica_context().replica_tag
        await ensure_pool(config)
        self._connection = connect(config.pool, client=f"serve-{replica}")
        self._client = await self._connection.__aenter__()
        digest = settings.key_digest or digest_of(os.environ.get(API_KEY_VARIABLE))
        self._app = HttpApp(
            self._client,
            msgspec.structs.replace(settings, replica=replica, key_digest=digest),
            desk=RayControlPlane(config.pool, config.timeouts),
            on_close=self._leave,
        )

    def __serve_build_asgi_app__(self) -> HttpApp:
        """What Serve asks an ingress class without an application of its own for, once it is constructed."""
        return self._app

    async def check_health(self) -> None:
        """Fails only when the pool is gone: the replica that Serve makes instead launches it again. A resize is no reason."""
        if self._client.ranks():
            return
        try:
            await find_actor(controller_name(self._config.pool))
        except PoolNotFoundError as error:
            msg = f"pool {self._config.pool!r} is gone"
            raise RuntimeError(msg) from error

    async def _leave(self) -> None:
        await self._connection.__aexit__(None, None, None)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The Serve application for these arguments: fields of `PoolConfig` and of `ReplicaOptions`, by name.

    Values may be text, as `serve run` gives them: `engine_options='{"base_s": 0.001}'`. ConfigurationError for what cannot be right.
    """
    config, options = parse_arguments(args)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=options.num_replicas,
        max_ongoing_requests=options.max_ongoing_requests,
        ray_actor_options={"num_cpus": options.replica_num_cpus},
        # a line for each request costs more than the request; /metrics counts them
        logging_config={"enable_access_log": False},
    )
    return deployment(serve.ingress()(FrontReplica)).bind(config, front_settings(config, options))


def front_settings(config: PoolConfig, options: ReplicaOptions) -> FrontSettings:
    """The front's part."""
    key = options.api_key or os.environ.get(API_KEY_VARIABLE)
    return FrontSettings(model=served_name(config, options), key_digest=digest_of(key))


def parse_arguments(args: Mapping[str, Any]) -> tuple[PoolConfig, ReplicaOptions]:
    """The pool and what concerns its fronts. ConfigurationError names what is wrong."""
    values = {name: _from_text(value) for name, value in args.items()}
    own = {name: values.pop(name) for name in list(values) if name in ReplicaOptions.model_fields}
    try:
        options = ReplicaOptions(**own)
    except pydantic.ValidationError as error:
        raise ConfigurationError("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())) from error
    return detached(parse_config(values)), options


def served_name(config: PoolConfig, options: ReplicaOptions) -> str:
    """What callers name the model by."""
    if options.served_model_name:
        return options.served_model_name
    return os.path.basename(config.model.rstrip("/")) if config.model else config.engine


def _from_text(value: Any) -> Any:
    """Objects and lists come as JSON from a command line; numbers and switches pydantic reads itself."""
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        try:
            return json.loads(value)
        except ValueError as error:
            msg = f"{value[:80]!r} looks like JSON and is not: {error}"
            raise ConfigurationError(msg) from error
    return value
