"""Which bytes of a joiner's weights come from whom, and which are missing."""

from __future__ import annotations

import random

import pytest

from raycore.load_progress import WeightMeter, WeightProgress, added
from raycore.weight_copies import Span, Spans, dealt, portions, without


def bytes_of(spans: Spans) -> list[int]:
    return [at for span in spans for at in range(span.begin, span.end)]


def some_spans(chance: random.Random) -> Spans:
    edges = sorted(chance.sample(range(200), 2 * chance.randint(1, 5)))
    return tuple(Span(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_shares_and_portions_are_the_missing_bytes_once_and_nearly_equal(seed: int) -> None:
    chance = random.Random(seed)
    missing, count, most = some_spans(chance), chance.randint(1, 7), chance.randint(1, 50)
    shares = dealt(missing, count)
    assert [at for share in shares for at in bytes_of(share)] == bytes_of(missing)
    sizes = [len(bytes_of(share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for share in shares:
        pieces = portions(share, most)
        assert [at for piece in pieces for at in bytes_of(piece)] == bytes_of(share)
        assert all(0 < len(bytes_of(piece)) <= most for piece in pieces)


@pytest.mark.parametrize("seed", range(30))
def test_what_has_come_is_not_missing_any_more(seed: int) -> None:
    chance = random.Random(seed)
    missing, came = some_spans(chance), some_spans(chance)
    assert bytes_of(without(missing, came)) == sorted(set(bytes_of(missing)) - set(bytes_of(came)))


def test_a_meter_tells_bytes_and_rate_and_forgets_what_came_in_vain() -> None:
    now_s = [10.0]
    meter = WeightMeter(lambda: now_s[0])
    meter.begin(300)
    now_s[0] = 12.0
    meter.add(100)
    assert meter.progress == WeightProgress(100, 300, 50.0)
    assert added([meter.progress, WeightProgress(1, 2, 3.0)]) == WeightProgress(101, 302, 53.0)
    meter.loaded(from_disk_bytes=0)
    assert meter.progress.bytes == 100
    meter.loaded(from_disk_bytes=300)
    assert meter.progress == WeightProgress(from_disk_bytes=300)
