"""The routing ledger and the policies that choose by it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from raycore.engine import EngineLoad
from raycore.errors import ConfigurationError
from raycore.ids import EngineId, Incarnation, Rank, RequestId
from raycore.routing.balanced import WorkBalanced
from raycore.routing.book import LedgerBook
from raycore.routing.decisions import DecisionLog
from raycore.routing.ledger import EngineLedger
from raycore.routing.prefixes import PrefixMap, PrefixWork
from raycore.routing.query import Query, RouteQuery, hash_blocks
from raycore.routing.reference import ReferenceFloorRule, ReferenceRule
from raycore.routing.router import Ring, Router
from raycore.routing.selection import NAMES, make_router
from raycore.routing.work import PaceMeter


def ledgers(count: int, **facts: int) -> list[EngineLedger]:
    book = LedgerBook()
    return [EngineLedger(EngineId(Rank(rank), Incarnation("i")), book, **facts) for rank in range(count)]


def query(prefill: int = 100, blocks: Sequence[int] = (), name: str = "r") -> RouteQuery:
    return RouteQuery(RequestId(name), prefill, blocks=blocks)


def router(name: str, seed: int = 0, **options: object) -> Router:
    return make_router(name, options, randomness=random.Random(seed), clock=lambda: 0.0)


@pytest.mark.parametrize("engines", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("requests", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("name", ["work", "least-requests", "round-robin"])
def test_equal_requests_over_idle_engines_differ_by_at_most_one(name: str, engines: int, requests: int) -> None:
    fleet, chooser = ledgers(engines), router(name)
    for sent in range(requests):
        chooser.choose(query(), fleet).dispatch(100)
        counts = [ledger.requests for ledger in fleet]
        assert max(counts) - min(counts) <= 1, (sent, counts)


@pytest.mark.parametrize("name", ["work", "prefix", "least-requests", "round-robin"])
@pytest.mark.parametrize("engines", [2, 4, 7])
def test_no_engine_is_favoured_over_a_thousand_ties(name: str, engines: int) -> None:
    fleet, chooser = ledgers(engines), router(name)
    chosen = [chooser.choose(query(), fleet).engine.rank for _ in range(1000)]
    counts = [chosen.count(Rank(rank)) for rank in range(engines)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("engines", [2, 4, 8])
@pytest.mark.parametrize("told", [None, 4])
def test_with_four_clients_every_rank_gets_its_share(engines: int, told: int | None) -> None:
    """None learns of the others: they share the engines, and each hears of the others' requests in reports only."""
    views = [ledgers(engines) for _ in range(4)]
    choosers = [WorkBalanced(random.Random(seed), clients=told) for seed in range(4)]
    totals, acks = [0] * engines, [[-1] * engines for _ in range(4)]
    requests = 400
    for sent in range(requests):
        mine, chooser = views[sent % 4], choosers[sent % 4]
        ledger = chooser.choose(query(), mine)
        at = int(ledger.engine.rank)
        ledger.dispatch(100)
        acks[sent % 4][at] += 1
        ledger.sent(acks[sent % 4][at])
        totals[at] += 1
        if sent % 10 == 9:
            for view, ack in zip(views, acks, strict=True):
                for rank, each in enumerate(view):
                    each.report(EngineLoad(waiting=totals[rank], prefill_tokens_waiting=100 * totals[rank]), ack[rank])
    assert min(totals) > requests / (engines + 1), totals
    if told is None:
        assert all(3 < chooser.clients < 5 for chooser in choosers)


def test_a_burst_longer_than_the_report_interval_stays_balanced() -> None:
    """Nothing is heard while 800 requests of very different length go out."""
    generator, fleet, chooser = random.Random(3), ledgers(8), router("work")
    lengths = [generator.randint(1, 4000) for _ in range(800)]
    for length in lengths:
        chooser.choose(query(length), fleet).dispatch(length)
    sums = [ledger.waiting_prefill for ledger in fleet]
    assert max(sums) - min(sums) <= max(lengths)


def test_an_engine_at_half_speed_gets_half_the_work() -> None:
    fleet, chooser = ledgers(2), router("work")
    for _ in range(200):
        fleet[0].report(EngineLoad(), -1, 20_000)
        fleet[1].report(EngineLoad(), -1, 40_000)
    for _ in range(300):
        chooser.choose(query(), fleet).dispatch(100)
    assert fleet[0].requests == pytest.approx(200, abs=3)


