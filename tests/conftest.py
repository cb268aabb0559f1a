"""The Ray cluster of the whole session, and the proof after each Ray test that nothing of a pool is left."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.serve_flags import use_flags

# A shell that starts a job in the background has it ignore Ctrl-C, and so would everything below it; here it is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["RAYCORE_DEBUG_CHECKS"] = "1"
"""Every engine core of the tests checks its tables whenever it is idle."""

os.environ["RAYCORE_EVENT_LOG"] = "off"
"""Pools of tests leave no event logs, except where a test asks for one."""

use_flags(haproxy=False)

_LEFTOVER_LIMIT_S = 15.0
"""Ray gives up a killed actor's name and resources a moment after the process is gone."""
_POLL_S = 0.05
_SHARED_FILE = re.compile(r"raycore-.+-(\d+)-\d+")
_PUT_AWAY: set[str] = set()
"""Actors that an earlier test was proven to have left nothing of: Ray lists them on, and the system gives their pids to others."""


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """One local cluster with resources that exist only in its books; yields its address."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_metrics_report_interval_ms"] = "2000"  # noqa: SIM112 -- Ray's spelling; ten seconds by default
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    import ray

    assert not ray.is_initialized(), "a test started Ray by itself"
    context = ray.init(
        address="local",
        num_cpus=8,
        num_gpus=8,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def cluster(ray_session: str) -> Iterator[str]:
    """The session's cluster; when the test ends, nothing of raycore may be left in it."""
    yield ray_session
    until_s = time.monotonic() + _LEFTOVER_LIMIT_S
    while left := leftovers():
        if time.monotonic() > until_s:
            _put_away_by_force()  # or every test after this one would be blamed for it
            pytest.fail(f"left behind: {left}")
        time.sleep(_POLL_S)


def _put_away_by_force() -> None:
    from actors.cleanup import cleanup
    from actors.groups import pool_groups
    from actors.naming import named_actors

    for pool in {name.pool for name in named_actors()} | {row.name.pool for row in pool_groups()}:
        cleanup(pool)


def leftovers() -> list[str]:
    """Actors, placement groups, processes, socket directories and shared-memory files of this cluster's pools."""
    from ray._private import state

    from actors.groups import pool_groups
    from actors.naming import named_actors, parse_name
    from actors.processes import is_gone

    rows = {name: row for name, row in state.actors().items() if name not in _PUT_AWAY and parse_name(row["Name"]) and row["Pid"]}
    pids = {row["Pid"]: row["Name"] for row in rows.values()}
    found = [f"actor {name}" for name in named_actors()]
    found += [f"placement group {row.name}" for row in pool_groups()]
    found += [f"process {pid} of {name}" for pid, name in pids.items() if not is_gone(pid)]
    directories = Path(f"/tmp/raycore-{os.getuid()}")
    if directories.is_dir():
        found += [f"directory {d}" for d in directories.iterdir() if int(d.name.split(".")[-2]) in pids]
    shared = ((_SHARED_FILE.fullmatch(file.name), file) for file in Path("/dev/shm").iterdir())
    found += [f"file {file}" for match, file in shared if match and int(match[1]) in {*pids, os.getpid()}]
    if not found:
        _PUT_AWAY.update(rows)
    return found
