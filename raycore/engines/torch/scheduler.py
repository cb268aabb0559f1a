"""What each step computes: continuous batching with chunked prefill, priorities and preemption. Pure; no tensors."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from raycore.engines.torch.blocks import BlockPool
from raycore.engines.torch.sequence import Sequence

PROMPT_LOGIT_ROWS = 256
"""How many rows of logits a step may hold for prompt tokens' log probabilities: a prompt's [tokens, vocabulary] in float32 at once would be
gigabytes, so such prompts go in smaller chunks."""
DEFERRALS = 64
"""How many waiting sequences a step passes over at most."""


@dataclass(slots=True, frozen=True)
class Chunk:
    """Tokens `start` to `start + length` of a sequence, computed in this step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def is_last(self) -> bool:
        """Whether the step ends with logits for this sequence's next token."""
        return self.start + self.length == len(self.sequence.tokens)

    @property
    def has_embeds(self) -> bool:
        """Whether some of it is a prompt that is no token ids."""
        return self.sequence.embeds is not None and self.start < self.sequence.prompt_tokens

    @property
    def prompt_logits(self) -> int:
        """How many of its positions, from the first, must give logits because the prompt's next token's log probability is due."""
        sequence = self.sequence
        if not sequence.wants_prompt_logprobs:
            return 0
        return max(0, min(self.start + self.length, sequence.prompt_tokens - 1) - self.start)


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the engine started."""

    prefilled_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Holds every sequence of the engine, waiting or running, and picks the next step's work.

    Decodes go first, since each is one token that somebody waits for; what is left of the token budget goes to chunks of prompts, in order.
    A sequence is admitted only when blocks for all its known tokens are free, so that admissions never preempt; a decode that
    finds no block preempts the last sequence in order, which computes its tokens again later (cheaper than swapping for the
    short contexts a small cache holds, and the prefix cache often still has them). A sequence that finds most of what it needs being
    computed by another just now (the answers of one request) waits until it is in the prefix cache, so that it is computed once.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, max_batch_tokens: int, max_sequences: int) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self._block_size = block_size
        self._budget = max_batch_tokens
        self._max_sequences = max_sequences
        self._sequences: dict[int, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._waiting_tokens = 0
        self._arrivals = 0
        self._logit_rows_left = PROMPT_LOGIT_ROWS
        self._coming: dict[bytes, Sequence] = {}
        """Digests of full blocks that a running sequence will have computed soon."""

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, handle: int) -> bool:
        return handle in self._sequences

    @property
    def running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that hold none."""
        return len(self._waiting)

    @property
    def prefill_tokens_waiting(self) -> int:
        """Known tokens still to compute before each sequence's next token."""
        return self._waiting_tokens + sum(s.pending for s in self._running if s.pending > 1)

    @property
    def kv_tokens_used(self) -> int:
        """Tokens' worth of blocks that sequences hold."""
        return self.pool.held * self._block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that this many tokens take."""
        return -(-tokens // self._block_size)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        assert sequence.handle not in self._sequences  # noqa: S101
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._sequences[sequence.handle] = sequence
        self._wait(sequence)

    def remove(self, handle: int, *, discard: bool = False) -> Sequence | None:
        """Forget a sequence and free its blocks; with `discard`, also what they hold. Unknown handles are ignored."""
        sequence = self._sequences.pop(handle, None)
        if sequence is None:
            return None
        if sequence in self._running:
            self._running.remove(sequence)
            self._withdraw(sequence)
            if discard:
                self.pool.discard(sequence.blocks)
            self.pool.release(sequence.forget_cache())
        else:
            self._waiting.remove(sequence)
            self._waiting_tokens -= len(sequence.tokens)
        return sequence

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, decodes first; every sequence at most once."""
        decodes = self._schedule_decodes()
        chunks = [Chunk(s, s.computed, 1) for s in decodes]
        budget = self._budget - len(chunks)
        self._logit_rows_left = PROMPT_LOGIT_ROWS
        for sequence in self._running:
            if sequence.pending > 1 and budget > 0 and self._has_logit_rows(sequence):
                chunks.append(self._chunk(sequence, budget))
                budget -= chunks[-1].length
        deferred = 0
        while budget > 0 and deferred < min(len(self._waiting), DEFERRALS) and len(self._running) < self._max_sequences:
            sequence = self._waiting[deferred]
            if self._is_being_computed(sequence):
                deferred += 1
                continue
            if not self._has_logit_rows(sequence) or not self._admit(sequence):
                break
            chunks.append(self._chunk(sequence, budget))
            budget -= chunks[-1].length
        return chunks

    def computed(self, chunks: Iterable[Chunk]) -> None:
        """Note that these chunks have keys and values now; their full blocks can be found by others from here on."""
        for chunk in chunks:
            sequence = chunk.sequence
            self.stats.prefilled_tokens += chunk.length if chunk.length > 1 or chunk.start < sequence.prompt_tokens else 0
            sequence.computed = chunk.start + chunk.length
            if self.pool.caching and sequence.fills_cache:
                self._publish_blocks(sequence)

    def preempt_all(self) -> None:
        """Send every running sequence back to waiting, to compute its tokens again."""
        while self._running:
            self._preempt(self._running[-1])

    def check_invariants(self) -> None:
        """Assert that lists, counters and block tables agree."""
        assert len(self._sequences) == len(self._running) + len(self._waiting)  # noqa: S101
        assert self._running == sorted(self._running, key=lambda s: s.order)  # noqa: S101
        assert self._waiting == sorted(self._waiting, key=lambda s: s.order)  # noqa: S101
        assert self._waiting_tokens == sum(len(s.tokens) for s in self._waiting)  # noqa: S101
        assert not any(s.blocks or s.computed for s in self._waiting)  # noqa: S101
        for sequence in self._running:
            assert sequence.computed <= len(sequence.blocks) * self._block_size  # noqa: S101
        assert all(sequence in self._running for sequence in self._coming.values())  # noqa: S101
        self.pool.check_invariants(s.blocks for s in self._running)

    def _publish_blocks(self, sequence: Sequence) -> None:
        full = sequence.computed // self._block_size
        if full > sequence.published_blocks:
            digests = sequence.digests(full, self._block_size)
            for index in range(sequence.published_blocks, full):
                self.pool.publish(sequence.blocks[index], digests[index])
                self._coming.pop(digests[index], None)
            sequence.published_blocks = full

    def _schedule_decodes(self) -> list[Sequence]:
        decodes: list[Sequence] = []
        for sequence in list(self._running):
            if sequence.pending != 1 or not sequence.blocks:
                continue
            if self._grow(sequence):
                decodes.append(sequence)
        return decodes

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the sequence's last token; False when it had to be preempted itself.

        Victims come from the end of the order and sequences grow from its front, so none that is scheduled already loses its blocks.
        """
        while len(sequence.blocks) * self._block_size < len(sequence.tokens):
            block = self.pool.allocate(1)
            if block is not None:
                sequence.blocks += block
                continue
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _admit(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to running if all its known tokens find room."""
        shared = self.pool.find(self._reusable(sequence))
        wanted = self.blocks_for(len(sequence.tokens)) - len(shared)
        # One block of slack per running sequence: else the next sequence that grows preempts what was just admitted.
        if wanted + len(self._running) > self.pool.available_without(shared):
            return False
        self.pool.share(shared)
        sequence.blocks = shared + (self.pool.allocate(wanted) or [])
        sequence.computed = len(shared) * self._block_size
        sequence.published_blocks = len(shared)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.cached_tokens = sequence.computed
        if self.pool.caching:
            self.stats.prefix_query_tokens += len(sequence.tokens)
        self.stats.prefix_hit_tokens += sequence.computed
        self._waiting.remove(sequence)
        if self.pool.caching and sequence.fills_cache:
            full = len(sequence.tokens) // self._block_size
            for digest in sequence.digests(full, self._block_size)[len(shared) :]:
                self._coming.setdefault(digest, sequence)
        self._waiting_tokens -= len(sequence.tokens)
        insort(self._running, sequence, key=lambda s: s.order)
        return True

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Digests of the full blocks that it may take from others."""
        if not self.pool.caching or not sequence.reads_cache:
            return []
        # The last token is always computed: its logits are what the step is for.
        return sequence.digests((len(sequence.tokens) - 1) // self._block_size, self._block_size)

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether half or more of what it would have to compute is on its way into the cache."""
        if not self._coming:
            return False
        digests = self._reusable(sequence)
        found = len(self.pool.find(digests))
        coming = 0
        while found + coming < len(digests) and digests[found + coming] in self._coming:
            coming += 1
        return coming > 0 and 2 * coming * self._block_size >= len(sequence.tokens) - found * self._block_size

    def _withdraw(self, sequence: Sequence) -> None:
        """It leaves: what it has not computed is not on its way any more."""
        for digest in [digest for digest, owner in self._coming.items() if owner is sequence]:
            del self._coming[digest]

    def _has_logit_rows(self, sequence: Sequence) -> bool:
        return self._logit_rows_left > 0 or not sequence.wants_prompt_logprobs

    def _chunk(self, sequence: Sequence, budget: int) -> Chunk:
        length = min(sequence.pending, budget)
        if not sequence.wants_prompt_logprobs:
            return Chunk(sequence, sequence.computed, length)
        chunk = Chunk(sequence, sequence.computed, min(length, self._logit_rows_left))
        self._logit_rows_left -= chunk.prompt_logits
        return chunk

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._withdraw(sequence)
        self.pool.release(sequence.forget_cache())
        self.stats.preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=lambda s: s.order)
        self._waiting_tokens += len(sequence.tokens)
