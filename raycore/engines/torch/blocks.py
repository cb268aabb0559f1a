"""The pool of KV-cache blocks: who holds which, and which hold a prefix worth keeping. Pure; no tensors.

Block 0 is never handed out: padding in block tables and dummy steps point at it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

SCRATCH_BLOCK = 0
ROOT_DIGEST = b""
"""What the first block of every sequence chains to."""


def chain_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a full block: its tokens and everything before them. 128 bits, so that two prefixes never share by accident."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.uint32).tobytes(), digest_size=16).digest()


class BlockPool:
    """Allocates blocks, counts their holders, and finds computed prefixes.

    A block is free (never computed, or forgotten), held (one or more sequences), or cached (no holder, but named by a digest: it
    can be found again, and is taken for new use least recently used first).
    """

    def __init__(self, blocks: int, *, caching: bool = True) -> None:
        self.capacity = blocks
        self.caching = caching
        self._free: deque[int] = deque(range(1, blocks + 1))
        self._holders: Counter[int] = Counter()
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Blocks without a holder that have a digest, least recently used first."""
        self._by_digest: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free) + len(self._cached)

    @property
    def held(self) -> int:
        """Blocks with at least one holder."""
        return len(self._holders)

    def is_held(self, block: int) -> bool:
        """Whether some sequence holds this block."""
        return block in self._holders

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Blocks of the longest computed prefix of this chain; not held yet."""
        found: list[int] = []
        for digest in digests:
            block = self._by_digest.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def available_without(self, blocks: Iterable[int]) -> int:
        """Blocks that could still be allocated after these have been shared."""
        return self.available - sum(1 for block in blocks if block in self._cached)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to found blocks."""
        for block in blocks:
            self._cached.pop(block, None)
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Take this many blocks for one holder, or None and change nothing."""
        if count > self.available:
            return None
        taken: list[int] = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _none = self._cached.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each; the tail of a sequence becomes reusable before its head, which more others may share."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] > 0:
                continue
            del self._holders[block]
            if block in self._digest_of:
                self._cached[block] = None
            else:
                self._free.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Name a held block whose tokens are all computed, so that others find it; the first block of a name keeps it."""
        if self.caching and digest not in self._by_digest and block not in self._digest_of:
            self._by_digest[digest] = block
            self._digest_of[block] = digest

    def discard(self, blocks: Iterable[int]) -> None:
        """Forget the names of these blocks: what they hold must not be found again."""
        for block in blocks:
            self._forget(block)
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def reset(self) -> None:
        """Forget every name; holders keep their blocks."""
        self.discard(list(self._digest_of))

    def check_invariants(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Assert that every block is in exactly one state and held as often as these tables say."""
        held = Counter(block for table in tables for block in table)
        assert held == self._holders, f"tables hold {held}, the pool counts {self._holders}"  # noqa: S101
        parts = [set(self._free), set(self._cached), set(self._holders)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == self.capacity, "a block is lost or in two states"  # noqa: S101
        assert len(self._free) == len(parts[0]), "a block is free twice"  # noqa: S101
        assert SCRATCH_BLOCK not in set().union(*parts)  # noqa: S101
        assert {b: d for d, b in self._by_digest.items()} == self._digest_of  # noqa: S101
        assert parts[1] <= set(self._digest_of)  # noqa: S101
        assert not parts[0] & set(self._digest_of)  # noqa: S101

    def _forget(self, block: int) -> None:
        digest = self._digest_of.pop(block, None)
        if digest is not None:
            del self._by_digest[digest]
