"""Copies of weights that go from ranks that serve to one that joins: what is offered, asked for and missing. Pure, and no torch.

All tensors of a manifest end to end, in its order, are one row of bytes; a span is a part of it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from raycore.groups import ProcessGroup
from raycore.ids import EngineId
from raycore.membership import GroupAddress


class TensorFact(msgspec.Struct, frozen=True, array_like=True):
    """One tensor; `dtype` as the engine's library calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class WeightManifest(msgspec.Struct, frozen=True, array_like=True):
    """What a rank gives, in order, and what it has and does not give: of tensors with a row for each expert, the facts of one row."""

    tensors: tuple[TensorFact, ...]
    by_expert: tuple[TensorFact, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Of all that is given."""
        return sum(fact.nbytes for fact in self.tensors)

    @property
    def digest(self) -> str:
        """Tells manifests apart."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).hexdigest()


class WeightTerms(msgspec.Struct, frozen=True, array_like=True):
    """What names a copy: the manifest by its digest, and the pool's weight version."""

    digest: str
    version: str | None = None


class WeightOffer(msgspec.Struct, frozen=True):
    """All that a joiner needs to make room: the manifest, and what a model and its tokenizer are built from, as files in memory."""

    manifest: WeightManifest
    files: dict[str, bytes]
    task: str = ""
    version: str | None = None
    """The pool's weight version when it was offered."""

    @property
    def terms(self) -> WeightTerms:
        """On which it is given."""
        return WeightTerms(self.manifest.digest, self.version)


class Span(NamedTuple):
    """Bytes from `begin` to before `end`."""

    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many."""
        return self.end - self.begin


Spans = tuple[Span, ...]


class WeightRequest(msgspec.Struct, frozen=True):
    """What one peer is asked for. `shares[i]`: what group rank i + 1 sends; 0 is the joiner."""

    joiner: EngineId
    terms: WeightTerms
    address: GroupAddress
    group_rank: int
    shares: tuple[Spans, ...]
    portion_bytes: int


def dealt(missing: Spans, count: int) -> tuple[Spans, ...]:
    """The missing bytes in `count` parts that differ by a byte at most, each in order; a part may be empty."""
    total = sum(span.nbytes for span in missing)
    parts: list[Spans] = []
    for i in range(count):
        parts.append(_cut(missing, total * i // count, total * (i + 1) // count))
    return tuple(parts)


def portions(share: Spans, most_bytes: int) -> list[Spans]:
    """A share in pieces of at most so many bytes, in order."""
    total = sum(span.nbytes for span in share)
    return [_cut(share, begin, min(begin + most_bytes, total)) for begin in range(0, total, most_bytes)]


def without(missing: Spans, came: Spans) -> Spans:
    """What is missing when these have come."""
    left = list(missing)
    for gone in came:
        left = [
            piece
            for span in left
            for piece in (Span(span.begin, min(span.end, gone.begin)), Span(max(span.begin, gone.end), span.end))
            if piece.nbytes > 0
        ]
    return tuple(left)


def _cut(spans: Spans, begin: int, end: int) -> Spans:
    """Bytes `begin` to before `end` of spans laid end to end."""
    found: list[Span] = []
    at = 0
    for span in spans:
        first, last = max(begin - at, 0), min(end - at, span.nbytes)
        if first < last:
            found.append(Span(span.begin + first, span.begin + last))
        at += span.nbytes
    return tuple(found)


# -- who gives --------------------------------------------------------------------------------------------------------------


class LentWeights(Protocol):
    """The weights of one engine as they were lent: they stay allocated while somebody has this. Used on any one thread at a time."""

    @property
    def manifest(self) -> WeightManifest:
        """What there is."""
        ...

    @property
    def task(self) -> str:
        """What the model is loaded for."""
        ...

    def files(self) -> dict[str, bytes]:
        """What a model and its tokenizer are built from; never read from the checkpoint, which may be gone."""
        ...

    def give(self, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int) -> int:
        """Send the share of this group rank, in step with the others; the bytes sent. LockstepError when a member is lost."""
        ...


@runtime_checkable
class WeightGiver(Protocol):
    """What an engine may have beside `Engine`, so that a rank that joins need not read its weights from disk."""

    def lend_weights(self) -> LentWeights | None:
        """The weights as they are now; None where they cannot be given. On the step thread. EngineStateError while they are away."""
        ...


# -- who takes --------------------------------------------------------------------------------------------------------------


class WeightSink(Protocol):
    """Where a joiner has room for what a manifest names."""

    def receive(self, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int, on_come: Callable[[Span], None]) -> None:
        """Take all shares, telling each span once it is in its place. LockstepError when a member is lost or a portion came otherwise
        than it was sent."""
        ...


class WeightSource(Protocol):
    """The peers of an engine that is being made."""

    @property
    def or_disk(self) -> bool:
        """Whether what they have and did not give may be read from disk."""
        ...

    def offer(self) -> WeightOffer | None:
        """What they offer; None when nobody does. WeightCopyError where one of them failed that could have, and `or_disk` is not so."""
        ...

    def take(self, sink: WeightSink) -> None:
        """Have everything that was offered come into `sink`; WeightCopyError when no peer is left that gives it."""
        ...


class WeightPeer(Protocol):
    """One member, as the joiner reaches it. From any thread."""

    @property
    def engine(self) -> EngineId:
        """Who it is."""
        ...

    @property
    def host(self) -> str:
        """Which host it is on (`raycore/transport/endpoints.py: this_host`)."""
        ...

    def offer(self) -> concurrent.futures.Future[WeightOffer | None]:
        """Ask for its offer; None where its engine gives nothing."""
        ...

    def terms(self) -> concurrent.futures.Future[WeightTerms | None]:
        """Ask on which terms it would give now."""
        ...

    def give(self, request: WeightRequest) -> concurrent.futures.Future[int]:
        """Have it send; the bytes that it sent. LockstepError when another one was lost, anything else is its own fault."""
        ...
