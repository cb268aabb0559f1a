"""What `raycore serve` does: a pool and HTTP fronts of it, until a signal; then nothing of what it made is left."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from actors.blocking import run_blocking
from actors.control_plane import RayControlPlane
from actors.launch import launch
from actors.local_ray import ensure_ray, release_ray
from actors.pool_end import end_pool
from actors.serve_flags import controller_options
from actors.serving import build, front_settings, parse_arguments
from actors.standing_pool import ensure_pool
from raycore.client.blocking import new_event_loop
from raycore.config import PoolConfig
from raycore.errors import ConfigurationError
from raycore.http.app import HttpApp
from raycore.http.server import HttpServer, bound_socket

OnReady = Callable[[str], None]
"""Told the address once requests are answered there."""


def serve_on_serve(args: dict[str, Any], *, host: str, port: int, keep_pool: bool, on_ready: OnReady) -> None:
    """Fronts as replicas of Ray Serve, `args` as `build` takes them. The pool is launched here: what is wrong with it is raised at once.

    A pool that ran already is used and left; so is one with `keep_pool`. Likewise a Serve that ran already loses this application only.
    """
    config, _ = parse_arguments(args)
    application = build(args)
    ensure_ray(config)
    try:
        is_ours = run_blocking(ensure_pool(config))
        try:
            _run_application(application, f"raycore-{config.pool}", host, port, on_ready)
        finally:
            if is_ours and not keep_pool:
                run_blocking(end_pool(config.pool, config.timeouts.drain_s, config.timeouts))
    finally:
        release_ray()


def _run_application(application: serve.Application, name: str, host: str, port: int, on_ready: OnReady) -> None:
    ran_before = _serve_runs()
    if not ran_before:
        bound_socket(host, port).close()  # Serve says of a taken port only that its proxy did not come up
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, controller_options=controller_options())
        serve.run(application, name=name, route_prefix="/")
        on_ready(f"http://{_in_url(host)}:{port}")
        threading.Event().wait()  # Ctrl-C and SIGTERM raise here
    finally:
        if ran_before:
            serve.delete(name)
        else:
            serve.shutdown()


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def serve_alone(args: dict[str, Any], *, host: str, port: int, on_ready: OnReady) -> None:
    """One front in this process, behind uvicorn, without Ray Serve between; the pool is scoped to it."""
    config, options = parse_arguments(args)
    if options.num_replicas != 1:
        msg = f"without Serve there is one front, not {options.num_replicas}"
        raise ConfigurationError(msg)
    listener = bound_socket(host, port)

    async def run() -> None:
        async with launch(**_fields(config)) as client:
            app = HttpApp(client, front_settings(config, options), desk=RayControlPlane(config.pool, config.timeouts))
            async with HttpServer(app, listener) as server:
                on_ready(f"http://{_in_url(host)}:{server.port}")
                await server.wait()

    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run())
    finally:
        listener.close()


def _fields(config: PoolConfig) -> dict[str, Any]:
    """What was given, as `launch` takes it: the pool ends with this process."""
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return {**given, "lifetime": "scoped"}


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
