"""One sequence: a request's tokens and how far its KV cache has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from raycore.engines.torch.blocks import ROOT_DIGEST, chain_digest


@dataclass(slots=True, eq=False)
class Sequence:
    """What the scheduler knows of a request; owned by it.

    `tokens`: prompt, delivered and generated tokens; a prompt of embeddings stands as zeros. `computed`: how many of them have keys and
    values in `blocks`.
    """

    handle: int
    tokens: list[int]
    prompt_tokens: int
    priority: int = 0
    arrival: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    """Prompt tokens that were found in the cache when the sequence was first admitted."""
    was_admitted: bool = False
    reads_cache: bool = True
    """Whether prefixes that others computed may be used."""
    fills_cache: bool = True
    """Whether others may find what it computes: not where `tokens` do not name its prompt."""
    wants_prompt_logprobs: bool = False
    """Whether logits are due for every token of the prompt."""
    embeds: Any = None
    """The prompt as a tensor [prompt_tokens, hidden] of the model's dtype and device, where it is no token ids."""
    published_blocks: int = 0
    namespace: bytes = ROOT_DIGEST
    """What its first block chains to: keys and values under an adapter are no one else's."""
    _digests: list[bytes] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the lower priority number, then who came first."""
        return self.priority, self.arrival

    @property
    def pending(self) -> int:
        """Tokens that are known and not computed; 1 for a sequence that decodes."""
        return len(self.tokens) - self.computed

    @property
    def outputs(self) -> int:
        """Output tokens so far, delivered ones included: the position of the next token."""
        return len(self.tokens) - self.prompt_tokens

    def digests(self, count: int, block_size: int) -> list[bytes]:
        """Names of the first `count` full blocks."""
        while len(self._digests) < count:
            index = len(self._digests)
            parent = self._digests[-1] if index else self.namespace
            self._digests.append(chain_digest(parent, self.tokens[index * block_size : (index + 1) * block_size]))
        return self._digests[:count]

    def forget_cache(self) -> list[int]:
        """Give up the blocks: everything must be computed again."""
        blocks, self.blocks = self.blocks, []
        self.computed = self.published_blocks = 0
        return blocks
