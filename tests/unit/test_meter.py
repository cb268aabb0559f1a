"""What a client measures: each first token, each gap, each end, whatever comes in one drain; and how much of it goes to the sink."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from raycore.client.client import EngineCoreClient
from raycore.client.journal import RequestRecord
from raycore.client.meter import OBSERVATIONS_A_FLUSH, Bins, ClientMeter
from raycore.client.slots import SlotTable
from raycore.engine import FinishReason
from raycore.errors import RaycoreError
from raycore.ids import EngineId, Incarnation, Rank, RequestId
from raycore.messages import StepColumns
from raycore.metrics import GAP_S, INTER_TOKEN, LATENCY_S, REPLAYED, REQUESTS, TOKENS, TTFT, UTILITY_CALL, UTILITY_CALLS, Metric
from raycore.routing.book import LedgerBook
from raycore.routing.ledger import EngineLedger
from raycore.sampling import SamplingParams
from tests.support.scripted import Rig, memory_client
from tests.support.waiting import until


class Sink:
    """Keeps everything."""

    def __init__(self) -> None:
        self.found: list[tuple[str, float, dict[str, str]]] = []

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) <= {*metric.tags, "node_ip"}
        assert {*metric.tags} <= {*tags}
        self.found.append((metric.name, value, dict(tags)))

    def of(self, metric: Metric, **tags: str) -> list[float]:
        return [value for name, value, found in self.found if name == metric.name and tags.items() <= found.items()]


class Table:
    """A slot table with its meter on a counted clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.meter = ClientMeter(clock=lambda: self.now_s)
        self.slots = SlotTable(
            EngineLedger(EngineId(Rank(3), Incarnation("i"))), LedgerBook(), 100, lambda _record: None, self.meter.session(3)
        )
        self._batch: tuple[int, ...] = ()

    def add(self, tokens: list[int] | None = None) -> RequestRecord:
        record = RequestRecord(RequestId(f"r{self.now_s}"), b"", 10, SamplingParams())
        record.tokens.extend(tokens or [])
        record.prefill = 10
        self.slots.add(record)
        return record

    def step(self, *records: RequestRecord, ends: int | None = None, reason: FinishReason = FinishReason.LENGTH, at_ns: int = 0) -> None:
        """A token for each; `ends`: the slot of one that ends."""
        batch = tuple(record.slot for record in records)
        slots = array("I", batch).tobytes() if batch != self._batch else b""
        self._batch = batch
        finished, reasons = (b"", b"") if ends is None else (array("I", [ends]).tobytes(), bytes([reason]))
        columns = StepColumns(
            slots=slots, tokens=array("I", [7] * len(batch)).tobytes(), finished=finished, reasons=reasons, stamp_ns=at_ns
        )
        assert self.slots.take(columns) is None

    def drain(self, after_s: float) -> None:
        self.now_s += after_s
        self.slots.settle()

    def flush(self) -> Sink:
        sink = Sink()
        self.meter.flush(sink)
        return sink


def near(boundaries: tuple[float, ...], seconds: float) -> Callable[[float], bool]:
    """Whether a value is the middle of the bin that holds so many seconds."""

    def is_it(value: float) -> bool:
        low = max((edge for edge in boundaries if edge < seconds), default=0.0)
        return low < value <= min((edge for edge in boundaries if edge >= seconds), default=value)

    return is_it


def test_a_first_token_is_timed_from_admission_and_the_others_from_one_another() -> None:
    table = Table()
    first = table.add()
    table.now_s += 0.2
    second = table.add()
    table.step(first)
    table.drain(after_s=0.1)  # 0.3 s after its admission
    table.step(first, second)
    table.drain(after_s=0.025)
    table.step(first, second)
    table.step(first, second)
    table.drain(after_s=0.08)  # two steps: 0.04 s each
    sink = table.flush()
    waits = sorted(sink.of(TTFT, dp_rank="3"))
    assert [near(LATENCY_S, 0.125)(waits[0]), near(LATENCY_S, 0.3)(waits[1])] == [True, True]
    gaps = sorted(sink.of(INTER_TOKEN, dp_rank="3"))
    assert len(waits) == 2
    assert len(gaps) == 1 + 4, "seven tokens, of which two were the first of their requests"
    assert near(GAP_S, 0.025)(gaps[0])
    assert all(near(GAP_S, 0.04)(gap) for gap in gaps[1:])
    assert sink.of(TOKENS, kind="answer") == [7]
    assert sink.of(TOKENS, kind="prompt") == [20]
    assert table.flush().found == [], "everything is handed on once"


def test_a_pause_between_two_requests_is_no_gap() -> None:
    table = Table()
    for _ in range(2):
        record = table.add()
        table.now_s += 0.05
        table.step(record, at_ns=1_000_000_000)
        table.step(record, at_ns=1_004_000_000)
        table.step(record, ends=record.slot, at_ns=1_008_000_000)
        table.drain(after_s=0.0)
        table.now_s += 3.0
    sink = table.flush()
    assert all(near(GAP_S, 0.004)(gap) for gap in sink.of(INTER_TOKEN))
    assert len(sink.of(INTER_TOKEN)) == 4
    assert all(near(LATENCY_S, 0.05)(wait) for wait in sink.of(TTFT))
    assert sink.of(REQUESTS, outcome="length") == [2]


def test_a_request_that_ends_with_its_first_token_has_one_and_no_gap() -> None:
    table = Table()
    record = table.add()
    table.step(record, ends=record.slot, reason=FinishReason.STOP)
    table.drain(after_s=0.4)
    sink = table.flush()
    assert (len(sink.of(TTFT)), sink.of(INTER_TOKEN), sink.of(REQUESTS, outcome="stop")) == (1, [], [1])