def test_paused_and_full_engines_are_avoided_while_another_is_free_and_not_when_all_are() -> None:
    fleet, chooser = ledgers(3, kv_capacity=10_000), router("work")
    fleet[0].report(EngineLoad(), -1, is_paused=True)
    fleet[1].report(EngineLoad(running=1, kv_tokens_used=9_900), -1)
    fleet[2].report(EngineLoad(running=4, waiting=1, prefill_tokens_waiting=300), -1)
    assert {chooser.choose(query(), fleet).engine.rank for _ in range(10)} == {2}
    assert {chooser.choose(query(), fleet[:2]).engine.rank for _ in range(10)} == {1}
    assert chooser.choose(query(), fleet[:1]) is fleet[0]


def test_in_lockstep_what_the_running_step_takes_in_does_not_hold_up_the_next() -> None:
    fleet, chooser = ledgers(2, steps_together=True), router("work")
    fleet[0].report(EngineLoad(waiting=4, prefill_tokens_waiting=1000), -1)
    fleet[1].dispatch(200)
    assert chooser.choose(query(), fleet) is fleet[0]


def test_in_lockstep_among_others_only_long_queues_and_own_dispatches_count() -> None:
    fleet, chooser = ledgers(2, steps_together=True), router("work", clients=4, step_tokens=500)
    fleet[0].report(EngineLoad(waiting=4, prefill_tokens_waiting=1000), -1)
    assert {chooser.choose(query(), fleet) for _ in range(4)} == set(fleet), "two steps are enough for what waits"
    fleet[0].report(EngineLoad(waiting=4, prefill_tokens_waiting=1500), -1)
    assert {chooser.choose(query(), fleet) for _ in range(4)} == {fleet[1]}
    fleet[1].dispatch(126)  # and three other clients send likewise: 504 tokens against 500 that the steps leave over
    assert {chooser.choose(query(), fleet) for _ in range(4)} == {fleet[0]}


# -- the ledger -----------------------------------------------------------------------------------------------------------


