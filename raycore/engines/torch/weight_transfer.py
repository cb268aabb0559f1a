"""The bytes of a list of tensors as one row, and how parts of it go from several senders to one joiner, portion by portion.

In each exchange every sender gives the joiner one portion with its checksum, packed into a buffer of its own, so that thousands of small
tensors cost no more exchanges than one large one.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch

from raycore.engines.torch.checksums import tensor_checksum
from raycore.errors import LockstepError
from raycore.groups import ProcessGroup
from raycore.weight_copies import Span, Spans, portions

_CHECKSUM_BYTES = 8


@final
class TensorRow:
    """Tensors of one device end to end."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self._parts = [_as_bytes(tensor) for tensor in tensors]
        self._ends: list[int] = []
        for part in self._parts:
            self._ends.append(part.numel() + (self._ends[-1] if self._ends else 0))

    def read(self, spans: Spans, out: torch.Tensor) -> None:
        """Copy these bytes to the beginning of `out` [≥ bytes of spans] uint8."""
        at = 0
        for part in self._pieces(spans):
            out[at : at + part.numel()].copy_(part)
            at += part.numel()

    def write(self, spans: Spans, came: torch.Tensor) -> None:
        """Put the beginning of `came` to these bytes."""
        at = 0
        for part in self._pieces(spans):
            part.copy_(came[at : at + part.numel()])
            at += part.numel()

    def _pieces(self, spans: Spans) -> Iterator[torch.Tensor]:
        for span in spans:
            begin = span.begin
            while begin < span.end:
                i = bisect.bisect_right(self._ends, begin)
                first = self._ends[i] - self._parts[i].numel()
                end = min(span.end, self._ends[i])
                yield self._parts[i][begin - first : end - first]
                begin = end


@torch.inference_mode()
def send_share(row: TensorRow, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int) -> int:
    """Send the share of this group rank to rank 0; the bytes. All members call this or `receive_shares` with the same shares."""
    plans = [portions(share, portion_bytes) for share in shares]
    own = plans[group.rank - 1]
    size = group.size
    sent = 0
    with _beside_steps(row.device):
        buffer = torch.empty(_room(own), dtype=torch.uint8, device=row.device)
        nothing = buffer[:0]
        for number in range(max(map(len, plans))):
            spans = own[number] if number < len(own) else ()
            count = _nbytes(spans)
            filled = buffer[:0]
            if count:
                row.read(spans, buffer)
                buffer[count : count + _CHECKSUM_BYTES].copy_(_checksum(buffer[:count]))
                filled = buffer[: count + _CHECKSUM_BYTES]
            group.all_to_all(nothing, filled, [0] * size, [filled.numel(), *[0] * (size - 1)])
            sent += count
    return sent


@torch.inference_mode()
def receive_shares(
    row: TensorRow, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int, on_come: Callable[[Span], None]
) -> None:
    """Take every share into its place. LockstepError for a portion that is not what its checksum says; it counts as not having come."""
    plans = [portions(share, portion_bytes) for share in shares]
    size = group.size
    with _beside_steps(row.device):
        buffer = torch.empty(sum(map(_room, plans)), dtype=torch.uint8, device=row.device)
        nothing = buffer[:0]
        for number in range(max(map(len, plans))):
            coming = [plan[number] if number < len(plan) else () for plan in plans]
            rows = [0, *(_nbytes(spans) + _CHECKSUM_BYTES if spans else 0 for spans in coming)]
            group.all_to_all(buffer[: sum(rows)], nothing, rows, [0] * size)
            at = 0
            for sender, (spans, count) in enumerate(zip(coming, rows[1:], strict=True), start=1):
                if not spans:
                    continue
                part = buffer[at : at + count]
                at += count
                if not torch.equal(_checksum(part[:-_CHECKSUM_BYTES]), part[-_CHECKSUM_BYTES:]):
                    raise LockstepError(f"weights did not arrive from group rank {sender} as they were sent")
                row.write(spans, part)
                for span in spans:
                    on_come(span)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _nbytes(spans: Spans) -> int:
    return sum(span.nbytes for span in spans)


def _room(plan: Sequence[Spans]) -> int:
    return max((_nbytes(spans) + _CHECKSUM_BYTES for spans in plan), default=0)


def _checksum(part: torch.Tensor) -> torch.Tensor:
    """[_CHECKSUM_BYTES] uint8."""
    return torch.tensor(list(bytes.fromhex(tensor_checksum(part))), dtype=torch.uint8, device=part.device)


@contextlib.contextmanager
def _beside_steps(device: torch.device) -> Iterator[None]:
    """On a GPU a stream of its own, so that copies and exchanges do not stand in the queue of the steps."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
