"""The client's ear for the coordinator: hears it, looks for its successor, and believes its own traffic more."""

from __future__ import annotations

import asyncio

import pytest

from raycore.client import snapshots
from raycore.client.snapshots import SnapshotWatch
from raycore.engine import EngineLoad
from raycore.membership import Endpoints
from raycore.messages import RankLoad, Snapshot
from raycore.sampling import SamplingParams
from tests.support.scripted import Rig, memory_client
from tests.support.waiting import until


class Source:
    """Gives what it is told to, once."""

    def __init__(self, *given: Snapshot) -> None:
        self.given = list(given)
        self.is_closed = False

    def drain(self) -> list[Snapshot]:
        given, self.given = self.given, []
        return given

    def close(self) -> None:
        self.is_closed = True


async def test_the_newest_snapshot_is_taken_and_a_silent_coordinator_is_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "_SILENT_S", 0.1)
    monkeypatch.setattr(snapshots, "_FIND_AGAIN_S", 0.01)
    monkeypatch.setattr(snapshots, "PUBLISH_INTERVAL_S", 0.01)
    found = [None, Endpoints("here", "", "one"), None, Endpoints("here", "", "two")]
    sources = {"one": Source(Snapshot(1, []), Snapshot(2, [])), "two": Source(Snapshot(3, []))}
    heard: list[int] = []

    async def find() -> Endpoints | None:
        return found.pop(0) if found else None

    watch = asyncio.ensure_future(SnapshotWatch(find, lambda e: sources[e.beats_ipc], lambda s: heard.append(s.seq)).run())
    await until(lambda: heard == [2, 3], "both coordinators are heard")
    assert sources["one"].is_closed
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
    assert sources["two"].is_closed


async def test_a_load_told_by_the_coordinator_counts_only_where_the_client_has_no_traffic() -> None:
    rigs = [Rig(rank=0), Rig(rank=1)]
    async with memory_client(*rigs) as client:
        stream = client.generate([1, 2], SamplingParams(max_tokens=1 << 20), data_parallel_rank=0)
        await stream.__anext__()
        fleet = client._fleet
        busy, idle = fleet.of_rank(0), fleet.of_rank(1)
        told = EngineLoad(running=77)
        fleet.on_snapshot(Snapshot(1, [RankLoad(rig.id, told, 0.0) for rig in rigs]))
        assert idle.ledger.load == told
        assert busy.ledger.load != told
        await stream.aclose()
