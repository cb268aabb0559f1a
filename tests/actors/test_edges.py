"""The edges without a cluster: names, Ray's errors, the blocking runner, what a rank asks for."""

from __future__ import annotations

import asyncio
import pickle

import pytest
import ray.exceptions

from actors.blocking import run_blocking
from actors.naming import ActorName, Role, controller_name, engine_name, group_name, parse_name, standby_name
from actors.remote import death_cause, remote_call, translate
from actors.setup import PoolKeys, PoolSetup, actor_resources, rank_demand
from raycore.config import parse_config
from raycore.errors import ConfigurationError, DeadlineError, EngineDeadError, PoolError
from raycore.ids import EngineId, Incarnation, Rank

ENGINE = EngineId(Rank(3), Incarnation("0a1b2c3d"))


def test_names_can_be_parsed_back() -> None:
    assert parse_name(engine_name("my.pool", ENGINE)) == ActorName("my.pool", Role.ENGINE, ENGINE.rank, ENGINE.incarnation)
    assert parse_name(group_name(engine_name("my.pool", ENGINE))) == parse_name(engine_name("my.pool", ENGINE))
    assert parse_name(standby_name("my.pool", ENGINE.incarnation)) == ActorName("my.pool", Role.STANDBY, Rank(0), ENGINE.incarnation)
    assert parse_name(controller_name("p")) == ("p", "controller", 0, "0", "")


@pytest.mark.parametrize("foreign", ["", "SERVE_CONTROLLER", "a/b/c/d", "pool/engine/x/1", "pool/engine/1", "raycore:", "/engine/0/a"])
def test_foreign_names_are_none(foreign: str) -> None:
    assert parse_name(foreign) is None


async def test_our_errors_come_out_of_ray_as_they_are() -> None:
    original = ConfigurationError("no such option")
    wrapped = ray.exceptions.RayTaskError("start", "traceback", original)
    with pytest.raises(ConfigurationError, match="no such option") as caught:
        await remote_call(_raise(wrapped), limit_s=5, what="start")
    assert caught.value is original


async def test_foreign_errors_of_an_engine_name_its_rank() -> None:
    wrapped = ray.exceptions.RayTaskError("start", "traceback", ValueError("bad weights"))
    with pytest.raises(EngineDeadError, match="start: ValueError: bad weights") as caught:
        await remote_call(_raise(wrapped), limit_s=5, what="start", engine=ENGINE)
    assert (caught.value.rank, caught.value.cause) == (3, "ValueError: bad weights")
    assert pickle.loads(pickle.dumps(caught.value)).rank == 3


async def test_a_call_that_takes_too_long_is_a_deadline_error() -> None:
    with pytest.raises(DeadlineError, match="forever took longer than"):
        await remote_call(asyncio.get_running_loop().create_future(), limit_s=0.01, what="forever")


async def test_a_cancellation_that_comes_with_the_answer_is_heard() -> None:
    """Who cancels a loop that makes calls waits for its end, so a call must not swallow the cancellation."""
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    calling = asyncio.create_task(remote_call(answer, limit_s=5, what="ping"))
    await asyncio.sleep(0)
    answer.set_result(1)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling


def test_an_unreachable_actor_is_no_dead_engine_without_an_engine() -> None:
    error = translate(ray.exceptions.ActorUnavailableError("gone?", None), what="status")
    assert type(error) is PoolError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The actor is dead because it was killed by `ray.kill`.", "killed through Ray"),
        ("worker unexpectedly exits with a connection error code 2. End of file.", "its process died unexpectedly"),
        ("The actor is dead because its owner has died.", "its owner died"),
        ("Task was killed due to the node running low on memory: out of memory", "out of memory"),
        ("first line\nsomething new", "something new"),
    ],
)
def test_deaths_are_told_in_one_line(text: str, expected: str) -> None:
    cause = death_cause(RuntimeError(text))
    assert expected in cause
    assert "\n" not in cause


def test_blocking_code_gets_results_and_errors() -> None:
    async def fail() -> None:
        raise KeyError("missing")

    assert run_blocking(asyncio.sleep(0, "done")) == "done"
    with pytest.raises(KeyError, match="missing"):
        run_blocking(fail())


async def test_blocking_code_may_run_under_a_loop() -> None:
    assert run_blocking(asyncio.sleep(0, "done")) == "done"


def test_a_rank_asks_for_gpus_only_on_cuda() -> None:
    assert rank_demand(parse_config({"device": "cpu"})).bundles == ({"CPU": 1.0},)
    assert rank_demand(parse_config({"device": "cuda", "num_cpus_per_engine": 0})).bundles == ({"GPU": 1.0},)


def test_a_rank_without_needs_still_has_a_bundle_that_ray_accepts() -> None:
    assert rank_demand(parse_config({"num_cpus_per_engine": 0})).bundles == ({"memory": 1.0},)


def test_custom_resources_become_actor_options() -> None:
    demand = rank_demand(parse_config({"resources_per_engine": {"memory": 1e9, "slot": 2.0}}))
    assert actor_resources(demand) == {"num_cpus": 1.0, "num_gpus": 0, "memory": 1e9, "resources": {"slot": 2.0}}


def test_ranks_that_share_a_gpu_are_hosts_of_their_own_to_nccl() -> None:
    def environment(**changes: object) -> dict[str, str]:
        setup = PoolSetup(config=parse_config(changes), keys=PoolKeys.make(), environment={"HF_HOME": "there"})
        return setup.engine(Rank(0), Incarnation("0a1b"), "group").environment

    assert environment(device="cuda", resources_per_engine={"GPU": 0.5}) == {"HF_HOME": "there", "NCCL_HOSTID": "0a1b"}
    assert environment(device="cuda") == {"HF_HOME": "there"}
    assert environment(device="cpu") == {"HF_HOME": "there"}


def test_secrets_are_in_no_text() -> None:
    keys = PoolKeys.make()
    setup = PoolSetup(config=parse_config({"pool": "quiet"}), keys=keys, environment={"HF_TOKEN": "hidden"})
    engine = setup.engine(Rank(0), Incarnation("a"), "group")
    for text in map(repr, (keys, setup, engine, engine.spec, engine.access)):
        assert keys.server_secret not in text
        assert keys.client_secret not in text
        assert "hidden" not in text


async def _raise(error: Exception) -> None:
    raise error
