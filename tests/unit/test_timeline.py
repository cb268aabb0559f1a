"""The timeline of a pool: bins hold every token, and it can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from raycore.timeline import Timeline


@pytest.fixture
def timeline() -> Timeline:
    made = Timeline()
    made.set_members(0.0, 1)
    made.set_members(2.0, 2)
    for at_s, rank, tokens in ((0.1, 0, 4), (0.4, 0, 2), (1.0, 0, 8), (3.9, 1, 6)):
        made.add_tokens(at_s, rank, tokens)
    made.add_span(0.5, 2.0, "1 → 2")
    return made


def test_bins_hold_every_token(timeline: Timeline) -> None:
    begins, rates = timeline.rates(1.0)
    assert begins.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert {rank: rate.tolist() for rank, rate in rates.items()} == {0: [6.0, 8.0, 0.0, 0.0], 1: [0.0, 0.0, 0.0, 6.0]}
    _, halves = timeline.rates(0.5)
    assert sum(float(rate.sum()) * 0.5 for rate in halves.values()) == 20.0


def test_blocks_show_the_highest_rate_highest(timeline: Timeline) -> None:
    blocks = timeline.blocks(4)
    assert (len(blocks), blocks[1], blocks[2]) == (4, "█", " ")


def test_nothing_at_all_can_be_drawn(tmp_path: Path) -> None:
    empty = Timeline()
    assert empty.blocks(5).strip() == ""
    empty.write_png(tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_is_written(timeline: Timeline, tmp_path: Path) -> None:
    timeline.write_png(tmp_path / "pool.png", "one, then two")
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")
