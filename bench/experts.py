"""`python -m bench.experts`: what a resize of an expert-parallel layer moves, over seeded Zipf loads; no processes, no model.

The floor is what any plan must receive: the slots of joining ranks and the experts that only leaving ranks hold. Beside it, a plan from
scratch for the new ranks: how many slots that would receive.
"""

from __future__ import annotations

import random
import time

from bench.report import Row, arguments, median, publish
from elastic.experts import forced_slots, plan_experts

RESIZES = ((4, 5), (4, 6), (4, 8), (8, 12), (16, 20), (16, 32), (8, 6), (6, 4), (12, 8), (20, 16), (32, 28), (8, 4))
GOALS = ((1.05, 1.5), (1.2, 1.3))
_FEWER = 2.0


def resize(before: int, after: int, experts: int, exponent: float, goal: float, seed: int) -> tuple[float, float, float, float, float]:
    """One resize under loads that drifted by up to a quarter: slots received, the floor, those from scratch, imbalance, seconds."""
    generator = random.Random(f"{before} {after} {experts} {exponent} {seed}")
    smaller = min(before, after)
    slots = -(-experts // smaller) + max(2, experts // smaller // 4)
    loads = [1 / (place + 1) ** exponent for place in range(experts)]
    generator.shuffle(loads)
    old = plan_experts(loads, {}, range(before), slots).placement
    loads = [load * generator.uniform(0.8, 1.25) for load in loads]
    begin = time.perf_counter()
    plan = plan_experts(loads, old, range(after), slots, max_imbalance=goal)
    spent_s = time.perf_counter() - begin
    scratch = plan_experts(loads, {}, range(after), slots, max_imbalance=goal).placement
    anew = sum(expert not in old.get(rank, ()) for rank, row in scratch.items() for expert in row)
    return len(plan.moves), forced_slots(experts, old, range(after), slots), anew, plan.imbalance, spent_s


def main() -> None:
    """One row per resize and goal: the worst over experts, exponents and seeds."""
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    rows: list[Row] = []
    for before, after in RESIZES:
        for goal, most in GOALS:
            cases = [
                resize(before, after, experts, exponent, goal, seed)
                for experts in (64, 128, 256)
                for exponent in (0.6, 1.0)
                for seed in range(options.repeat)
            ]
            ratio = max(moves / forced for moves, forced, *_ in cases)
            fewer = min(anew / moves for moves, _, anew, *_ in cases)
            worst = max(imbalance for *_, imbalance, _ in cases)
            is_doubling = after == 2 * before
            rows += [
                Row(
                    f"{before} to {after} ranks, imbalance <= {goal:g}: slots over the floor, worst",
                    ratio,
                    "x",
                    aim=f"<= {most:g} x at {goal:g}",
                    is_met=ratio <= most and worst <= goal,
                ),
                Row(
                    "  slots from scratch over ours, least",
                    fewer,
                    "x",
                    aim="" if is_doubling else ">= 2 x",
                    is_met=None if is_doubling else fewer >= _FEWER,
                ),
                Row("  seconds a plan, median", median([spent_s for *_, spent_s in cases]), "s"),
            ]
    publish("Expert placement: one layer, a quarter more slots than experts on the smaller fleet", rows, options.json)


if __name__ == "__main__":
    main()
