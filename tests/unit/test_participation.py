"""One engine core's part in operations: every order of messages of two operations and two terms, and what each must not do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from raycore.errors import ScalingError
from raycore.ids import Epoch, GroupStamp, Term
from raycore.participation import Part, Participation, Stage, on_built, on_decided, on_prepare, on_released, on_told, on_undo

LIVE = GroupStamp(Epoch(1), Term(1))
STAMPS = {"a": GroupStamp(Epoch(2), Term(1)), "b": GroupStamp(Epoch(3), Term(1)), "c": GroupStamp(Epoch(3), Term(2))}
TERMS = {"a": Term(1), "b": Term(1), "c": Term(2)}
"""Operations; the last is a later controller's."""

Event = tuple[str, Callable[[Participation], Part]]


def events() -> list[Event]:
    found: list[Event] = []
    for name, stamp in STAMPS.items():
        term = TERMS[name]
        found += [
            (f"prepare {name}", lambda s, n=name, t=term, g=stamp: on_prepare(s, n, t, g)),
            (f"built {name}", lambda s, n=name, g=stamp: on_built(s, n, g)),
            (f"undo {name}", lambda s, n=name, t=term: on_undo(s, n, t)),
            (f"decided {name}", lambda s, n=name, t=term, g=stamp: on_decided(s, n, t, g)),
            (f"told {name}", lambda s, t=term, g=stamp: on_told(s, t, g, is_new=True)),
            (f"released {name}", lambda s, g=stamp: on_released(s, g)),
        ]
    found.append(("told of states of the same members", lambda s: on_told(s, Term(1), LIVE, is_new=False)))
    found.append(("taken over", lambda s: on_told(s, Term(2), LIVE, is_new=False)))
    return found


def test_in_every_order_of_messages_what_is_built_is_dropped_or_gone_for_and_a_decision_is_never_undone() -> None:
    seen = {Participation()}
    ahead = [Participation()]
    while ahead:
        state = ahead.pop()
        for name, event in events():
            try:
                part = event(state)
            except ScalingError:
                continue
            after = part.state
            assert after.term >= state.term, f"{name} took the term back"
            held = state.stage in (Stage.PREPARING, Stage.READY, Stage.DECIDED)
            is_other = (after.operation, after.stamp) != (state.operation, state.stamp) or after.stage is Stage.NONE
            assert (part.drops == state.stamp) == (held and is_other), f"{name} in {state} dropped {part.drops}"
            if name.startswith("undo"):
                assert state.stage not in (Stage.DECIDED, Stage.GONE) or state.operation != name[-1]
                assert name[-1] in after.undone
            if after.stage is Stage.READY and state.stage is not Stage.READY:
                assert name.startswith("built")
                assert state.stage is Stage.PREPARING
            if part.builds:
                assert after.operation not in after.undone, f"{name} began what was undone"
            if after.stage is Stage.DECIDED and state.stage is not Stage.DECIDED:
                assert state.stage is Stage.READY
            if after not in seen:
                seen.add(after)
                ahead.append(after)
    assert len(seen) > 50


@pytest.mark.parametrize("event", [on_prepare, on_decided])
def test_a_lower_term_is_refused(event: Callable[..., Part]) -> None:
    later = on_told(Participation(), Term(2), LIVE, is_new=False).state
    with pytest.raises(ScalingError, match="term 2 has taken over"):
        event(later, "a", Term(1), STAMPS["a"])
    with pytest.raises(ScalingError, match="term 2 has taken over"):
        on_undo(later, "a", Term(1))


def test_an_undo_that_overtakes_its_prepare_stops_it() -> None:
    state = on_undo(Participation(), "a", Term(1)).state
    with pytest.raises(ScalingError, match="was undone here"):
        on_prepare(state, "a", Term(1), STAMPS["a"])


def test_asked_twice_is_built_once() -> None:
    first = on_prepare(Participation(), "a", Term(1), STAMPS["a"])
    again = on_prepare(first.state, "a", Term(1), STAMPS["a"])
    assert (first.builds, again.builds) == (True, False)
    ready = on_built(again.state, "a", STAMPS["a"]).state
    assert on_prepare(ready, "a", Term(1), STAMPS["a"]).state == ready
