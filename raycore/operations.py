"""The utility operations, as data: names, argument structs, result types, fan-out, deadlines.

The set is that of the reference's engine-core client; a method object is made from each row (`raycore/client/operations.py`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec


class FanOut(enum.StrEnum):
    """Which ranks a call goes to when the caller names none, and what comes back."""

    ALL = "all"
    """Every serving rank; the result is the list of their results; the first error is raised."""
    AGREE = "agree"
    """Every serving rank; equal results become one, unequal ones raise DisagreementError."""
    ANY = "any"
    """One serving rank answers for all: its result does not depend on the rank."""
    EVERY_TRUE = "every true"
    """Every serving rank; true when each answered true."""
    TOGETHER = "together"
    """Every serving rank in two phases: either all of them or none; one result."""


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the argument structs: by name, unknown names refused."""


class NoArguments(Arguments, frozen=True):
    """An operation without arguments."""


class PauseArguments(Arguments, frozen=True):
    """mode: what happens to running requests; clear_cache: also reset the prefix cache once idle."""

    mode: Literal["abort", "wait", "keep"] = "abort"
    clear_cache: bool = True


class PausePhaseArguments(Arguments, frozen=True):
    """One phase of a pause or resume over all ranks; `operation` is its client's name for it.

    prepare: hold every other pause off, and with mode "wait" all new requests; mode None is a resume. drain: answered when running
    requests have ended. commit: carry out the decision `stamp` (`2 * count + paused`). undo: forget the preparation. read: only report.
    """

    phase: Literal["prepare", "drain", "commit", "undo", "read"]
    operation: str = ""
    mode: Literal["abort", "wait", "keep"] | None = None
    stamp: Annotated[int, msgspec.Meta(ge=0)] = 0
    clear_cache: bool = False


class PauseReport(msgspec.Struct, frozen=True):
    """A rank's answer to a phase.

    `is_granted`: it was done; otherwise `client` is in the way, for longer when `is_draining`. `is_paused`: it does not take new requests.
    `stamp`: the last decision carried out here; `is_held`: the next one is prepared.
    """

    is_granted: bool
    is_paused: bool
    stamp: int
    is_held: bool = False
    is_draining: bool = False
    client: str = ""


class SleepArguments(Arguments, frozen=True):
    """level 0: only pause; 1: weights to host memory, KV dropped; 2: both dropped. mode: what happens to running requests."""

    level: Literal[0, 1, 2] = 1
    mode: Literal["abort", "wait", "keep"] = "abort"


class SleepPhaseArguments(Arguments, frozen=True):
    """Fall asleep on a rank that is paused already; resumes: whether waking up ends the pause; only_check: raise what would be wrong."""

    level: Literal[0, 1, 2]
    resumes: bool = False
    only_check: bool = False


class WakeUpArguments(Arguments, frozen=True):
    """tags: what to bring back; None is everything."""

    tags: list[Literal["weights", "kv_cache"]] | None = None


class WakeReport(msgspec.Struct, frozen=True):
    """A rank's answer to a wake-up: whether it is awake, whether it was before (`refusal` says so), and whether the sleep had paused it."""

    is_awake: bool
    resumes: bool = False
    refusal: str = ""


class ProfileArguments(Arguments, frozen=True):
    """start or stop a profile; prefix: of the trace's file name, which also has rank and process; directory: on each rank's node.

    delay_steps: begin after so many; max_steps: stop by itself after so many (0: 10,000).
    """

    start: bool = True
    prefix: str | None = None
    delay_steps: int = 0
    max_steps: int = 0
    directory: str | None = None


class ResetPrefixCacheArguments(Arguments, frozen=True):
    """reset_running_requests: preempt what runs, so that all of the cache can go."""

    reset_running_requests: bool = False
    reset_connector: bool = False


class AddLoraArguments(Arguments, frozen=True):
    """An adapter in a local peft directory."""

    lora_id: int
    name: str
    path: str


class LoraIdArguments(Arguments, frozen=True):
    """One loaded adapter."""

    lora_id: int


class SaveShardedStateArguments(Arguments, frozen=True):
    """path: a new directory, perhaps with {rank}; pattern: each file's name, with {part} and perhaps {rank}; max_size: bytes of a file."""

    path: str
    pattern: str | None = None
    max_size: int | None = None


class CollectiveRpcArguments(Arguments, frozen=True):
    """A method of the engine's `rpc_methods` by name, or, where the pool allows pickle, a function of the engine: `f(engine, *args)`.

    `pickled`: that function; the client fills it in.
    """

    method: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    pickled: bytes = b""


class WeightVersionArguments(Arguments, frozen=True):
    """The version to report for the weights from now on."""

    version: str


class Operation(msgspec.Struct, frozen=True):
    """One row: what a call of this name takes, gives and costs."""

    name: str
    arguments: type[Arguments]
    result: Any
    fan_out: FanOut
    summary: str
    changes_engine: bool = False
    """Belongs in the pool-state log, so that a joiner gets it too (planned with scaling)."""
    by_core: bool = False
    """Done by the engine core itself; otherwise by the engine's `utilities()`."""
    timeout_s: float | None = None
    """Default deadline; None: `Timeouts.call_s`."""
    refused_in_process: Callable[[Arguments], str | None] | None = None
    """Why the call cannot work where the engine steps in the caller's thread; None: it can."""


