"""A step's output while it is put together."""

from __future__ import annotations

import numpy as np

from raycore.engine import Detail, FinishReason, LogprobRows, StepOutput, TokenArray


class StepOutcome:
    """Rows first, columns at the end."""

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.details: list[tuple[int, Detail]] = []
        self.logprobs: list[LogprobRows] = []
        self._tokens: list[int] = []
        self._finished: list[int] = []
        self._reasons = bytearray()

    def tokens_by_handle(self) -> dict[int, int]:
        """The tokens so far."""
        return dict(zip(self.handles, self._tokens, strict=True))

    def token(self, handle: int, token: int) -> None:
        """A request got a token."""
        self.handles.append(handle)
        self._tokens.append(token)

    def end(self, handle: int, reason: FinishReason, detail: Detail | None) -> None:
        """A request ended, after its token of this step."""
        self._finished.append(handle)
        self._reasons.append(reason)
        if detail is not None:
            self.details.append((handle, detail))

    def columns(self, handles: TokenArray) -> StepOutput:
        """The output, with the array that stands for `self.handles`."""
        tokens = np.array(self._tokens, dtype=np.uint32)
        if not self._finished and not self.details:
            return StepOutput(handles, tokens, logprobs=self.logprobs)
        finished = np.array(self._finished, dtype=np.uint32)
        return StepOutput(handles, tokens, None, finished, bytes(self._reasons), self.details, self.logprobs)
