"""A pause over all ranks, searched: every order of frames, deadlines, losses and deaths, for two clients and two or three ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from raycore.client.pause_plan import Ending, Phase
from raycore.core.pause import PauseState
from tests.support.pause_model import World, heal, successors, world

OPERATIONS = ("keep", "wait", "abort", "resume")
_STATES_LIMIT = 400_000


def quiet_worlds(start: World) -> Iterable[World]:
    """Every world that can be reached and in which nothing is left to happen but faults."""
    seen, todo = {start}, [start]
    while todo:
        w = todo.pop()
        is_quiet = not any(w.up) and not any(w.down)
        for name, following in successors(w):
            is_quiet = is_quiet and (" dies" in name or "lost" in name or "deadline" in name)
            if following not in seen:
                seen.add(following)
                todo.append(following)
        assert len(seen) < _STATES_LIMIT, "the search has grown out of bounds"
        if is_quiet:
            yield w


def check_quiet(w: World) -> None:
    """Nothing is held, nobody waits, and the live ranks agree, at once or after the mending that any client does."""
    live = [engine for engine in w.engines if engine.is_alive]
    assert all(engine.pause.hold is None and not engine.pause.waiting for engine in live), w
    assert all(client.plan is None or client.plan.phase is Phase.ENDED for client in w.clients), w
    if all(client.is_alive for client in w.clients):
        assert len({engine.pause for engine in live}) == 1, w
    mended = [engine.pause for engine in heal(w).engines if engine.is_alive]
    assert len(set(mended)) == 1, w
    assert (mended[0].state is PauseState.PAUSED) == bool(mended[0].stamp & 1), w


@pytest.mark.parametrize("pair", list(itertools.combinations_with_replacement(OPERATIONS, 2)), ids="-".join)
@pytest.mark.parametrize(
    "faults", [{"client_deaths": 1}, {"rank_deaths": 1}, {"losses": 1}, {"deadlines": 1}], ids=lambda faults: next(iter(faults))
)
def test_two_ranks_agree_whatever_two_clients_do(pair: tuple[str, str], faults: dict[str, int]) -> None:
    """One fault at most, at any moment or never."""
    count = 0
    for w in quiet_worlds(world([(pair[0],), (pair[1],)], 2, **faults)):
        check_quiet(w)
        count += 1
    assert count


@pytest.mark.parametrize("pair", [("wait", "abort"), ("keep", "resume")], ids="-".join)
def test_three_ranks_agree_whatever_two_clients_do_and_if_one_rank_dies(pair: tuple[str, str]) -> None:
    for w in quiet_worlds(world([(pair[0],), (pair[1],)], 3, has_work=False, rank_deaths=1)):
        check_quiet(w)


@pytest.mark.parametrize("first", ["keep", "wait", "abort"])
@pytest.mark.parametrize("faults", [{}, {"client_deaths": 1}, {"losses": 1}, {"rank_deaths": 1, "deadlines": 1}], ids=str)
def test_a_pause_and_a_resume_of_one_client_leave_what_their_endings_say(first: str, faults: dict[str, int]) -> None:
    for w in quiet_worlds(world([(first, "resume")], 3 if not faults else 2, **faults)):
        check_quiet(w)
        (client,) = w.clients
        if not client.is_alive:
            continue
        paused = False
        for operation, ending in zip((first, "resume"), client.endings, strict=True):
            paused = operation != "resume" if ending is Ending.DONE else paused
        assert all((e.pause.state is PauseState.PAUSED) == paused for e in w.engines if e.is_alive), w


def test_with_two_clients_at_once_one_of_them_always_succeeds() -> None:
    for pair in itertools.combinations_with_replacement(OPERATIONS, 2):
        for w in quiet_worlds(world([(pair[0],), (pair[1],)], 2)):
            endings = [ending for client in w.clients for ending in client.endings]
            assert Ending.DONE in endings, (pair, w)
            assert Ending.FAILED not in endings, (pair, w)
