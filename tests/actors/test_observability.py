"""What a real pool tells: the page of Ray's metrics agent, the event log, the log files of its processes."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import worker

from actors.launch import launch
from raycore.client.client import EngineCoreClient
from raycore.event_log import read_log
from raycore.events import Began, Died, Ended, EpochBegan, Event, Joined, LoadSeen, PhaseBegan, RankState
from raycore.metrics import METRICS
from raycore.sampling import SamplingParams
from tests.actors.pools import ask_controller, eventually, membership_when

pytestmark = pytest.mark.ray

REQUESTS, TOKENS = 6, 40
_SAMPLE = re.compile(r"(ray_raycore_\w+)\{(.*)\} (\S+)")
_TAG = re.compile(r'(\w+)="([^"]*)"')
_OURS = {"pool", "model", "node_ip", "dp_rank", "le"} | {tag for metric in METRICS for tag in metric.tags}

Samples = list[tuple[str, dict[str, str], float]]


def page() -> Samples:
    """Every sample of ours that the node's agent exports."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = (_SAMPLE.fullmatch(line) for line in text.splitlines())
    return [
        (match[1], {name: value for name, value in _TAG.findall(match[2]) if name in _OURS}, float(match[3])) for match in found if match
    ]


def total(samples: Samples, name: str, **tags: str) -> float:
    """The sum of the samples of one name with these tags, over the processes that report them."""
    return sum(value for found, given, value in samples if found == name and tags.items() <= given.items())


async def page_when(pool: str, condition: Any, what: str) -> Samples:
    async def look() -> Samples | None:
        samples = [sample for sample in await asyncio.to_thread(page) if sample[1].get("pool") == pool]
        return samples if condition(samples) else None

    return await eventually(look, what)


async def live(client: EngineCoreClient, pool: str) -> None:
    """Requests, a bigger pool, a pause, a death under load, a smaller pool."""
    sampling = SamplingParams(max_tokens=TOKENS)
    answers = await asyncio.gather(*(client.generate([1, 2, 3], sampling).collect() for _ in range(REQUESTS)))
    assert {answer.finish_reason for answer in answers} == {"length"}
    await client.scale_elastic_ep(3)
    await client.operations.pause_scheduler(mode="keep")
    await page_when(pool, lambda found: total(found, "ray_raycore_is_paused") == 3, "all three are paused")
    await client.operations.resume_scheduler()
    endless = client.generate([1], SamplingParams(max_tokens=100_000), data_parallel_rank=None)
    await endless.wait()
    lost = endless.rank
    await page_when(pool, lambda found: total(found, "ray_raycore_requests_running", dp_rank=str(lost)) == 1, "it is seen to run")
    members = (await ask_controller(pool, "membership")).members
    os.kill(next(member.pid for member in members if member.engine.rank == lost), signal.SIGKILL)
    await membership_when(pool, lambda membership: len(membership.members) == 2)
    await eventually(lambda: _is(endless.rank != lost), "it runs elsewhere")
    await endless.aclose()
    await client.scale_elastic_ep(1)


async def _is(value: bool) -> bool:
    return value


async def test_a_pool_s_metrics_events_and_log_lines(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del cluster
    monkeypatch.setenv("RAYCORE_LOG_LEVEL", "INFO")
    pool = "observed"
    options = {"base_s": 0.002}
    async with launch(engine="echo", pool=pool, data_parallel_size=2, event_log=str(tmp_path), engine_options=options) as client:
        pids = {member.pid for member in client.membership.members}
        controller = (await ask_controller(pool, "status"))["controller_pid"]
        await live(client, pool)
        samples = await page_when(
            pool,
            lambda found: (
                total(found, "ray_raycore_dp_size") == 1 and total(found, "ray_raycore_scale_operations_total", outcome="done") == 2
            ),
            "the pool's end state is exported",
        )
        os.kill(controller, signal.SIGKILL)
        await membership_when(pool, lambda membership: membership.term == 2)
    samples = await page_when(pool, lambda found: total(found, "ray_raycore_requests_total", outcome="abort") == 1, "the last figures")
    _check_samples(samples)
    _check_events(list(read_log(tmp_path / f"{pool}.jsonl")))
    _check_logs(pool, {controller: "controller"}, pids)


def _check_samples(samples: Samples) -> None:
    for name, tags, _ in samples:
        metric = next(metric for metric in METRICS if name.removeprefix("ray_") in {metric.name, *_parts(metric.name)})
        assert {*tags} - {"le"} == {"pool", "model", "node_ip", *metric.tags}, name
        assert tags["model"] == "echo"
        assert tags["node_ip"]
    assert total(samples, "ray_raycore_requests_total", outcome="length") == REQUESTS
    assert total(samples, "ray_raycore_tokens_total", kind="prompt") == 3 * REQUESTS + 1
    assert total(samples, "ray_raycore_tokens_total", kind="answer") > TOKENS * REQUESTS
    assert total(samples, "ray_raycore_ttft_s_count") == REQUESTS + 1
    assert total(samples, "ray_raycore_ttft_s_bucket", le="+Inf") == REQUESTS + 1
    assert total(samples, "ray_raycore_inter_token_s_count") > 0
    assert total(samples, "ray_raycore_requests_replayed_total", cause="death") == 1
    assert total(samples, "ray_raycore_engine_deaths_total", cause="process") == 1
    assert total(samples, "ray_raycore_scale_duration_s_count", phase="spawn") == 1
    assert total(samples, "ray_raycore_scale_duration_s_count", phase="commit") == 2
    assert total(samples, "ray_raycore_utility_calls_total", method="pause_scheduler", outcome="ok") >= 3


def _parts(name: str) -> tuple[str, ...]:
    return f"{name}_bucket", f"{name}_sum", f"{name}_count"


def _check_events(events: list[Event]) -> None:
    assert [(event.term, event.recovered) for event in events if isinstance(event, Began)] == [(1, False), (2, True)]
    assert isinstance(events[0], Began)
    assert isinstance(events[-1], Ended)
    assert len({event.life for event in events}) == 1
    assert [event.rank for event in events if isinstance(event, Joined)] == [0, 1, 2]
    assert [event.kind for event in events if isinstance(event, Died)] == ["process"]
    ends = [event for event in events if isinstance(event, PhaseBegan) and event.phase == "done"]
    assert [event.target for event in ends] == [3, 1]
    sizes = [len(event.ranks) for event in events if isinstance(event, EpochBegan)]
    assert sizes[0] == 2
    assert {3, 1} <= set(sizes)
    paused = [event.is_paused for event in events if isinstance(event, RankState)]
    assert (paused.count(True), paused.count(False)) == (3, 3)
    assert any(sum(load[0] for load in event.ranks.values()) for event in events if isinstance(event, LoadSeen))
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)


def _check_logs(pool: str, others: dict[int, str], engines: set[int]) -> None:
    """Each line of ours in the files of these processes says whose it is."""
    logs = Path(worker._global_node.get_logs_dir_path())  # type: ignore[union-attr]
    whose = {**dict.fromkeys(engines, r"rank \d+"), **others}
    for pid, who in whose.items():
        (file,) = logs.glob(f"worker-*-{pid}.err")
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line and not line.startswith(":")]
        assert lines or pid in engines, f"no line of {who}"
        strange = [line for line in lines if not re.match(rf"{pool} {who} \| ", line)]
        assert strange == []
