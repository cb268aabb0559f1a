"""When the controller gives its members new process groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from actors.lockstep import why_broken
from raycore.engine import EngineInfo, EngineLoad
from raycore.ids import EngineId, Epoch, GroupStamp, Incarnation, Rank, Term
from raycore.membership import Endpoints, GroupAddress, Member, Membership
from raycore.messages import Beat, WaveReport
from raycore.waves import Phase

ENGINE = EngineId(Rank(0), Incarnation("a"))
INFO = EngineInfo("echo", "m", 1000, 4096, 1 << 20, ("generate",), sync_interval=1)
DECIDED = GroupStamp(Epoch(3), Term(1))


def pool(group: GroupAddress | None) -> Membership:
    member = Member(ENGINE, Endpoints("h", "r", "b"), INFO, 1)
    return Membership("p", epoch=Epoch(4), term=Term(2), members=(member,), group=group)


def says(stamp: GroupStamp, phase: Phase) -> Callable[[EngineId], Beat | None]:
    report = WaveReport(stamp, phase, 0, 1, "a peer is gone" if phase is Phase.BROKEN else "")
    beat = Beat(ENGINE, 1, 1, "", 0.0, 1.0, EngineLoad(), wave=report)
    return lambda _engine: beat


@pytest.mark.parametrize(
    ("stamp", "phase", "why"),
    [
        (DECIDED, Phase.STEPPING, ""),
        (DECIDED, Phase.BROKEN, "a peer is gone"),
        (GroupStamp(Epoch(2), Term(1)), Phase.BROKEN, ""),  # it has not heard of the newest yet
        (GroupStamp(Epoch(4), Term(1)), Phase.STEPPING, "decided is"),  # from a controller whose last word came late
    ],
)
def test_groups_that_are_broken_or_that_an_earlier_controller_decided_are_replaced(stamp: GroupStamp, phase: Phase, why: str) -> None:
    found = why_broken(pool(GroupAddress(DECIDED, "h", {})), says(stamp, phase))
    assert why in found
    assert bool(why) == bool(found)


def test_members_without_groups_get_some() -> None:
    assert why_broken(pool(None), says(DECIDED, Phase.OUT)) == "it has none"
