"""The shipped controller, scaler, switch, wave and participation logic through seeded schedules on a counted clock.

`make simulation` (`python -m tests.simulation`) runs the large set and prints the seed of what fails; a seed is the same run again.
"""

from __future__ import annotations

import pytest

from tests.simulation import mutations
from tests.simulation.mutations import Mutation
from tests.simulation.schedule import run

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

_SEEDS = range(100)
_SEEDS_OF_A_MUTATION = 100


def test_whatever_goes_wrong_one_topology_serves_nothing_is_left_and_the_next_operation_works() -> None:
    for seed in _SEEDS:
        outcome = run(seed)
        assert not outcome.problems, f"seed {seed}: {outcome.problems}"


def test_a_seed_is_the_same_run_again() -> None:
    for seed in range(3):
        assert run(seed).digest == run(seed).digest


@pytest.mark.parametrize("mutation", mutations.QUICK, ids=lambda mutation: mutation.__name__)
def test_a_fault_in_the_shipped_logic_is_found(mutation: Mutation) -> None:
    with mutation():
        assert any(run(seed).problems for seed in range(_SEEDS_OF_A_MUTATION))
