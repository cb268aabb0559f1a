"""The routing ledger and the choice over it."""

from __future__ import annotations

import random

import pytest

from raycore.engine import EngineLoad
from raycore.ids import EngineId, Incarnation, Rank
from raycore.routing import EngineLedger, LeastWork


def ledgers(count: int) -> list[EngineLedger]:
    return [EngineLedger(EngineId(Rank(rank), Incarnation("i"))) for rank in range(count)]


@pytest.mark.parametrize("engines", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("requests", [1, 2, 7, 64, 101])
def test_equal_requests_over_idle_engines_differ_by_at_most_one(engines: int, requests: int) -> None:
    fleet, router = ledgers(engines), LeastWork()
    for sent in range(requests):
        router.choose(fleet).dispatch(100)
        counts = [ledger.requests for ledger in fleet]
        assert max(counts) - min(counts) <= 1, (sent, counts)


def test_ties_go_round_so_that_no_engine_is_favoured() -> None:
    fleet, router = ledgers(4), LeastWork()
    chosen = [router.choose(fleet).engine.rank for _ in range(40)]
    assert {chosen.count(rank) for rank in range(4)} == {10}


@pytest.mark.parametrize("seed", range(5))
def test_the_ledger_is_exact_through_dispatch_outputs_and_ends(seed: int) -> None:
    generator = random.Random(seed)
    fleet, router = ledgers(3), LeastWork()
    live: list[list] = []
    for _ in range(2000):
        if live and generator.random() < 0.5:
            row = generator.choice(live)
            ledger, left = row
            if left and generator.random() < 0.7:
                ledger.tokens -= 1
                row[1] -= 1
            else:
                ledger.end(left)
                live.remove(row)
        else:
            cost = generator.randint(1, 500)
            chosen = router.choose(fleet)
            assert chosen.work() == min(ledger.work() for ledger in fleet), f"seed {seed}"
            chosen.dispatch(cost)
            live.append([chosen, cost])
        for ledger in fleet:
            mine = [left for one, left in live if one is ledger]
            assert (ledger.tokens, ledger.requests) == (sum(mine), len(mine)), f"seed {seed}"
    for ledger, left in live:
        ledger.end(left)
    assert all((ledger.tokens, ledger.requests) == (0, 0) for ledger in fleet)


def test_work_of_other_clients_counts_and_ones_own_share_is_not_counted_twice() -> None:
    mine, busy = ledgers(2)
    mine.dispatch(100)
    mine.load, mine.load_own = EngineLoad(running=1), 1
    assert mine.work() == 100
    busy.load, busy.load_own = EngineLoad(running=3, waiting=2), 0
    assert busy.work() > mine.work()
    assert LeastWork().choose([busy, mine]) is mine


def test_a_report_older_than_ones_own_requests_makes_no_negative_work() -> None:
    (ledger,) = ledgers(1)
    ledger.load, ledger.load_own = EngineLoad(running=1), 5
    assert ledger.work() == 0
