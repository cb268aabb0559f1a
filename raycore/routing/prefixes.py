"""Prefix x work: an engine that has a prompt's beginning in its cache has less to do for it."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import final

from raycore.errors import ConfigurationError
from raycore.routing.balanced import LOOK_EVERY, Crowd
from raycore.routing.ledger import EngineLedger
from raycore.routing.query import Query
from raycore.routing.router import Candidate, Randomness, Ring

DEFAULT_BLOCK_TOKENS = 128
_UNKNOWN_CACHE_TOKENS = 1 << 19
_SCAN = 16
"""Up to so many engines are all looked at; of more, these two numbers, so that a decision costs the same for any fleet."""
_DRAWN = 8
_HOLDERS = 8
_FLOOR_SHARE = 0.1
"""A prompt that is all cached still takes a step; without a floor the fullest engine would be as good as an idle one."""
_HOT_UNITS = 4096.0
"""An engine whose work exceeds twice the mean by more than this is hot: its cache does not count."""


@final
class PrefixWork:
    """Least (work + new prefill tokens) x share of the prompt that is new x pace."""

    def __init__(
        self,
        random: Randomness,
        *,
        block_tokens: int = DEFAULT_BLOCK_TOKENS,
        cache_tokens: int | None = None,
        clients: int | None = None,
    ) -> None:
        """`block_tokens`: how fine prefixes are told apart. `cache_tokens`: what an engine's cache keeps; None: its KV cache's size."""
        if block_tokens < 1 or (cache_tokens is not None and cache_tokens < block_tokens):
            msg = f"block_tokens ({block_tokens}) must be at least 1 and at most cache_tokens ({cache_tokens})"
            raise ConfigurationError(msg)
        self._turn = int(random.random() * 1024)
        self._crowd = Crowd(random, clients)
        self._ring = Ring(random)
        self._map = PrefixMap(block_tokens, cache_tokens)
        self._of: Sequence[EngineLedger] | None = None
        self._given: set[EngineLedger] = set()
        self._rows: Sequence[Candidate] = ()

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """The request's `prefill` becomes what the chosen engine has to compute.

        Up to 16 engines all are looked at; of more, some that have most of the prompt and some that are drawn.
        """
        if ledgers is not self._of:
            self._of, self._given = ledgers, set(ledgers)
            self._map.forget_all_but(self._given)
        self._turn = turn = self._turn + 1
        if not turn % LOOK_EVERY:
            self._crowd.look(ledgers)
        known, block_tokens = self._map, self._map.block_tokens
        blocks = query.prefix_blocks(block_tokens)
        holders: list[EngineLedger] = []
        if len(ledgers) > _SCAN:
            drawn = self._ring.draw(ledgers, _DRAWN)
            holders = [each for each in known.holders(blocks, _HOLDERS) if each in self._given and each not in drawn]
        else:
            start = turn % len(ledgers)
            drawn = [*ledgers[start:], *ledgers[:start]]
        estimates = [ledger.known or ledger.estimate() for ledger in drawn]
        hot = 2.0 * sum([estimate[0] for estimate in estimates]) / len(estimates) + _HOT_UNITS
        others, prefill = self._crowd.others, query.prefill
        rows: list[Candidate] = []
        self._rows = rows
        best, least, cached_by_best = drawn[0], math.inf, 0
        candidates = [*drawn, *holders]
        for ledger, hit in zip(candidates, known.hits(blocks, candidates), strict=True):
            estimate = ledger.known or ledger.estimate()
            work = estimate[0]
            cached = 0
            if hit and work <= hot:
                cached = hit * block_tokens
                if cached >= prefill:
                    cached = prefill - 1
            new = prefill - cached
            score = (work + new + others * estimate[5]) * (_FLOOR_SHARE + new / prefill) * estimate[1]
            rows.append((estimate, score, cached))
            if score < least:
                best, least, cached_by_best = ledger, score, cached
        known.add(blocks, best)
        query.prefill = prefill - cached_by_best
        return best

    def reasons(self) -> Sequence[Candidate]:
        """What the last choice was made by."""
        return self._rows


@final
class PrefixMap:
    """Which engine probably has which blocks: those of the prompts it got, the least recently used forgotten first."""

    def __init__(self, block_tokens: int, cache_tokens: int | None) -> None:
        self.block_tokens = block_tokens
        self._cache_tokens = cache_tokens
        self._blocks: dict[EngineLedger, OrderedDict[int, None]] = {}
        self._holders: dict[int, dict[EngineLedger, None]] = {}
        """The same by block."""

    def hits(self, blocks: Sequence[int], ledgers: Sequence[EngineLedger]) -> list[int]:
        """How many leading blocks each engine has."""
        if not blocks:
            return [0] * len(ledgers)
        counts: list[int] = []
        first, wanted, of = blocks[0], set(blocks), self._blocks
        for ledger in ledgers:
            known = of.get(ledger)
            if not known or first not in known:
                counts.append(0)
            elif known.keys() >= wanted:  # the common case of a prompt that goes on, several times faster than block by block
                counts.append(len(blocks))
            else:
                counts.append(next(count for count, block in enumerate(blocks) if block not in known))
        return counts

    def holders(self, blocks: Sequence[int], limit: int) -> list[EngineLedger]:
        """Some of the engines that have the longest beginning that anyone has."""
        deepest: dict[EngineLedger, None] | None = None
        for block in blocks:
            holders = self._holders.get(block)
            if holders is None:
                break
            deepest = holders
        return [] if deepest is None else list(itertools.islice(deepest, limit))

    def add(self, blocks: Sequence[int], ledger: EngineLedger) -> None:
        """The engine gets a prompt with these blocks."""
        if not blocks:
            return
        known = self._blocks.get(ledger)
        if known is None:
            known = self._blocks[ledger] = OrderedDict()
        by_block = self._holders
        for block in blocks:
            if block in known:
                known.move_to_end(block)
            else:
                known[block] = None
                by_block.setdefault(block, {})[ledger] = None
        limit = (self._cache_tokens or ledger.kv_capacity or _UNKNOWN_CACHE_TOKENS) // self.block_tokens
        while len(known) > limit:
            self._let_go(known.popitem(last=False)[0], ledger)

    def forget_all_but(self, ledgers: set[EngineLedger]) -> None:
        """Engines that are gone; others may only have no room now, so as many as are there are kept, the first known forgotten first."""
        missing = [ledger for ledger in self._blocks if ledger not in ledgers]
        for ledger in missing[: max(0, len(missing) - len(ledgers))]:
            for block in self._blocks.pop(ledger):
                self._let_go(block, ledger)

    def _let_go(self, block: int, ledger: EngineLedger) -> None:
        holders = self._holders[block]
        del holders[ledger]
        if not holders:
            del self._holders[block]
