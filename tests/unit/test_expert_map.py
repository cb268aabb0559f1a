"""Where experts are and where their tokens go: pure."""

from __future__ import annotations

from collections import Counter

import pytest

from raycore.engines.torch.expert_map import BUCKETS, LayerMap, check_map, destinations, even_map, given_map
from raycore.errors import ConfigurationError


@pytest.mark.parametrize("experts", [1, 2, 4, 7, 8, 64])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_expert_is_once_on_some_rank_and_ranks_differ_by_one(experts: int, size: int) -> None:
    placed = even_map({3: experts}, size)
    check_map(placed, {3: experts}, size)
    lengths = [len(row) for row in placed[3].rows]
    assert sum(lengths) == experts
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("experts", "size", "slots"), [(4, 2, 3), (4, 3, 2), (8, 3, 5), (4, 2, 4), (3, 2, 5)])
def test_slots_that_are_left_over_take_copies(experts: int, size: int, slots: int) -> None:
    (layer,) = even_map({0: experts}, size, slots).values()
    check_map({0: layer}, {0: experts}, size)
    assert {len(row) for row in layer.rows} == {slots}
    copies = Counter(expert for row in layer.rows for expert in row if expert >= 0)
    assert sum(copies.values()) == min(slots, experts) * size
    assert max(copies.values()) <= -(-slots * size // experts), "copies are spread over the experts"


def test_too_few_slots_are_refused_by_number() -> None:
    with pytest.raises(ConfigurationError, match="2 ranks with 1 slots each cannot hold 4 experts"):
        even_map({0: 4}, 2, 1)


def test_tokens_of_copies_are_shared_out_as_the_map_says() -> None:
    layer = LayerMap(rows=((0, 1), (1,), (2, 1)), shares=((1.0, 0.5), (0.25,), (1.0, 0.25)))
    table = destinations(layer, 3)
    width = 2
    assert set(table[0]) == {0}
    assert set(table[2]) == {2 * width}
    assert Counter(table[1]) == {1: BUCKETS // 2, width: BUCKETS // 4, 2 * width + 1: BUCKETS // 4}
    for end in range(4, BUCKETS, 4):
        assert Counter(table[1][:end])[1] == end // 2, "every stretch of the batch is shared out, not only the whole of it"


def test_copies_without_shares_take_equal_parts() -> None:
    table = destinations(LayerMap(rows=((0,), (0,), (0,))), 1)
    assert sorted(Counter(table[0]).values()) == [21, 21, 22]


@pytest.mark.parametrize(
    ("placement", "text"),
    [
        ({"*": [[0, 1], [2]]}, "no copy of expert 3"),
        ({"*": [[0, 1], [2, 3, 4]]}, "not among its 4"),
        ({"*": [[0, 1, 1], [2, 3]]}, "twice on one rank"),
        ({"*": [[0, 1, 2, 3]]}, "rows for 1 ranks"),
        ({"0": [[0, 1], [2, 3]]}, "nothing of layer 1"),
        ({"*": [[0, 1], [2, 3]], "7": [[0], [1]]}, "'7' is no layer"),
        ({"*": [0, 1]}, "maps layers to rows"),
    ],
)
def test_a_wrong_placement_is_refused_by_what_is_wrong(placement: object, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        given_map(placement, {0: 4, 1: 4}, 2)  # type: ignore[arg-type]


def test_a_layer_may_have_a_placement_of_its_own() -> None:
    placed = given_map({"*": [[0, 1], [2, 3]], "1": [[3], [2, 1, 0]]}, {0: 4, 1: 4}, 2)
    assert placed[0].rows == ((0, 1), (2, 3))
    assert placed[1].rows == ((3,), (2, 1, 0))
