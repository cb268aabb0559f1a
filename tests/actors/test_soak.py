"""A short soak; `make soak` runs the long one."""

from __future__ import annotations

import pytest

from bench.soak import RATE, soak

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(400)]

CYCLES = 2


@pytest.mark.parametrize("lockstep", [False, True], ids=["dense", "lockstep"])
async def test_cycles_of_sizes_under_a_steady_load_lose_nothing_and_leave_nothing(lockstep: bool) -> None:
    found = await soak(f"soak-{lockstep}".lower(), CYCLES, lockstep=lockstep)
    assert not found.wrong
    assert found.answers > RATE, "there was a load"
    assert len(found.cycles) == CYCLES
    assert {"client", "controller", "coordinator", "rank 0", "rank 1"} <= set(found.cycles[-1])
    assert not found.growth()
