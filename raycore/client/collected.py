"""The outputs of one answer as one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from raycore.client.journal import RequestOutput
from raycore.errors import RaycoreError


def collected(outputs: Sequence[RequestOutput]) -> RequestOutput:
    """All tokens, text and log probabilities, and the end of the last. RaycoreError where there is none."""
    if not outputs:
        msg = "the stream was read already"
        raise RaycoreError(msg)
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    return msgspec.structs.replace(
        last,
        token_ids=[token for output in outputs for token in output.token_ids],
        text="".join(output.text for output in outputs),
        logprobs=None if last.logprobs is None else [entry for output in outputs for entry in output.logprobs or ()],
        prompt_logprobs=next((output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None), None),
    )
