"""Scales a running pool from another job: `ray job submit --working-dir . -- python examples/job_scale.py POOL RANKS`

The pool was launched with `lifetime="detached"`, or its driver runs; who uses it notices nothing but its speed.
"""

import sys

from raycore import api


def main() -> None:
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        raise SystemExit(__doc__)
    pool, ranks = sys.argv[1], int(sys.argv[2])
    before = [member["rank"] for member in api.pool_status(pool)["members"]]
    report = api.scale_elastic_ep(pool, ranks)
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.phases_s.items())
    print(f"ranks {before} -> {list(report.ranks)} ({phases})")


if __name__ == "__main__":
    main()
