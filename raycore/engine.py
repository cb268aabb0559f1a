"""The Engine Protocol: the whole seam between an engine core and what does the work of a step."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from raycore.ids import Handle, RequestId
from raycore.sampling import SamplingParams

TokenArray = NDArray[np.uint32]
"""Token ids, handles and slots are uint32 columns everywhere."""

EMPTY: TokenArray = np.empty(0, dtype=np.uint32)


MAKE_TRACE = "make_trace"
MEMORY_STATS = "memory_stats"
"""The name among `rpc_methods` of what a status shows of an engine: bytes by name, dict[str, int]; cheap, asked every few seconds."""
KV_CACHE_STATS = "kv_cache_stats"
"""Likewise, of a cache: counts and rates by name, dict[str, int | float]; a status shows `prefix_hit_rate`."""
CHECK_INVARIANTS = "check_invariants"
SET_RANK = "set_rank"

Task = Literal["generate", "embed"]
GENERATE: Task = "generate"
EMBED: Task = "embed"


class FinishReason(enum.IntEnum):
    """Why a request ended; the byte in a step's `reasons` column."""

    STOP = 0
    """A stop string, a stop token or the end-of-sequence token."""
    LENGTH = 1
    """`max_tokens` or the model's context length."""
    ABORT = 2
    """The client, a pause in mode abort, or a shutdown."""
    ERROR = 3
    """The engine could not go on with this request; a detail record says why."""


class Activity(enum.StrEnum):
    """What a step thread may be doing when it is asked for its budget."""

    LOAD = "load"
    STEP = "step"
    CALL = "call"


class EngineInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a client must know of an engine to check a request at the door."""

    engine: str
    model: str
    vocab_size: int
    max_model_len: int
    """Prompt plus output tokens of one request, at most."""
    kv_tokens: int
    """Tokens that the KV cache holds, over all requests."""
    tasks: tuple[str, ...]
    """Supported tasks, e.g. ("generate",)."""
    eos_token_ids: tuple[int, ...] = ()
    gives_logprobs: bool = False
    """Whether requests may ask for log probabilities."""
    embedding_size: int = 0
    """The width of a prompt given as embeddings; 0: this engine takes token ids only."""
    sync_interval: int = 0
    """0: steps alone. k: in lockstep with the other ranks, which agree every k steps whether to go on (`docs/waves.md`)."""
    is_expert_parallel: bool = False
    """Whether each rank holds only some of the model's experts, so that none can go on without the others (`docs/moe.md`)."""


class EngineLoad(msgspec.Struct, frozen=True, array_like=True):
    """An engine's load at one moment; counts over all clients."""

    running: int = 0
    waiting: int = 0
    kv_tokens_used: int = 0
    prefill_tokens_waiting: int = 0


class EngineRequest(msgspec.Struct, frozen=True):
    """One request as an engine sees it.

    `prompt_token_ids`: uint32 array, shape [prompt_len], read-only; empty where `tensors` has `prompt_embeds`. `delivered`: tokens that
    the caller has already (a replay): they count towards `max_tokens` and positions, are never published again, and are treated as output
    for stops. `sampling.seed` is always resolved, `sampling.n` always 1. A request of task "embed" gives no tokens: it ends with reason
    STOP and a `Detail` that holds its vector.
    """

    handle: Handle
    request_id: RequestId
    prompt_token_ids: TokenArray
    sampling: SamplingParams
    delivered: TokenArray = EMPTY
    priority: int = 0
    tensors: dict[str, Any] = {}
    lora: str | int | None = None
    """Name or id of the adapter to run with; None: the model as it is."""
    task: Task = GENERATE


@dataclass(slots=True)
class LogprobRows:
    """Log probabilities of R tokens, natural logarithms under the model's own distribution; the rows of one handle are in token order.

    `handles`, `token_ids` [R] uint32. `logprobs` [R] float32 and `ranks` [R] uint32 of the tokens themselves; rank 1 is the likeliest.
    `widths` [R] uint32: how many of the likeliest each row names, in `top_ids` [sum of widths] uint32 and `top_logprobs` float32, best
    first.
    """

    handles: TokenArray
    token_ids: TokenArray
    logprobs: NDArray[np.float32]
    ranks: TokenArray
    widths: TokenArray
    top_ids: TokenArray
    top_logprobs: NDArray[np.float32]
    of_prompt: bool = False
    """Whether these are the prompt's tokens from the second on; they come once, with the first output token."""


@dataclass(slots=True)
class StepOutput:
    """What one step produced, as columns.

    `handles` [R] uint32: requests that got tokens; return the same array object while it is unchanged. `tokens` [sum of counts] uint32.
    `counts` [R] uint32, or None when every row has exactly one token. `finished` [F] uint32 handles that ended in this step (after their
    tokens of this
    step) and `reasons` one FinishReason byte each. `details`: sparse (handle, record): stop strings, errors. `logprobs`: one row for each
    token of the step whose request asked. After `finished` names a handle the engine has forgotten it.
    """

    handles: TokenArray = field(default_factory=lambda: EMPTY)
    tokens: TokenArray = field(default_factory=lambda: EMPTY)
    counts: TokenArray | None = None
    finished: TokenArray = field(default_factory=lambda: EMPTY)
    reasons: bytes = b""
    details: Sequence[tuple[int, Detail]] = ()
    logprobs: Sequence[LogprobRows] = ()
    prefilled: int = 0
    """Prompt tokens that the step computed; from it the pace of the engine is told."""


class Detail(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Rare facts about one request in one step."""

    stop_reason: int | str | None = None
    """The stop token id or stop string that ended the request."""
    error_type: str = ""
    error_message: str = ""
    prompt_tokens_cached: int = 0
    embedding: bytes = b""
    """The vector of an "embed" request: float32, little-endian."""


class RequestRefused(Exception):  # noqa: N818 -- an answer of the engine, not a fault
    """Raised by `Engine.add`: this request cannot be served; the text is for its caller."""


class Engine(Protocol):
    """Does the work of a step. Used from one thread only; nothing here may block on a client."""

    @property
    def info(self) -> EngineInfo:
        """Facts that do not change while the engine lives."""
        ...

    def add(self, request: EngineRequest) -> None:
        """Queue a request; raise RequestRefused when it can never be served."""
        ...

    def abort(self, handles: Sequence[int]) -> None:
        """Forget these requests at once, publish nothing more of them; unknown handles are ignored."""
        ...

    def step(self) -> StepOutput:
        """Do one step of work; called only while `has_work()`."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        ...

    def idle_step(self) -> None:
        """One step with a dummy batch (ranks in lockstep, warm-up)."""
        ...

    def load(self) -> EngineLoad:
        """The load now; cheap, called every step."""
        ...

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        """Operations of `raycore/operations.py` that this engine implements, by name; called with keyword arguments on the step thread.

        Beside them, under MAKE_TRACE, the maker of what `profile` records of this engine (`raycore/core/profiler.py`: `Trace`), and under
        CHECK_INVARIANTS a function that raises AssertionError when its tables disagree, which runs at idle where `debug_checks` is on;
        under SET_RANK what an engine that was made as a standby, without a rank, is told it by: `set_rank(rank=2)`.
        """
        ...

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        """What `collective_rpc` may call by name."""
        ...

    def budget_s(self, activity: Activity) -> float | None:
        """How long the activity about to start may take before the engine counts as hung; None: the pool's default."""
        ...

    def close(self) -> None:
        """Free everything; called once, also after a failed step."""
        ...
