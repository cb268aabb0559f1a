"""Which group rank's slots hold which experts of each layer, and to which copy a token goes. Pure.

A group rank has a row of slots in every layer; rows may differ in length, and a slot may be empty. An expert has at least one copy, and at
most one on each rank. Tokens of an expert with several copies are shared out by buckets: a token's place in the batch names a bucket, and
the map says which copy serves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from raycore.errors import ConfigurationError

EMPTY_SLOT = -1
BUCKETS = 64
"""Parts into which an expert's tokens are divided: shares are met to 1/64."""


class LayerMap(msgspec.Struct, frozen=True):
    """One layer's placement. `rows[group rank][slot]`: the expert there, or EMPTY_SLOT.

    `shares[group rank][slot]`: which part of the expert's tokens this copy takes, those of one expert adding up to 1; empty: equal parts.
    """

    rows: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] = ()

    @property
    def width(self) -> int:
        """The longest row; at least 1."""
        return max(1, *(len(row) for row in self.rows))

    def places(self, expert: int) -> list[tuple[int, int]]:
        """(group rank, slot) of each copy, in order."""
        return [(rank, slot) for rank, row in enumerate(self.rows) for slot, held in enumerate(row) if held == expert]


ExpertMap = dict[int, LayerMap]
"""By layer number, as in the names of a checkpoint's tensors."""


def even_map(layers: Mapping[int, int], size: int, slots: int | None = None) -> ExpertMap:
    """Experts in order over `size` ranks; `layers`: how many each layer has.

    `slots`: of each rank, those that are left over taking further copies; None: each expert once, the first ranks one more where they do
    not come out even. ConfigurationError where the slots are too few.
    """
    return {layer: LayerMap(_even_rows(experts, size, slots)) for layer, experts in layers.items()}


def _even_rows(experts: int, size: int, slots: int | None) -> tuple[tuple[int, ...], ...]:
    if slots is not None and slots * size < experts:
        raise ConfigurationError(f"expert_slots: {size} ranks with {slots} slots each cannot hold {experts} experts")
    base, more = divmod(experts, size)
    rows: list[list[int]] = []
    for rank in range(size):
        begin = rank * base + min(rank, more)
        rows.append(list(range(begin, begin + base + (rank < more))))
    return tuple(_filled(row, rank, experts, slots) for rank, row in enumerate(rows))


def _filled(row: list[int], rank: int, experts: int, slots: int | None) -> tuple[int, ...]:
    """The row with copies of what the next ranks hold, so that the copies are spread over the experts as well."""
    others = [(row[-1] + 1 + i if row else rank + i) % experts for i in range(experts)]
    spare = [expert for expert in others if expert not in row]
    room = 0 if slots is None else slots - len(row)
    return (*row, *spare[:room], *[EMPTY_SLOT] * (room - len(spare)))


def given_map(placement: Mapping[str, Any], layers: Mapping[int, int], size: int, shares: Mapping[str, Any] | None = None) -> ExpertMap:
    """The map of the option `expert_placement`: a layer's number (as text), or "*" for all others, to its rows; `shares` likewise.

    ConfigurationError that names what is wrong with it.
    """
    try:
        rows = msgspec.convert(placement, dict[str, tuple[tuple[int, ...], ...]])
        parts = msgspec.convert(shares or {}, dict[str, tuple[tuple[float, ...], ...]])
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"expert_placement maps layers to rows of experts: {error}") from error
    unknown = sorted(set(rows) - {"*", *map(str, layers)})
    if unknown:
        raise ConfigurationError(f"expert_placement: {unknown[0]!r} is no layer with experts")
    found: ExpertMap = {}
    for layer in layers:
        own = rows.get(str(layer), rows.get("*"))
        if own is None:
            raise ConfigurationError(f"expert_placement says nothing of layer {layer}")
        found[layer] = LayerMap(own, parts.get(str(layer), parts.get("*", ())))
    check_map(found, layers, size)
    return found


def check_map(placed: ExpertMap, layers: Mapping[int, int], size: int) -> None:
    """Raise ConfigurationError unless every expert of every layer has a copy, and none has two on one rank."""
    check_form(placed, layers, size)
    for layer, experts in layers.items():
        missing = sorted(set(range(experts)) - {expert for row in placed[layer].rows for expert in row})
        if missing:
            raise ConfigurationError(f"the placement of layer {layer} has no copy of expert {missing[0]}")


def check_form(placed: ExpertMap, layers: Mapping[int, int], size: int) -> None:
    """The same, but not every expert needs to be there."""
    if set(placed) != set(layers):
        raise ConfigurationError(f"the placement is of layers {sorted(placed)}, the model has experts in {sorted(layers)}")
    for layer, experts in layers.items():
        rows = placed[layer].rows
        held = [[expert for expert in row if expert != EMPTY_SLOT] for row in rows]
        everywhere = [expert for row in held for expert in row]
        if len(rows) != size:
            raise ConfigurationError(f"the placement of layer {layer} has rows for {len(rows)} ranks, there are {size}")
        if any(not 0 <= expert < experts for expert in everywhere):
            raise ConfigurationError(f"the placement of layer {layer} names an expert that is not among its {experts}")
        if any(len(row) != len(set(row)) for row in held):
            raise ConfigurationError(f"the placement of layer {layer} has an expert twice on one rank")
        shares = placed[layer].shares
        if shares and [len(row) for row in shares] != [len(row) for row in rows]:
            raise ConfigurationError(f"the shares of layer {layer} do not have the form of its rows")


def fingerprint(placed: ExpertMap) -> int:
    """62 bits that tell placements apart."""
    rows = msgspec.json.encode(sorted((layer, found.rows) for layer, found in placed.items()))
    return int.from_bytes(hashlib.blake2b(rows, digest_size=8).digest()) >> 2


def destinations(layer: LayerMap, experts: int) -> list[list[int]]:
    """[experts][BUCKETS]: the place of the copy that serves each bucket, as group rank * width + slot; of all 0 without a copy."""
    width = layer.width
    table: list[list[int]] = []
    for expert in range(experts):
        places = layer.places(expert)
        if not places:
            table.append([0] * BUCKETS)
            continue
        shares = [layer.shares[rank][slot] for rank, slot in places] if layer.shares else [1.0] * len(places)
        table.append([places[i][0] * width + places[i][1] for i in _dealt(shares)])
    return table


def _dealt(shares: Sequence[float]) -> list[int]:
    """BUCKETS turns dealt out so that after each of them everyone has had close to their share."""
    total = sum(shares)
    parts = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)
    credit = [0.0] * len(parts)
    turns: list[int] = []
    for _ in range(BUCKETS):
        credit = [have + part for have, part in zip(credit, parts, strict=True)]
        chosen = max(range(len(parts)), key=lambda i: (credit[i], -i))
        credit[chosen] -= 1.0
        turns.append(chosen)
    return turns