def test_a_request_that_is_aborted_before_its_first_token_has_none() -> None:
    table = Table()
    runs, waits = table.add(), table.add()
    table.step(runs)
    table.drain(after_s=0.1)
    table.step(runs, ends=waits.slot, reason=FinishReason.ABORT)
    table.drain(after_s=0.02)
    table.step(runs)
    table.drain(after_s=0.02)
    sink = table.flush()
    assert len(sink.of(TTFT)) == 1
    assert [near(GAP_S, 0.02)(gap) for gap in sink.of(INTER_TOKEN)] == [True, True], "the one that runs is still known to"
    assert sink.of(REQUESTS, outcome="abort") == [1]


def test_a_replayed_request_had_its_first_token_before() -> None:
    table = Table()
    record = table.add(tokens=[1, 2, 3])
    table.step(record)
    table.drain(after_s=0.5)
    sink = table.flush()
    assert (sink.of(TTFT), sink.of(INTER_TOKEN), sink.of(TOKENS, kind="answer")) == ([], [], [1])
    assert sink.of(TOKENS, kind="prompt") == [], "its prompt was counted then"


def test_a_request_that_overtook_another_is_timed_by_its_first_token_though_it_is_found_late() -> None:
    table = Table()
    starves, overtakes = table.add(), table.add()
    for _ in range(5):
        table.step(overtakes)
        table.drain(after_s=0.15)
    table.step(starves, overtakes)
    table.drain(after_s=0.15)
    waits = sorted(table.flush().of(TTFT))
    assert [near(LATENCY_S, 0.15)(waits[0]), near(LATENCY_S, 0.9)(waits[1])] == [True, True]


def test_of_many_first_tokens_in_one_drain_a_few_are_timed_and_all_are_counted() -> None:
    table = Table()
    table.flush()
    for late_s in (0.0, 0.3):  # half were admitted 0.3 s later
        table.now_s += late_s
        for _ in range(45):
            table.add()
    records = table.slots.live()
    table.step(*records)
    table.drain(after_s=0.4)
    waits = table.flush().of(TTFT)
    assert len(waits) == 90
    assert 40 <= sum(near(LATENCY_S, 0.4)(wait) for wait in waits) <= 50
    assert all(near(LATENCY_S, 0.4)(wait) or near(LATENCY_S, 0.7)(wait) for wait in waits)


def test_above_its_budget_a_histogram_is_thinned_out_alike_and_nothing_is_lost_for_good() -> None:
    bins = Bins((1.0, 2.0))
    for _ in range(100):
        bins.add(array("d", [0.5] * 900 + [1.5] * 99 + [9.0]))
    found: dict[float, int] = {}
    for value, count in bins.take(0.01):
        found[value] = found.get(value, 0) + count
    assert found == {0.5: 900, 1.5: 99, 3.0: 1}
    rare = Bins((1.0,))
    seen = 0
    for _ in range(100):
        rare.add(array("d", [5.0]))
        seen += sum(count for value, count in rare.take(0.1) if value > 1)
    assert seen == 10, "a tenth of a rare value comes every tenth time"


def test_a_flush_gives_a_bounded_number_of_observations() -> None:
    table = Table()
    for rank in (1, 2):
        meter = table.meter.of_rank(rank)
        meter.gap_s.extend([0.004, 0.3])
        meter.gap_tokens.extend([3_000_000, 1_000_000])
    gaps = table.flush().of(INTER_TOKEN)
    assert len(gaps) == OBSERVATIONS_A_FLUSH
    assert sum(gap > 0.1 for gap in gaps) == OBSERVATIONS_A_FLUSH / 4


def test_a_value_on_a_boundary_belongs_below_it() -> None:
    bins = Bins((1.0, 2.0))
    bins.add(array("d", [1.0, 2.0]))
    assert bins.take(1.0) == [(0.5, 1), (1.5, 1)]


async def test_a_client_reports_ends_deaths_and_calls() -> None:
    sink = Sink()
    rigs = [Rig(rank=rank) for rank in range(2)]
    async with memory_client(*rigs, on_engine_death="replay", metrics=sink) as client:
        assert (await client.generate([1], SamplingParams(max_tokens=3), data_parallel_rank=1).collect()).finish_reason == "length"
        await client.call("is_scheduler_paused", rank=0)
        with pytest.raises(RaycoreError):
            await client.call("profile", rank=0, action="nonsense")
        stream = client.generate([1], SamplingParams(max_tokens=100_000))
        lost = stream.rank
        await stream.wait()
        _kill(client, rigs[lost])
        await until(lambda: stream.rank != lost, "it runs elsewhere")
        await stream.aclose()
        await until(lambda: client.in_flight() == 0, "it is aborted")
    assert sink.of(REQUESTS, outcome="length", dp_rank="1") == [1]
    assert sum(sink.of(REQUESTS, outcome="abort", dp_rank=str(1 - lost))) == 1
    assert sink.of(REPLAYED, cause="death", dp_rank=str(lost)) == [1]
    assert sum(sink.of(UTILITY_CALLS, method="is_scheduler_paused", outcome="ok")) == 1
    assert len(sink.of(UTILITY_CALL, method="is_scheduler_paused")) == 1
    assert len(sink.of(TTFT)) == 2
    assert sink.of(TOKENS, kind="answer")


def _kill(client: EngineCoreClient, rig: Rig) -> None:
    fleet: Any = client._fleet
    fleet._gone(rig.member.engine, "killed by the test")
