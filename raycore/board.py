"""The coordinator's board: what every engine last said of its load and its wave, and what follows for others. Pure; times are given.

Whether the pool runs is what its ranks report, never what was sent to them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, final

import msgspec

from raycore.engine import EngineLoad
from raycore.ids import EngineId, GroupStamp
from raycore.messages import Beat, RankLoad, Snapshot, Wake, WaveReport
from raycore.waves import Phase

PUBLISH_INTERVAL_S = 0.1
"""Loads are published no more often than this, however often they change."""
QUIET_INTERVAL_S = 1.0
"""An unchanged board is published this often, so that subscribers know that it is alive."""


class _Heard(msgspec.Struct):
    load: EngineLoad
    at_s: float
    seq: int
    wave: WaveReport | None


class Running(NamedTuple):
    """The newest wave that anyone reports, and whether somebody reports to be in it."""

    stamp: GroupStamp
    wave: int
    is_running: bool


NOT_RUNNING = Running(GroupStamp(), 0, is_running=False)


@final
class Board:
    """Fed with beats; asked for wake-ups and snapshots."""

    def __init__(self) -> None:
        self._members: set[EngineId] = set()
        self._heard: dict[EngineId, _Heard] = {}
        self._is_changed = False
        self._published_s = -QUIET_INTERVAL_S
        self._published: Running = NOT_RUNNING
        self._seq = 0

    def set_members(self, members: Iterable[EngineId]) -> None:
        """These form the pool; what others said is forgotten."""
        self._members = set(members)
        for engine in [engine for engine in self._heard if engine not in self._members]:
            del self._heard[engine]
            self._is_changed = True

    def hear(self, beat: Beat, now_s: float) -> list[tuple[EngineId, Wake]]:
        """Take in a beat; who should be woken because of it. Beats of strangers and old ones change nothing."""
        known = self._heard.get(beat.engine)
        if beat.engine not in self._members or (known is not None and beat.seq <= known.seq):
            return []
        self._is_changed |= known is None or known.load != beat.load
        self._heard[beat.engine] = _Heard(beat.load, now_s, beat.seq, beat.wave)
        if beat.wave is None or (known is not None and known.wave == beat.wave):
            return []
        return self._sleepers()

    def running(self) -> Running:
        """What the ranks report, together; what is said of an older group does not count."""
        reports = [heard.wave for heard in self._heard.values() if heard.wave is not None]
        if not reports:
            return NOT_RUNNING
        stamp = max((report.stamp for report in reports), key=lambda stamp: (stamp.term, stamp.epoch))
        newest = [report for report in reports if report.stamp == stamp]
        stepping = [report.wave for report in newest if report.phase is Phase.STEPPING]
        return Running(stamp, max(stepping or [report.wave for report in newest]), bool(stepping))

    def due(self, now_s: float) -> Snapshot | None:
        """What to publish now: at once when a wave started or ended, loads every `PUBLISH_INTERVAL_S` at most."""
        running = self.running()
        passed_s = now_s - self._published_s
        is_due = running != self._published or passed_s >= (PUBLISH_INTERVAL_S if self._is_changed else QUIET_INTERVAL_S)
        if not is_due:
            return None
        self._seq += 1
        self._published, self._published_s, self._is_changed = running, now_s, False
        return self.snapshot(now_s)

    def snapshot(self, now_s: float) -> Snapshot:
        """The board as it is; `seq` counts those that were published."""
        running = self.running()
        ranks = sorted(self._heard.items(), key=lambda item: item[0].rank)
        loads = [RankLoad(engine, heard.load, max(0.0, now_s - heard.at_s)) for engine, heard in ranks]
        return Snapshot(self._seq, loads, running.is_running, running.wave)

    def _sleepers(self) -> list[tuple[EngineId, Wake]]:
        """Ranks that report to rest while another one reports to be in their next wave."""
        running = self.running()
        if not running.is_running:
            return []
        wake = Wake(running.stamp, running.wave)
        return [
            (engine, wake)
            for engine, heard in self._heard.items()
            if heard.wave is not None
            and heard.wave.stamp == running.stamp
            and heard.wave.phase is Phase.RESTING
            and heard.wave.wave <= running.wave
        ]
