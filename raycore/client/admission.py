"""The door: what a caller hands in becomes a checked request record, or a typed error before anything is sent."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from raycore.client.journal import RequestRecord
from raycore.client.text import TextBuilder
from raycore.engine import EngineInfo
from raycore.errors import InvalidRequestError
from raycore.ids import Rank, RequestId
from raycore.sampling import MAX_TOKENS, SamplingParams, is_utf8, validate_sampling
from raycore.tokenizer import Tokenizer

Prompt = str | Sequence[int]

MAX_REQUEST_ID_LENGTH = 256


class Door:
    """Checks requests against what the engines said of themselves."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, prefix: str) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._count = 0
        self._last_checked: SamplingParams | None = None
        self._default = SamplingParams()

    def admit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        request_id: str | None,
        rank: int | None,
        priority: int,
        tensors: dict[str, Any] | None,
        *,
        detokenize: bool | None = None,
    ) -> RequestRecord:
        """The record of a request that an engine can serve. InvalidRequestError otherwise.

        `detokenize`: whether outputs carry text; None: where the prompt is text.
        """
        if request_id is None:
            self._count += 1
            request_id = f"{self._prefix}-{self._count}"
        elif not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH or not is_utf8(request_id):
            msg = f"a request id is a string of 1 to {MAX_REQUEST_ID_LENGTH} characters"
            raise InvalidRequestError(msg)
        try:
            params = self._checked(sampling)
            column = self._tokens(prompt)
            self._check_fit(column, params, priority)
        except InvalidRequestError as error:
            error.request_id = request_id
            raise
        pinned = None if rank is None else Rank(rank)
        record = RequestRecord(
            RequestId(request_id), column.tobytes(), len(column), params, pinned_rank=pinned, priority=priority, tensors=tensors
        )
        if detokenize or (detokenize is None and isinstance(prompt, str)):
            if self._tokenizer is None:
                msg = "text needs a tokenizer, and this pool's model has none here"
                raise InvalidRequestError(msg, request_id=request_id)
            record.text = TextBuilder(self._tokenizer, params.stop, () if params.ignore_eos else params.stop_token_ids)
        return record

    def _checked(self, sampling: SamplingParams | None) -> SamplingParams:
        params = self._default if sampling is None else sampling
        if params is not self._last_checked:
            if not isinstance(params, SamplingParams):
                msg = f"sampling must be SamplingParams, not {type(params).__name__}"
                raise InvalidRequestError(msg)
            validate_sampling(params)
            self._last_checked = params
        if params.temperature and params.seed is None:
            return msgspec.structs.replace(params, seed=secrets.randbits(62))
        return params

    def _tokens(self, prompt: Prompt) -> array[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                msg = "this client has no tokenizer for the pool's model; give the prompt as token ids"
                raise InvalidRequestError(msg)
            if not is_utf8(prompt):
                msg = "the prompt is not valid Unicode text: it has lone surrogates"
                raise InvalidRequestError(msg)
            prompt = self._tokenizer.encode(prompt)
        try:
            # array() would read bytes as raw memory; a list of them as numbers is what its caller means, if anything
            column = array("I", list(prompt) if isinstance(prompt, (bytes, bytearray, memoryview)) else prompt)
        except (TypeError, OverflowError, ValueError) as error:
            msg = f"a prompt is text or a sequence of token ids from 0 to {self._info.vocab_size - 1}: {error}"
            raise InvalidRequestError(msg) from error
        if not column:
            msg = "the prompt is empty"
            raise InvalidRequestError(msg)
        largest = max(column)
        if largest >= self._info.vocab_size:
            msg = f"token id {largest} is out of range; the vocabulary has {self._info.vocab_size} tokens"
            raise InvalidRequestError(msg)
        return column

    def _check_fit(self, column: array[int], params: SamplingParams, priority: int) -> None:
        if not isinstance(priority, int) or not -MAX_TOKENS <= priority <= MAX_TOKENS:
            msg = f"priority must be an int32, not {priority!r}"
            raise InvalidRequestError(msg)
        if len(column) >= self._info.max_model_len:
            msg = f"the prompt has {len(column)} tokens; with one output token the model's context takes at most {self._info.max_model_len}"
            raise InvalidRequestError(msg)
        if params.stop and self._tokenizer is None:
            msg = "stop strings need a tokenizer, and this pool's model has none here; use stop_token_ids"
            raise InvalidRequestError(msg)
