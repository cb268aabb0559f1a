"""`python -m tests.simulation [FIRST [COUNT]] [--mutations] [--story]`: many schedules on all cores; prints the seeds of what fails."""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import time
import warnings

from tests.simulation import mutations
from tests.simulation.schedule import Outcome, run

_CHUNK = 50


def _chunk(first: int, count: int) -> list[Outcome]:
    warnings.simplefilter("ignore")
    outcomes = [run(seed) for seed in range(first, first + count)]
    return [outcome for outcome in outcomes if outcome.problems]


def _find(name: str, seeds: int) -> Outcome | None:
    warnings.simplefilter("ignore")
    mutation = next(each for each in mutations.ALL if each.__name__ == name)
    with mutation():
        return next((outcome for seed in range(seeds) if (outcome := run(seed)).problems), None)


def main() -> int:
    """Run, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", nargs="?", type=int, default=0)
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    parser.add_argument("--mutations", action="store_true", help="put each fault into the logic and see that it is found")
    parser.add_argument("--story", action="store_true", help="print what happened in the first schedule that fails")
    options = parser.parse_args()
    begin_s = time.perf_counter()
    failed: list[Outcome] = []
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        if options.mutations:
            names = [mutation.__name__ for mutation in mutations.ALL]
            found = list(pool.map(_find, names, [options.count] * len(names)))
            for name, outcome in zip(names, found, strict=True):
                told = "NOT found" if outcome is None else f"found by seed {outcome.seed}: {outcome.problems[0]}"
                sys.stdout.write(f"{name:45} {told}\n")
            return sum(outcome is None for outcome in found)
        firsts = range(options.first, options.first + options.count, _CHUNK)
        counts = [min(_CHUNK, options.first + options.count - first) for first in firsts]
        for outcomes in pool.map(_chunk, firsts, counts):
            for outcome in outcomes:
                failed.append(outcome)
                sys.stdout.write(f"seed {outcome.seed}: {outcome.problems}\n")
                sys.stdout.flush()
    took_s = time.perf_counter() - begin_s
    sys.stdout.write(f"{options.count} schedules from seed {options.first}: {len(failed)} failed; {took_s:.0f} s\n")
    if failed and options.story:
        sys.stdout.write("\n".join(failed[0].story) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
