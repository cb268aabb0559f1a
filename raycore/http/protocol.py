"""Request bodies: the fields of OpenAI's API that mean something here, and raycore's own. What is unknown is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field

from raycore.http.errors import bad_value, of_validation
from raycore.sampling import MAX_LOGPROBS, MAX_N, MAX_SEED, MAX_TOKENS, SamplingParams

MAX_PROMPTS = 2048
"""Prompts of one request; OpenAI's own bound of a list of inputs."""
MAX_STOPS = 64
"""Stop strings of one request: each token's text is compared with every one of them."""

TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
PositiveCount = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Prompts = (
    str
    | TokenIds
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)


class Body(pydantic.BaseModel):
    """Base of all bodies: no guessing at types, no unknown names."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(kind: type[AnyBody], body: bytes) -> AnyBody:
    """The body as this kind; an HttpError of status 400 names what is wrong."""
    try:
        return kind.model_validate_json(body or b"{}")
    except pydantic.ValidationError as error:
        raise of_validation(error) from error


class StreamOptions(Body):
    """`include_usage`: a last chunk without choices says how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ResponseFormat(Body):
    """Only plain text can be asked for."""

    type: str


class SamplingBody(Body):
    """What completions and chats have in common; None stands for the default everywhere, as in OpenAI's API."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: PositiveCount | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # raycore's own, with the names that other servers have for them
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    lora: str | None = None
    priority: int | None = None
    data_parallel_rank: Annotated[int, Field(ge=0)] | None = None
    return_token_ids: bool | None = None

    def sampling(self, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """The engine's parameters; the client checks their ranges. OpenAI's default temperature is 1, not greedy."""
        values: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "n": self.n,
            "stop": _stops(self.stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "min_tokens": self.min_tokens,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": None if self.logit_bias is None else _biases(self.logit_bias),
            "seed": None if self.seed is None else self.seed % (MAX_SEED + 1),
        }
        given = {name: value for name, value in values.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **given)

    def options(self, adapter: str | None) -> dict[str, Any]:
        """What `generate` takes besides prompt and sampling."""
        return {"lora": adapter, "priority": self.priority or 0, "data_parallel_rank": self.data_parallel_rank, "detokenize": True}

    def check_stream(self) -> None:
        """`stream_options` go with a stream."""
        if self.stream_options is not None and not self.stream:
            raise bad_value("stream_options is only allowed when stream is true", "stream_options")

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk about usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class Part(Body):
    """A part of a message. Other kinds than text are let in here, with whatever they hold, to be refused by their type."""

    model_config = pydantic.ConfigDict(extra="ignore")

    type: str
    text: str | None = None


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None

    def as_template_takes_it(self) -> dict[str, str]:
        """Role and text; "developer" is OpenAI's newer name of "system", which templates know."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        texts: list[str] = []
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise bad_value(f"this model takes text only, not a part of type {part.type!r}", "messages", "not_supported")
            texts.append(part.text)
        return {"role": role, "content": "".join(texts)}


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None
    priority: int | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or a chat through the model's template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class ScaleBody(Body):
    """POST /scale_elastic_ep. `wait` false: answered with 202 and the operation's id as soon as it has begun."""

    new_data_parallel_size: int
    wait: bool = True


class PauseBody(Body):
    """POST /pause."""

    mode: Literal["abort", "wait", "keep"] = "abort"
    clear_cache: bool = True


class SleepBody(Body):
    """POST /sleep."""

    level: Literal[0, 1, 2] = 1
    mode: Literal["abort", "wait", "keep"] = "abort"


class WakeUpBody(Body):
    """POST /wake_up; `tags` None: everything."""

    tags: list[Literal["weights", "kv_cache"]] | None = None


def _stops(stop: str | list[str] | None) -> tuple[str, ...] | None:
    if stop is None:
        return None
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _biases(given: dict[str, float]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for name, bias in given.items():
        if not name.isascii() or not name.isdigit() or len(name) > len(str(1 << 32)):
            raise bad_value(f"logit_bias maps token ids to numbers, and {name[:40]!r} is no token id", "logit_bias")
        biases[int(name)] = bias
    return biases
