"""What a routing decision costs: choice, explanation, dispatch and end, with every engine's report new or a few of them.

python -m bench.routing [--json FILE] [--repeat N]
"""

from __future__ import annotations

import random
import time

from bench.report import Row, arguments, median, publish
from raycore.engine import EngineLoad
from raycore.ids import EngineId, Incarnation, Rank, RequestId
from raycore.routing.book import LedgerBook
from raycore.routing.decisions import DecisionLog
from raycore.routing.ledger import EngineLedger
from raycore.routing.query import RouteQuery
from raycore.routing.selection import make_router

FLEETS = (2, 8, 64, 1_000, 10_000)
AIMS_US = {8: 10.0, 64: 20.0, 1_000: 20.0, 10_000: 20.0}
DECISIONS = 2_000


def decision_us(name: str, engines: int, fresh: int, **options: object) -> float:
    """The median of decisions, each with `fresh` engines' reports new since the one before."""
    generator = random.Random(1)
    book, log = LedgerBook(), DecisionLog()
    fleet = [EngineLedger(EngineId(Rank(rank), Incarnation("i")), book, kv_capacity=400_000) for rank in range(engines)]
    router = make_router(name, options, randomness=random.Random(0), clock=time.monotonic)
    loads = [EngineLoad(generator.randint(1, 60), generator.randint(0, 5), 50_000, generator.randint(0, 8_000)) for _ in range(64)]
    query = RouteQuery(RequestId("r"), 1_000, blocks=range(8))
    for ledger in fleet:
        ledger.report(generator.choice(loads), -1, 25_000)
    times: list[float] = []
    clock = time.perf_counter_ns
    for number in range(DECISIONS):
        for ledger in fleet if fresh >= engines else generator.sample(fleet, fresh):
            ledger.report(loads[number % 64], -1, 25_000)
        query.prefill = 1_000
        begin = clock()
        ledger = router.choose(query, fleet)
        log.add(query.request_id, ledger.engine, name, router.reasons())
        ledger.dispatch(query.prefill)
        times.append((clock() - begin) / 1e3)
        ledger.end(query.prefill)
    return median(times)


def main() -> None:
    """Measure and publish."""
    options = arguments(__doc__ or "").parse_args()
    rows: list[Row] = []
    for engines in FLEETS:
        for what, fresh in (("all reports new", engines), ("two reports new", min(2, engines))):
            if engines > 64 and fresh == engines:
                continue  # as much again would be spent on taking the reports in
            samples = [decision_us("work", engines, fresh) for _ in range(options.repeat)]
            aim = AIMS_US.get(engines)
            rows.append(
                Row(
                    f"work, {engines} engines, {what}",
                    median(samples),
                    "us",
                    aim=f"<= {aim:g}" if aim else "",
                    is_met=None if aim is None else median(samples) <= aim,
                    samples=samples,
                )
            )
    crowd = [decision_us("work", 8, 8, clients=4) for _ in range(options.repeat)]
    rows.append(Row("work among 4 clients, 8 engines, all reports new", median(crowd), "us", aim="<= 10", is_met=median(crowd) <= 10))
    for name in ("round-robin", "least-requests", "two-choices", "reference", "prefix"):
        samples = [decision_us(name, 8, 8) for _ in range(options.repeat)]
        rows.append(Row(f"{name}, 8 engines, all reports new", median(samples), "us", samples=samples))
    for engines in FLEETS[2:]:
        samples = [decision_us("prefix", engines, 2) for _ in range(options.repeat)]
        rows.append(Row(f"prefix, {engines} engines, two reports new", median(samples), "us", aim="<= 20", is_met=median(samples) <= 20))
    publish("Routing: choice, explanation and dispatch of one request", rows, options.json)


if __name__ == "__main__":
    main()
