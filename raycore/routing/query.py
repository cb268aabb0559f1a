"""What a policy may know of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from raycore.ids import RequestId


class Query(Protocol):
    """A request that wants an engine."""

    prefill: int
    """Tokens that an engine has to compute before it can give the next one: prompt and what was delivered.

    A policy that knows of a cached prefix lowers it to what the engine that it chose has to compute.
    """

    @property
    def request_id(self) -> RequestId:
        """Unique among the client's requests in flight."""
        ...

    @property
    def max_tokens(self) -> int:
        """No more output than this."""
        ...

    def prefix_blocks(self, block_tokens: int) -> Sequence[int]:
        """One hash for each full block of the prompt, each over everything up to its end; made when first asked for."""
        ...


@dataclass(slots=True)
class RouteQuery:
    """A query by itself: for tests, benches and simulations."""

    request_id: RequestId
    prefill: int
    max_tokens: int = 1024
    blocks: Sequence[int] = ()

    def prefix_blocks(self, block_tokens: int) -> Sequence[int]:
        """Blocks as given, of whatever size."""
        del block_tokens
        return self.blocks


def hash_blocks(prompt: bytes, block_tokens: int, *, salt: object = None) -> list[int]:
    """The hashes of a uint32 column's full blocks, each over the whole prefix; they mean something in this process only."""
    size = 4 * block_tokens
    hashes: list[int] = []
    before = hash(salt)
    for at in range(0, len(prompt) - size + 1, size):
        before = hash((before, prompt[at : at + size]))
        hashes.append(before)
    return hashes
