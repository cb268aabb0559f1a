"""A load generator's client: sends a share of a trace at its times, whatever becomes of it (open loop), and notes when what came."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from array import array
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from raycore.client.client import EngineCoreClient
from raycore.client.journal import RequestOutput
from raycore.errors import RaycoreError
from raycore.sampling import SamplingParams
from raycore.traces import BLOCK_TOKENS, TraceRequest

_BLOCKS_KEPT = 4096
Shot = tuple[int, TraceRequest]
"""A request of the trace and its place in it, which decides its prompt where the trace tells no blocks."""


class LoadRecord(msgspec.Struct):
    """What became of one request; times in seconds. Outputs that came together count as one arrival."""

    index: int
    prompt_tokens: int
    output_tokens: int
    """Wanted."""
    late_s: float = 0.0
    """How long after its time it was sent."""
    first_s: float = -1.0
    """First token, from the time at which it should have been sent."""
    last_s: float = -1.0
    got_tokens: int = 0
    first_tokens: int = 0
    """How many came first."""
    rank: int = -1
    replayed: bool = False
    finish_reason: str | None = None
    error: str = ""
    """Why it was lost."""

    @property
    def is_complete(self) -> bool:
        """Whether all that was wanted has come."""
        return not self.error and self.finish_reason is not None and self.got_tokens == self.output_tokens


class LoadShare(msgspec.Struct):
    """One client's part of a replay."""

    records: list[LoadRecord]
    gaps: bytes
    """float32 column: seconds between two arrivals of one request's tokens, all requests together."""


class LoadClient:
    """Replays shots through a client; use it once. Prompts that the engines' context does not take with their output are cut."""

    def __init__(self, client: EngineCoreClient, *, drain_limit_s: float) -> None:
        self._client = client
        self._drain_limit_s = drain_limit_s
        """How long after the last arrival a request may still be on its way before it is lost."""
        self._running: dict[str, tuple[LoadRecord, float]] = {}
        self._records: list[LoadRecord] = []
        self._gaps = array("f")
        self._zero_s = 0.0
        self._drained: asyncio.Future[None] | None = None
        """Set once everything is sent and something is on its way."""

    async def replay(self, shots: Sequence[Shot], begin_at_s: float) -> LoadShare:
        """Send every shot at `begin_at_s` (`time.time()`) plus its arrival; returns when all have ended or the limit is over."""
        self._zero_s = time.perf_counter() + begin_at_s - time.time()
        reading = asyncio.create_task(self._read())
        try:
            for index, request in shots:
                due_s = self._zero_s + request.arrival_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                await self._send(index, request, due_s)
            if self._running:
                self._drained = asyncio.get_running_loop().create_future()
                await asyncio.wait([self._drained], timeout=self._drain_limit_s)
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        for record, _ in self._running.values():
            record.error = f"not done {self._drain_limit_s:g} s after the last arrival"
        await self._client.abort_requests(list(self._running))
        return LoadShare(self._records, self._gaps.tobytes())

    async def _send(self, index: int, request: TraceRequest, due_s: float) -> None:
        info = self._client.info
        output_tokens = min(request.output_tokens, info.max_model_len - 1)
        prompt_tokens = min(request.prompt_tokens, info.max_model_len - output_tokens)
        prompt = make_prompt(index, request, info.vocab_size)[:prompt_tokens]
        sampling = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        record = LoadRecord(index, prompt_tokens, output_tokens, late_s=time.perf_counter() - due_s)
        self._records.append(record)
        try:
            request_id = await self._client.add_request(prompt, sampling, detokenize=False)
        except RaycoreError as error:
            record.error = type(error).__name__
        else:
            self._running[request_id] = (record, due_s)

    async def _read(self) -> None:
        while True:
            outputs = await self._client.outputs()
            now_s = time.perf_counter()
            for output in outputs:
                self._take(output, now_s)

    def _take(self, output: RequestOutput, now_s: float) -> None:
        found = self._running.get(output.request_id)
        if found is None:
            return
        record, due_s = found
        count = len(output.token_ids)
        at_s = now_s - due_s
        if count:
            if record.first_s < 0:
                record.first_s, record.first_tokens = at_s, count
            else:
                self._gaps.append(at_s - record.last_s)
            record.last_s = at_s
            record.got_tokens += count
        record.rank = output.rank
        record.replayed = record.replayed or output.replayed
        if output.error is not None or output.finish_reason is not None:
            record.error = "" if output.error is None else type(output.error).__name__
            record.finish_reason = output.finish_reason
            del self._running[output.request_id]
            if not self._running and self._drained is not None:
                self._drained.set_result(None)


def make_prompt(index: int, request: TraceRequest, vocab_size: int) -> list[int]:
    """Token ids: equal blocks where the trace's are equal, otherwise nothing that another request begins with."""
    if not request.blocks:
        return np.random.default_rng(index).integers(1, vocab_size, request.prompt_tokens).tolist()
    tokens = [token for block in request.blocks for token in _block(block, vocab_size)][: request.prompt_tokens]
    if len(tokens) < request.prompt_tokens:
        tokens += np.random.default_rng(index).integers(1, vocab_size, request.prompt_tokens - len(tokens)).tolist()
    return tokens


@functools.lru_cache(_BLOCKS_KEPT)
def _block(block: int, vocab_size: int) -> list[int]:
    return np.random.default_rng((1, block)).integers(1, vocab_size, BLOCK_TOKENS).tolist()


def losses(records: Sequence[LoadRecord]) -> dict[str, int]:
    """How many were lost, by the reason."""
    reasons = (record.error or f"{record.got_tokens} of {record.output_tokens} tokens" for record in records if not record.is_complete)
    return dict(Counter(reasons))
