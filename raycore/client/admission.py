"""The door: what a caller hands in becomes checked request records, or a typed error before anything is sent."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from raycore.client.journal import RequestRecord
from raycore.client.logprobs import LogprobJournal
from raycore.client.text import TextBuilder
from raycore.embeddings import PROMPT_EMBEDS, problem_with
from raycore.engine import EMBED, GENERATE, EngineInfo, Task
from raycore.errors import InvalidRequestError
from raycore.ids import RequestId
from raycore.sampling import MAX_TOKENS, SamplingParams, check_vocabulary, child_seed, is_utf8, validate_sampling
from raycore.tokenizer import Tokenizer

Prompt = str | Sequence[int]

MAX_REQUEST_ID_LENGTH = 256


class Ask(msgspec.Struct, frozen=True, gc=False):
    """What a caller asks for, as it was handed in.

    `prompt` None: it is the tensor `prompt_embeds`. `rank` None: the router chooses. `detokenize`: whether outputs carry text; None: where
    the prompt is text. `is_mailed`: outputs come through `outputs()`. `lora`: an adapter's name or id; only the engines know them.
    """

    prompt: Prompt | None
    sampling: SamplingParams | None = None
    request_id: str | None = None
    rank: int | None = None
    priority: int = 0
    tensors: dict[str, Any] | None = None
    detokenize: bool | None = None
    is_mailed: bool = False
    lora: str | int | None = None
    task: Task = GENERATE


class Door:
    """Checks requests against what the engines said of themselves."""

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, prefix: str) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._count = 0
        self._default = SamplingParams()
        self._last_given: SamplingParams | None = None
        self._last_checked = self._default
        self._needs_seed = False
        """Whether each request with `_last_checked` gets a seed of its own."""
        self._generates = GENERATE in info.tasks

    def admit(self, ask: Ask) -> Sequence[RequestRecord]:
        """The records of a request that an engine can serve, one for each of its `n` answers. InvalidRequestError otherwise."""
        request_id = ask.request_id
        if request_id is None:
            self._count += 1
            request_id = f"{self._prefix}-{self._count}"
        elif not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH or not is_utf8(request_id):
            msg = f"a request id is a string of 1 to {MAX_REQUEST_ID_LENGTH} characters"
            raise InvalidRequestError(msg)
        try:
            if ask.tensors is not None:
                _check_names(ask.tensors)
            if ask.lora is not None or ask.task != GENERATE or not self._generates:
                self._check_choice(ask)
            given = self._default if ask.sampling is None else ask.sampling
            params = self._last_checked if given is self._last_given and not self._needs_seed else self._checked(given)
            if ask.prompt is None or (ask.tensors is not None and PROMPT_EMBEDS in ask.tensors):
                column, tokens = b"", self._embedded_tokens(ask, params)
            else:
                ids = self._tokens(ask.prompt)
                column, tokens = ids.tobytes(), len(ids)
            self._check_fit(tokens, params, ask)
            if params.n > 1:
                return [self._child(request_id, index, column, tokens, params, ask) for index in range(params.n)]
            return (self._record(request_id, column, tokens, params, ask),)
        except InvalidRequestError as error:
            error.request_id = request_id
            raise

    def _record(self, request_id: str, column: bytes, tokens: int, params: SamplingParams, ask: Ask) -> RequestRecord:
        # by position, and without a call for each new type: this is once a request
        rank: Any = ask.rank
        name: Any = request_id
        record = RequestRecord(name, column, tokens, params, rank, ask.priority, ask.tensors, ask.lora, ask.task == EMBED)
        detokenize = ask.detokenize
        if detokenize or (detokenize is None and isinstance(ask.prompt, str)):
            if self._tokenizer is None:
                raise InvalidRequestError("text needs a tokenizer, and this pool's model has none here")
            record.text = TextBuilder(self._tokenizer, params.stop, () if params.ignore_eos else params.stop_token_ids)
            record.is_plain = False
        if params.logprobs is not None or params.prompt_logprobs is not None:
            record.logprobs = LogprobJournal(of_tokens=params.logprobs is not None, of_prompt=params.prompt_logprobs is not None)
            record.is_plain = False
        return record

    def _child(self, parent_id: str, index: int, column: bytes, tokens: int, params: SamplingParams, ask: Ask) -> RequestRecord:
        """Answer `index` of n: a request of its own. They share the prompt, so only the first tells the prompt's log probabilities."""
        assert params.seed is not None  # noqa: S101 -- n > 1 is sampled, and `_checked` drew a seed
        own = msgspec.structs.replace(
            params, n=1, seed=child_seed(params.seed, index), prompt_logprobs=None if index else params.prompt_logprobs
        )
        record = self._record(f"{parent_id}/{index}", column, tokens, own, ask)
        record.parent_id, record.index, record.is_plain = RequestId(parent_id), index, False
        return record

    def _checked(self, given: SamplingParams) -> SamplingParams:
        if given is not self._last_given:
            params = self._last_checked = self._validated(given)
            self._last_given, self._needs_seed = given, bool(params.temperature) and params.seed is None
        return msgspec.structs.replace(self._last_checked, seed=secrets.randbits(62)) if self._needs_seed else self._last_checked

    def _validated(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            msg = f"sampling must be SamplingParams, not {type(params).__name__}"
            raise InvalidRequestError(msg)
        validate_sampling(params)
        check_vocabulary(params, self._info.vocab_size)
        if not self._info.gives_logprobs:
            for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
                if value is not None:
                    raise InvalidRequestError(f"{name}: engine {self._info.engine!r} has no log probabilities")
        if isinstance(params.logit_bias, dict):  # a copy that its caller cannot change while the journal may still replay it
            return msgspec.structs.replace(params, logit_bias=tuple(params.logit_bias.items()))
        return params

    def _embedded_tokens(self, ask: Ask, params: SamplingParams) -> int:
        """How many tokens a prompt of embeddings has."""
        if ask.tensors is None or PROMPT_EMBEDS not in ask.tensors:
            raise InvalidRequestError(f"the prompt is None; give text, token ids, or the tensor {PROMPT_EMBEDS!r}")
        if ask.prompt is not None:
            raise InvalidRequestError(f"give a prompt or the tensor {PROMPT_EMBEDS!r}, not both; the prompt is None beside it")
        tensor = ask.tensors[PROMPT_EMBEDS]
        problem = problem_with(tensor, params, self._info)
        if problem is not None:
            raise InvalidRequestError(problem)
        return int(tensor.shape[0])

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

    def _check_choice(self, ask: Ask) -> None:
        lora, tasks = ask.lora, self._info.tasks
        if lora is not None and not _can_name_adapter(lora):
            msg = f"lora is the name or the id of a loaded adapter, not {lora!r:.200}"
            raise InvalidRequestError(msg)
        if ask.task not in tasks:
            msg = f"this pool's model supports {', '.join(tasks)}, not {ask.task}"
            raise InvalidRequestError(msg)
        if ask.task == EMBED and ask.tensors:
            raise InvalidRequestError("the prompt of an embedding is text or token ids; it takes no tensors")

    def _check_fit(self, tokens: int, params: SamplingParams, ask: Ask) -> None:
        priority = ask.priority
        if not isinstance(priority, int) or isinstance(priority, bool) or not -MAX_TOKENS <= priority <= MAX_TOKENS:
            msg = f"priority must be an int32, not {priority!r}"
            raise InvalidRequestError(msg)
        if ask.task == EMBED:
            if tokens > self._info.max_model_len:
                raise InvalidRequestError(f"the prompt has {tokens} tokens; the model takes at most {self._info.max_model_len}")
        elif tokens >= self._info.max_model_len:
            msg = f"the prompt has {tokens} tokens; with one output token the model's context takes at most {self._info.max_model_len}"
            raise InvalidRequestError(msg)
        if params.stop and self._tokenizer is None:
            msg = "stop strings need a tokenizer, and this pool's model has none here; use stop_token_ids"
            raise InvalidRequestError(msg)


def sort_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[bool, list[Prompt]]:
    """Whether this is one prompt, and the prompts. InvalidRequestError for an empty list, which is neither."""
    if isinstance(prompts, str):
        return True, [prompts]
    given = list(prompts)
    if not given:
        raise InvalidRequestError("there is no prompt to embed")
    if hasattr(given[0], "__len__"):
        return False, cast("list[Prompt]", given)
    return True, [cast("Sequence[int]", given)]


def _can_name_adapter(lora: object) -> bool:
    """A name that is text, or an id that a message can carry: an int64."""
    if isinstance(lora, str):
        return bool(lora) and is_utf8(lora)
    return isinstance(lora, int) and not isinstance(lora, bool) and lora != 0 and -(2**63) <= lora < 2**63


def _check_names(tensors: object) -> None:
    if not isinstance(tensors, dict):
        raise InvalidRequestError(f"tensors must be a dict of tensors by name, not {type(tensors).__name__}")
    for name in tensors:
        if not isinstance(name, str) or not is_utf8(name):
            raise InvalidRequestError(f"the name of a tensor must be text, not {name!r:.200}")
