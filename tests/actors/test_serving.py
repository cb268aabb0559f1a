"""Ray Serve: several fronts of one pool, which outlives them; what they answer; and that nothing is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from actors.naming import Role, named_actors
from raycore.errors import ConfigurationError
from tests.actors.pools import ask_controller

SHIPPED = Path(__file__).parents[2] / "examples" / "serve.yaml"
LIMIT_S = 90.0


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """The first true answer; connections that are refused meanwhile mean "not yet"."""
    until_s = time.monotonic() + LIMIT_S
    while time.monotonic() < until_s:
        try:
            if answer := condition():
                return answer
        except httpx.HTTPError as error:
            what = f"{what} ({error!r})"
        time.sleep(0.05)
    pytest.fail(f"not within {LIMIT_S:g} s: {what[:500]}")


def replicas() -> dict[str, Any]:
    """Serve's replicas that run, by their names."""
    import ray

    rows = ray.util.list_named_actors(all_namespaces=True)
    names = [row["name"] for row in rows if row["namespace"] == "serve" and row["name"].startswith("SERVE_REPLICA::raycore#")]
    return {name: ray.get_actor(name, "serve") for name in names}


def engine_pids() -> dict[int, int]:
    """Of the members: Ray lists those of an earlier pool of this name, too."""
    return {member.engine.rank: member.pid for member in asyncio.run(ask_controller("served", "membership")).members}


def free_port() -> int:
    """A port that was free a moment ago: Serve takes numbers only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def base_url(cluster: str) -> Iterator[str]:
    """The shipped application on a free port; afterwards Serve and the pool are ended."""
    from ray import serve

    from actors.pool_end import end_pool
    from actors.serving import build
    from raycore.config import Timeouts

    del cluster
    port = free_port()
    (application,) = yaml.safe_load(SHIPPED.read_text())["applications"]
    assert application["import_path"] == "actors.serving:build"
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(build({**application["args"], "api_key": "right"}), name=application["name"], route_prefix=application["route_prefix"])
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        assert named_actors("served"), "the pool lives outside of Serve"
        asyncio.run(end_pool("served", 0, Timeouts()))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_replicas_come_and_go_and_the_pool_stays(base_url: str) -> None:
    import ray

    from actors.launch import connect

    headers = {"authorization": "Bearer right"}
    with httpx.Client(base_url=base_url, headers=headers, timeout=60) as http:
        assert eventually(lambda: http.get("/health").status_code == 200, "the front answers")
        first = eventually(lambda: found if len(found := replicas()) == 2 else None, "two replicas")
        engines = engine_pids()
        assert sorted(engines) == [0, 1]
        assert [name.role for name in named_actors("served")].count(Role.CONTROLLER) == 1

        wanted = {"model": "echo", "prompt": "hello", "max_tokens": 7, "temperature": 0}
        assert http.post("/v1/completions", json=wanted).json()["choices"][0]["text"] == "hellohe"
        streamed = http.post("/v1/completions", json={**wanted, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hellohe"
        assert http.post("/v1/completions", json={**wanted, "top_p": 7}).json()["error"]["param"] == "top_p"
        assert http.post("/v1/completions", json=wanted, headers={"authorization": "Bearer wrong"}).status_code == 401

        with connect("served") as client:
            with http.stream("POST", "/v1/completions", json={**wanted, "max_tokens": 30_000, "stream": True}) as answer:
                next(answer.iter_lines())
            assert eventually(lambda: not any(row["running"] for row in client.operations.collective_rpc(method="stats")), "it is aborted")

        begun = http.post("/scale_elastic_ep", json={"new_data_parallel_size": 3, "wait": False})
        assert begun.status_code == 202
        operation = f"/operations/{begun.json()['operation']}"
        assert eventually(lambda: http.get(operation).json()["phase"] == "done", "the pool has grown")
        assert http.get("/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}
        assert http.post("/scale_elastic_ep", json={"new_data_parallel_size": 2}).json()["ranks"] == [0, 1]
        assert http.post("/scale_elastic_ep", json={"new_data_parallel_size": 0}).status_code == 400

        victim = next(iter(first))
        ray.kill(first[victim])
        fresh = eventually(lambda: found if len(found := replicas()) == 2 and victim not in found else None, "another replica")
        assert len(fresh.keys() & first.keys()) == 1
        assert all(http.post("/v1/completions", json=wanted).status_code == 200 for _ in range(4))
        assert engine_pids() == engines, "no engine was touched"


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [("--direct",), ("--replicas", "2")])
def test_the_command_serves_until_ctrl_c_and_leaves_nothing(cluster: str, options: tuple[str, ...]) -> None:
    port = free_port()
    code = "import sys; from raycore.cli import run; sys.exit(run(sys.argv[1:]))"
    arguments = ("serve", "--engine", "echo", "--data-parallel-size", "2", "--pool", "commanded", "--port", str(port), *options)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "RAY_ADDRESS": cluster}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        said = ""
        while f"serving echo at http://127.0.0.1:{port}/v1" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wanted = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 7}
            answer = http.post("/v1/chat/completions", json=wanted)
            assert answer.json()["choices"][0]["message"]["content"] == "hellohe"
        process.send_signal(signal.SIGINT)
        _, more = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said + more


def test_arguments_are_checked_before_anything_starts() -> None:
    from actors.serving import parse_arguments, served_name

    config, options = parse_arguments(
        {"model": "/models/llama/", "data_parallel_size": "2", "engine_options": '{"threads": 1}', "num_replicas": "3"}
    )
    assert (config.lifetime, config.data_parallel_size, config.engine_options, options.num_replicas) == ("detached", 2, {"threads": 1}, 3)
    assert served_name(config, options) == "llama"
    for wrong in ({"num_replicas": 0}, {"data_parallel_sise": 2}, {"engine_options": "{"}, {"lifetime": "scoped"}):
        with pytest.raises(ConfigurationError):
            parse_arguments(wrong)