def _wait_needs_a_second_thread(arguments: Arguments) -> str | None:
    if isinstance(arguments, (PauseArguments, SleepArguments)) and arguments.mode == "wait":
        return "mode 'wait' needs someone to step the engine while the caller waits; use 'keep' or 'abort' in process"
    return None


TABLE: tuple[Operation, ...] = (
    Operation("get_supported_tasks", NoArguments, tuple[str, ...], FanOut.AGREE, "Tasks that the model supports.", by_core=True),
    Operation("dp_engines_running", NoArguments, bool, FanOut.ALL, "Whether a rank has work or steps.", by_core=True),
    Operation(
        "pause_scheduler",
        PauseArguments,
        None,
        FanOut.TOGETHER,
        "Stop stepping; complete when the engine is idle.",
        changes_engine=True,
        by_core=True,
        timeout_s=600.0,
        refused_in_process=_wait_needs_a_second_thread,
    ),
    Operation("resume_scheduler", NoArguments, None, FanOut.TOGETHER, "Step again after a pause.", changes_engine=True, by_core=True),
    Operation("is_scheduler_paused", NoArguments, bool, FanOut.AGREE, "Whether the scheduler is paused, or about to be.", by_core=True),
    Operation("execute_dummy_batch", NoArguments, None, FanOut.ALL, "Run one step with a dummy batch.", by_core=True),
    Operation(
        "collective_rpc", CollectiveRpcArguments, Any, FanOut.ALL, "Call a method of the engine by name on every rank.", by_core=True
    ),
    Operation(
        "profile", ProfileArguments, str, FanOut.ALL, "Start or stop a trace of the engine; returns its path or what goes on.", by_core=True
    ),
    Operation("reset_prefix_cache", ResetPrefixCacheArguments, bool, FanOut.EVERY_TRUE, "Forget cached prefixes.", changes_engine=True),
    Operation("reset_mm_cache", NoArguments, None, FanOut.ALL, "Forget cached multimodal inputs.", changes_engine=True),
    Operation("reset_encoder_cache", NoArguments, None, FanOut.ALL, "Forget cached encoder outputs.", changes_engine=True),
    Operation(
        "sleep",
        SleepArguments,
        None,
        FanOut.TOGETHER,
        "Pause, and free device memory.",
        changes_engine=True,
        by_core=True,
        timeout_s=600.0,
        refused_in_process=_wait_needs_a_second_thread,
    ),
    Operation(
        "wake_up",
        WakeUpArguments,
        bool,
        FanOut.TOGETHER,
        "Bring back what sleep freed; true once all is back and the engine goes on.",
        changes_engine=True,
        by_core=True,
        timeout_s=600.0,
    ),
    Operation("is_sleeping", NoArguments, bool, FanOut.AGREE, "Whether the engine sleeps.", by_core=True),
    Operation("add_lora", AddLoraArguments, bool, FanOut.EVERY_TRUE, "Load an adapter.", changes_engine=True, timeout_s=600.0),
    Operation("remove_lora", LoraIdArguments, bool, FanOut.EVERY_TRUE, "Unload an adapter.", changes_engine=True),
    Operation("list_loras", NoArguments, set[int], FanOut.AGREE, "Ids of the loaded adapters."),
    Operation("lora_names", NoArguments, dict[str, int], FanOut.AGREE, "The loaded adapters' names, with their ids."),
    Operation("pin_lora", LoraIdArguments, bool, FanOut.EVERY_TRUE, "Keep an adapter from eviction.", changes_engine=True),
    # The replicas of a pool hold the same weights, so one of them writes; `rank=` says which; `call_all` with {rank} in the path is all.
    Operation("save_sharded_state", SaveShardedStateArguments, None, FanOut.ANY, "Write the weights as shards.", timeout_s=3600.0),
    Operation("set_weight_version", WeightVersionArguments, None, FanOut.ALL, "Name the weights' version.", changes_engine=True),
    Operation("get_weight_version", NoArguments, str | None, FanOut.AGREE, "The weights' version."),
    Operation("compute_weight_checksums", NoArguments, dict[str, str], FanOut.ALL, "Checksums of each rank's weights.", timeout_s=600.0),
    Operation("release_kv_cache_memory", NoArguments, None, FanOut.ALL, "Free the KV cache of an idle engine.", changes_engine=True),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in TABLE}

PAUSE_PHASE = Operation("pause_phase", PausePhaseArguments, PauseReport, FanOut.ALL, "A phase of a pause over all ranks.", by_core=True)
"""What a client's pause over all ranks is made of; no caller names it."""

SLEEP_PHASE = Operation(
    "sleep_phase", SleepPhaseArguments, None, FanOut.ALL, "A rank's part of a sleep of all.", by_core=True, timeout_s=600.0
)
WAKE_PHASE = Operation("wake_phase", WakeUpArguments, WakeReport, FanOut.ALL, "A rank's part of waking all.", by_core=True, timeout_s=600.0)

PHASES: dict[str, Operation] = {phase.name: phase for phase in (PAUSE_PHASE, SLEEP_PHASE, WAKE_PHASE)}
"""Understood by engine cores beside the table."""
