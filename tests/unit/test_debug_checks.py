"""With `debug_checks` an engine core looks at its own and its engine's tables whenever it becomes idle."""

from __future__ import annotations

from typing import Any

import pytest

from raycore.config import Limits, Timeouts, parse_config
from raycore.core.engine_core import EngineCore
from raycore.engine import CHECK_INVARIANTS
from tests.support.scripted import Rig


def checked(rig: Rig, **settings: Any) -> Rig:
    core = EngineCore(
        rig.id,
        rig.engine,
        rig.listener,
        rig.membership,
        limits=Limits(),
        timeouts=Timeouts(),
        step_budget_s=30.0,
        clock=rig.clock,
        **settings,
    )
    rig.core = core
    return rig


@pytest.mark.parametrize("is_on", [True, False])
def test_an_engine_is_checked_once_each_time_it_becomes_idle(is_on: bool) -> None:
    rig = checked(Rig(), debug_checks=is_on)
    looked: list[int] = []
    peer = rig.peer()
    rig.engine.methods[CHECK_INVARIANTS] = lambda: looked.append(len(rig.engine.log))
    for round_ in range(1, 4):
        peer.send(peer.add(0, max_tokens=5))
        for _ in range(20):
            rig.core.turn(may_wait=False)
        assert len(looked) == (round_ if is_on else 0)


def test_an_engine_whose_tables_are_wrong_ends() -> None:
    def wrong() -> None:
        message = "a block is lost"
        raise AssertionError(message)

    rig = checked(Rig(), debug_checks=True)
    peer = rig.peer()
    rig.engine.methods[CHECK_INVARIANTS] = wrong
    peer.send(peer.add(0, max_tokens=1))
    with pytest.raises(AssertionError, match="a block is lost"):
        rig.core.run()


def test_the_environment_switches_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, is_on in (("1", True), ("0", False), (None, False)):
        if value is None:
            monkeypatch.delenv("RAYCORE_DEBUG_CHECKS")
        else:
            monkeypatch.setenv("RAYCORE_DEBUG_CHECKS", value)
        assert parse_config({"engine": "echo"}).debug_checks is is_on
