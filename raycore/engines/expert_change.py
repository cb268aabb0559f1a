"""A change of members as an expert-parallel engine is told of it: which experts each rank has, and which it shall have."""

from __future__ import annotations

import msgspec


class ExpertChange(msgspec.Struct, frozen=True):
    """By layer (as text) and rank: the experts by slot, -1 for an empty one. Who is missing in `before` joins, who is in `after` leaves.

    `shares`, by layer and rank: which part of its expert's tokens each slot takes; a layer that is missing shares evenly.
    """

    before: dict[str, dict[int, tuple[int, ...]]]
    after: dict[str, dict[int, tuple[int, ...]]]
    shares: dict[str, dict[int, tuple[float, ...]]] = {}


class ExpertReport(msgspec.Struct, frozen=True):
    """What a plan of experts is made of, from one rank; by layer, as text."""

    placement: dict[str, list[list[int]]]
    """The experts of each group rank by slot; the same at every rank."""
    load: dict[str, list[int]]
    """Tokens of this rank's requests that each expert was chosen for."""