class Conversation:
    """One client's ledger and one engine that also has other clients; messages of both directions wait to be delivered in order."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        (self.ledger,) = ledgers(1)
        self.live: dict[int, int] = {}
        """What the client counts of each of its requests: prefill tokens, 0 once it has begun."""
        self.outbox: dict[int, int] = {}
        self.up: list[tuple[int, dict[int, int]]] = []
        self.down: list[tuple[list[int], list[int], EngineLoad | None, int]] = []
        self.waiting: dict[int, int] = {}
        self.running: set[int] = set()
        self.foreign = 0
        self.ack = -1
        self._names, self._frames = itertools.count(), itertools.count()

    def dispatch(self) -> None:
        name, prefill = next(self._names), self.random.randint(1, 900)
        self.ledger.dispatch(prefill)
        self.outbox[name] = self.live[name] = prefill

    def send(self) -> None:
        seq = next(self._frames)
        self.ledger.sent(seq)
        self.up.append((seq, self.outbox))
        self.outbox = {}

    def arrive(self) -> None:
        if self.up:
            self.ack, added = self.up.pop(0)
            self.waiting.update(added)

    def change_foreign(self) -> None:
        self.foreign = self.random.randint(0, 5)

    def load(self) -> EngineLoad:
        prefill = sum(self.waiting.values()) + 50 * self.foreign
        return EngineLoad(len(self.running), len(self.waiting) + self.foreign, 0, prefill)

    def step(self) -> None:
        begun = self.random.sample(sorted(self.waiting), min(len(self.waiting), self.random.randint(0, 3)))
        for name in begun:
            del self.waiting[name]
        self.running.update(begun)
        ended = self.random.sample(sorted(self.running), min(len(self.running), self.random.randint(0, 2)))
        self.running.difference_update(ended)
        self.down.append((begun, ended, self.load() if self.random.random() < 0.7 else None, self.ack))

    def hear(self) -> None:
        if not self.down:
            return
        begun, ended, load, ack = self.down.pop(0)
        for name in begun:
            self.ledger.begin(self.live[name])
            self.live[name] = 0
        for name in ended:
            self.ledger.end(self.live.pop(name))
        if load is not None:
            self.ledger.report(load, ack)
            unheard = sum(prefill for seq, frame in self.up if seq > ack for prefill in frame.values())
            assert self.ledger.waiting_prefill >= load.prefill_tokens_waiting + unheard + sum(self.outbox.values())

    def check(self) -> None:
        assert self.ledger.requests == len(self.live)
        assert self.ledger.prefill == sum(self.live.values())
        assert self.ledger.live >= len(self.live)


@pytest.mark.parametrize("seed", range(40))
def test_reports_never_erase_a_dispatch_in_any_interleaving(seed: int) -> None:
    """Whatever is in flight, the ledger holds all that was sent; with everything delivered it is exact."""
    talk = Conversation(seed)
    moves = (talk.dispatch, talk.dispatch, talk.send, talk.arrive, talk.change_foreign, talk.step, talk.hear)
    for _ in range(600):
        talk.random.choice(moves)()
        talk.check()
    while talk.up:
        talk.arrive()
    while talk.down:
        talk.hear()
    load = talk.load()
    talk.ledger.report(load, talk.ack)
    assert talk.ledger.waiting_prefill == load.prefill_tokens_waiting + sum(talk.outbox.values())
    assert talk.ledger.live == load.running + load.waiting + len(talk.outbox)


def test_work_of_other_clients_counts_and_ones_own_is_not_counted_twice() -> None:
    mine, busy = ledgers(2)
    mine.dispatch(100)
    mine.sent(0)
    mine.report(EngineLoad(waiting=1, prefill_tokens_waiting=100), 0)
    assert (mine.waiting_prefill, mine.live) == (100, 1)
    busy.report(EngineLoad(running=3, waiting=2, prefill_tokens_waiting=400), -1)
    assert router("work").choose(query(), [busy, mine]) is mine


def test_a_snapshot_counts_only_where_the_client_has_no_requests() -> None:
    idle, used = ledgers(2)
    used.dispatch(10)
    for ledger in (idle, used):
        ledger.snapshot(EngineLoad(waiting=3, prefill_tokens_waiting=900))
    assert (idle.waiting_prefill, used.waiting_prefill) == (900, 10)


def test_a_snapshot_after_own_requests_is_the_whole_truth_and_later_dispatches_come_on_top() -> None:
    (ledger,) = ledgers(1)
    for seq in range(3):  # three requests come and go without any report
        ledger.dispatch(100)
        ledger.sent(seq)
        ledger.end(100)
    told = EngineLoad(running=2, waiting=3, prefill_tokens_waiting=900)
    ledger.snapshot(told)
    assert (ledger.waiting_prefill, ledger.live, ledger.unacked_prefill) == (900, 5, 0)
    ledger.dispatch(50)
    ledger.sent(3)
    assert (ledger.waiting_prefill, ledger.live) == (950, 6)
    ledger.report(told, 2)  # an old acknowledgement undoes nothing
    assert (ledger.waiting_prefill, ledger.live) == (950, 6)
    ledger.report(told, 3)
    assert (ledger.waiting_prefill, ledger.live) == (900, 5)


def test_the_pace_meter_leaves_out_warm_up_and_bounds_outliers() -> None:
    meter = PaceMeter()
    for _ in range(4):
        meter.observe(30.0, 1000)
    assert meter.unit_ns == 0
    for _ in range(100):
        meter.observe(0.02, 1000)
    assert meter.unit_ns == 20_000
    meter.observe(60.0, 1000)
    assert meter.unit_ns < 25_000


# -- prefixes, samples, explanations, selection -----------------------------------------------------------------------------


def test_a_known_prefix_draws_a_request_unless_its_engine_is_hot() -> None:
    fleet = ledgers(4)
    chooser = PrefixWork(random.Random(0), block_tokens=100)
    first = chooser.choose(query(1000, blocks=range(10)), fleet)
    again = query(1200, blocks=range(12))
    assert chooser.choose(again, fleet) is first
    assert again.prefill == 200
    first.report(EngineLoad(waiting=50, prefill_tokens_waiting=100_000), -1)
    other = query(1200, blocks=range(12))
    assert chooser.choose(other, fleet) is not first
    assert other.prefill == 1200
    assert chooser.choose(query(1200, blocks=range(12)), [first]) is first


def test_in_a_large_fleet_a_known_prefix_is_found_without_looking_at_every_engine() -> None:
    fleet, chooser = ledgers(1000), router("prefix", block_tokens=100)
    prompts = {name: [name * 100 + n for n in range(20)] for name in range(30)}
    home = {name: chooser.choose(query(2000, blocks), fleet) for name, blocks in prompts.items()}
    for name, blocks in prompts.items():
        longer = query(2100, [*blocks, -name - 1])
        assert chooser.choose(longer, fleet) is home[name]
        assert longer.prefill == 100
        assert len(chooser.reasons()) <= 16
    assert len(set(home.values())) > 15


def test_engines_without_room_keep_their_prefixes_and_those_that_are_gone_are_forgotten_in_the_end() -> None:
    fleet, known = ledgers(4), PrefixMap(100, 1000)
    for ledger in fleet:
        known.add([1, 2], ledger)
    known.forget_all_but({fleet[0], fleet[1]})
    assert known.hits([1, 2, 3], fleet) == [2] * 4
    known.forget_all_but({fleet[3]})
    assert known.hits([1, 2, 3], fleet) == [0, 0, 2, 2]
    known.add(range(10, 20), fleet[3])
    assert known.holders([1, 2], 8) == [fleet[2]], "ten blocks are all that a cache of a thousand tokens holds"
    assert known.holders([10, 11, 99], 8) == [fleet[3]]
    assert known.holders([98], 8) == []


def test_block_hashes_are_of_whole_prefixes_and_of_one_adapter() -> None:
    prompt = bytes(range(64))
    blocks = hash_blocks(prompt, 4)
    assert len(blocks) == 4
    assert hash_blocks(prompt[:40], 4) == blocks[:2]
    changed = hash_blocks(b"\1" + prompt[1:], 4)
    assert all(a != b for a, b in zip(blocks, changed, strict=True))
    assert not set(blocks) & set(hash_blocks(prompt, 4, salt="adapter"))


@pytest.mark.parametrize("size", [2, 5, 33])
def test_a_ring_draws_distinct_engines_and_each_once_a_round(size: int) -> None:
    fleet, ring = ledgers(size), Ring(random.Random(1))
    drawn = [ring.draw(fleet, 2) for _ in range(size // 2)]
    assert all(a is not b for a, b in drawn)
    assert len({id(ledger) for pair in drawn for ledger in pair}) == 2 * (size // 2)


def test_a_large_fleet_is_balanced_by_samples() -> None:
    fleet, chooser = ledgers(1000), router("work")
    for _ in range(5000):
        chooser.choose(query(), fleet).dispatch(100)
    counts = [ledger.requests for ledger in fleet]
    assert (min(counts), max(counts)) >= (3, 5)
    assert max(counts) <= 7


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_decides_when_all_engines_are_paused_and_full(name: str) -> None:
    fleet, chooser = ledgers(3, kv_capacity=100), router(name)
    for ledger in fleet:
        ledger.report(EngineLoad(running=9, waiting=9, kv_tokens_used=100, prefill_tokens_waiting=9000), -1, is_paused=True)
    for _ in range(20):
        assert chooser.choose(query(blocks=(1, 2)), fleet) in fleet


def test_decisions_are_explained_by_what_was_known_when_they_were_made() -> None:
    fleet, chooser, log = ledgers(2), router("work"), DecisionLog(size=3)
    fleet[0].dispatch(500)
    chosen = chooser.choose(query(name="a"), fleet)
    log.add("a", chosen.engine, "work", chooser.reasons())
    chosen.dispatch(100_000)
    why = log.explain("a")
    assert why is not None
    assert (why.rank, why.policy, [row.rank for row in why.candidates]) == (1, "work", [1, 0])
    assert [row.prefill_tokens for row in why.candidates] == [0, 500]
    assert "rank 1" in str(why)
    for name in "bcd":
        log.add(name, chosen.engine, "work", ())
    assert log.explain("a") is None


def test_where_there_is_one_engine_nothing_is_chosen_and_nothing_to_explain() -> None:
    fleet, chooser = ledgers(3), router("work")
    chooser.choose(query(), fleet)
    assert len(chooser.reasons()) == 3
    assert chooser.choose(query(), fleet[:1]) is fleet[0]
    assert not chooser.reasons()


def test_the_reference_rules_overwrite_their_counts_every_interval() -> None:
    now = [0.0]
    for rule in (ReferenceRule(lambda: now[0]), ReferenceFloorRule(lambda: now[0])):
        fleet = ledgers(2)
        now[0] = 0.0
        assert {rule.choose(query(), fleet).engine.rank for _ in range(2)} == {0, 1}
        fleet[0].report(EngineLoad(waiting=5), -1)
        now[0] = 0.05
        assert 0 in {rule.choose(query(), fleet).engine.rank for _ in range(2)}
        now[0] = 0.15
        assert {rule.choose(query(), fleet).engine.rank for _ in range(3)} == {1}


class Last:
    """A user's policy."""

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        del query
        return ledgers[-1]


def test_a_users_policy_is_taken_as_an_object_or_by_import_path() -> None:
    fleet = ledgers(3)
    for chooser in (make_router(Last()), make_router(f"{__name__}:Last")):
        assert chooser.choose(query(), fleet) is fleet[-1]
        assert chooser.reasons() == ()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("wrok", {}, "'work'"),
        ("work", {"client": 3}, "'clients'"),
        ("work", {"clients": 0}, "at least 1"),
        ("work", {"step_tokens": 0}, "at least 1"),
        ("prefix", {"block_tokens": 0}, "block_tokens"),
        ("round-robin", {"x": 1}, "none"),
        ("nowhere:Router", {}, "cannot be imported"),
        ("os:path", {}, "neither"),
        (object(), {}, "no choose"),
        (Last(), {"x": 1}, "router_options"),
    ],
)
def test_a_wrong_selection_says_what_there_is(name: object, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make_router(name, options)
