"""The public entry points: bring a pool up, attach to one, use an engine in process, look, clean up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from raycore.errors import ConfigurationError

if TYPE_CHECKING:
    from actors.client_handle import ClientHandle
    from actors.launch import Connection, Launch
    from actors.pool_end import CleanupReport
    from raycore.client.blocking import BlockingClient
    from raycore.client.control import ScalingReport
    from raycore.client.scope import Mode
    from raycore.doctor import Finding
    from raycore.routing.router import Router


def launch(**config: Any) -> Launch:
    """A pool of engine cores on Ray, with the fields of `raycore.config.PoolConfig`.

    `async with launch(...) as client` gives an asynchronous client, `with launch(...) as client` a blocking one. Leaving the block ends
    a scoped pool. `router` may be an object beside a name: it then routes for the client of this block only.
    """
    from actors.launch import launch as launch_on_ray

    return launch_on_ray(**config)


def connect(
    pool: str,
    *,
    router: str | Router | None = None,
    router_options: Mapping[str, Any] | None = None,
    mode: Mode = "internal",
    rank: int | None = None,
    local_only: bool = False,
) -> Connection:
    """A client of a running pool, from any process of its Ray cluster; used like `launch`. Leaving the block lets the pool go on.

    `router`: a policy's name, `module:name` or an object; None: the pool's. `mode`: "internal" balances over all ranks, "hybrid" (or
    `local_only`) over those of this node, "external" is bound to `rank`, for a load balancer outside. `docs/routing.md` has them all.
    ConfigurationError where these contradict each other; NoEngineError when the block is entered and no rank is within reach.
    """
    from actors.launch import connect as connect_on_ray
    from raycore.client.scope import Routing, balancing_scope
    from raycore.routing.selection import make_router

    if router is not None:
        make_router(router, router_options)  # what is wrong with it is said here and not when the pool has been found
    elif router_options:
        msg = "router_options go with a router; without one this client routes as the pool says"
        raise ConfigurationError(msg)
    scope = balancing_scope(mode, rank=rank, local_only=local_only)
    return connect_on_ray(pool, routing=Routing(router, router_options, scope))


def client_actor(
    pool: str, name: str = "default", *, lifetime: Literal["scoped", "detached"] = "scoped", num_cpus: float = 0
) -> ClientHandle:
    """The pool's client actor of this name, made where there is none: a client behind Ray calls, for callers that want a handle.

    `scoped`: it ends with the process that made it; `detached`: with the pool, or by `handle.end()`. PoolNotFoundError where there is no
    pool of that name. A process that can should `connect` instead: there a token costs no Ray message.
    """
    from actors.client_handle import client_actor as client_actor_on_ray

    return client_actor_on_ray(pool, name, lifetime=lifetime, num_cpus=num_cpus)


def make_client(*, multiprocess_mode: bool = True, asyncio_mode: bool = True, **config: Any) -> Launch | BlockingClient:
    """The reference's factory. Without processes: one engine in this process, no Ray, stepped by the blocking client that is returned.

    With processes: `launch(**config)`, whose `async with` (asyncio_mode) or `with` gives the client.
    """
    if multiprocess_mode:
        return launch(**config)
    if asyncio_mode:
        msg = "asyncio_mode needs multiprocess_mode: an engine in this process would block the event loop while it steps"
        raise ConfigurationError(msg)
    from raycore.client.in_process import in_process_client

    return in_process_client(**config)


def pool_status(pool: str) -> dict[str, Any]:
    """What the pool's controller reports: members, loads, departures, epoch."""
    from actors.launch import pool_status as status_on_ray

    return status_on_ray(pool)


def scale_elastic_ep(pool: str, data_parallel_size: int) -> ScalingReport:
    """Grow or shrink a running pool to so many ranks; returns when that is done. Errors as `EngineCoreClient.scale_elastic_ep`."""
    from actors.launch import scale_pool

    return scale_pool(pool, data_parallel_size)


def remove_ranks(pool: str, ranks: Sequence[int]) -> ScalingReport:
    """Let chosen ranks of a running pool leave; returns when they have."""
    from actors.launch import shrink_pool

    return shrink_pool(pool, ranks)


def autoscale(pool: str, settings: Mapping[str, Any] | None) -> None:
    """Have a running pool scale itself by a policy, in place of what it was told before; None: no more.

    `settings`: `policy`, `options`, `bounds`, `interval_s`, `dry_run` as `docs/autoscaling.md` has them; by default only a dry run, whose
    decisions `pool_status` shows. They last as long as the pool's controller: a restarted one has those of `launch`.
    ConfigurationError for what does not fit.
    """
    from actors.autoscaling import Autoscaling
    from actors.launch import set_autoscaling

    set_autoscaling(pool, None if settings is None else Autoscaling.parse(settings))


def cancel_scaling(pool: str) -> str:
    """Undo the running scaling operation; its id. PoolError when none runs, or it is decided and will be finished."""
    from actors.launch import cancel_scaling as cancel

    return cancel(pool)


def doctor() -> list[Finding]:
    """What this environment and its Ray cluster have and are missing; nothing is started or changed."""
    from actors.doctor import examine_ray
    from raycore.doctor import examine, guarded

    return [*examine(), *guarded("ray cluster", examine_ray)]


def serve(
    args: dict[str, Any], *, host: str, port: int, is_direct: bool, haproxy: bool, keep_pool: bool, on_ready: Callable[[str], None]
) -> None:
    """HTTP fronts of a pool until a signal; `args`: fields of `PoolConfig` and of `actors.serving.ReplicaOptions`.

    `is_direct`: one front in this process without Ray Serve. `haproxy`: Serve's replicas behind HAProxy instead of Serve's proxy.
    ConfigurationError where the extra `serve` is not installed.
    """
    if not is_direct:
        from actors.serve_flags import use_flags

        use_flags(haproxy=haproxy)
    try:
        from actors.serve_command import serve_alone, serve_on_serve
    except ImportError as error:
        msg = f"serving needs the extra: pip install 'raycore[serve]' ({error})"
        raise ConfigurationError(msg) from error
    if is_direct:
        serve_alone(args, host=host, port=port, on_ready=on_ready)
    else:
        serve_on_serve(args, host=host, port=port, keep_pool=keep_pool, on_ready=on_ready)


def cleanup(pool: str) -> CleanupReport:
    """Remove what a pool left whose driver and controller are gone; says what that was."""
    from actors.cleanup import cleanup as cleanup_on_ray

    return cleanup_on_ray(pool)
