"""The pool's configuration: frozen, parsed once; inner code gets the small struct it needs."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import pydantic

from raycore.errors import ConfigurationError

POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")
"""Pool names appear in actor names, socket paths (107 bytes at most) and shared-memory file names."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Every wait of the system has its limit here; seconds."""

    capacity_s: float = 60.0
    """Resources that other work holds becoming free, and placement groups becoming ready."""
    new_nodes_s: float = 0.0
    """Nodes coming for ranks that the cluster has no room for: their groups are pending meanwhile, for which Ray's autoscaler adds nodes.

    0: nothing is asked of it, and what can never fit the cluster as it is, is refused at once.
    """
    engine_start_s: float = 600.0
    """One engine core from actor creation to listening, weights included."""
    attach_s: float = 30.0
    """A client's session with one engine becoming open."""
    call_s: float = 60.0
    """A utility call without a deadline of its own."""
    drain_s: float = 30.0
    """`shutdown` waiting for running requests before it aborts them."""
    stop_s: float = 10.0
    """An engine core ending by itself before it is killed."""
    group_s: float = 30.0
    """The process group of ranks in lockstep being formed."""
    collective_s: float = 60.0
    """One collective of ranks in lockstep; more than any step takes."""
    regroup_s: float = 60.0
    """Requests of ranks in lockstep whose group broke waiting for a new one before they fail."""
    control_s: float = 30.0
    """A Ray call that only hands over state."""

    @property
    def reserve_s(self) -> float:
        """The longest that ranks wait for their placement groups."""
        return max(self.capacity_s, self.new_nodes_s)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of memory and of silence."""

    lease_s: float = 30.0
    """A session silent for longer is ended and its requests aborted."""
    disconnect_grace_s: float = 0.5
    """A session whose ZeroMQ connection closed may come back for this long; ZeroMQ connects again after a tenth of a second."""
    session_backlog_bytes: int = 64 << 20
    """Outputs queued in an engine for one slow client before its session ends."""
    socket_high_water_mark: int = 1000
    """Frames per peer that ZeroMQ holds in each direction."""
    message_bytes: int = 256 << 20
    """ZMQ_MAXMSGSIZE: a peer that claims more is disconnected."""
    inline_tensor_bytes: int = 256
    """Tensors up to this size travel inside the message."""
    shared_memory_bytes: int = 64 << 10
    """From this size on, tensors of one host go through a file in /dev/shm."""
    busy_poll_s: float = 0.0005
    """How long an engine core that has run out of work looks again before it sleeps; 0: never.

    It takes a wake-up and cold caches off each round trip of a client that asks again at once. It is done only while it pays: after a few
    looks in vain an engine core sleeps at once, until sleeps turn out to be shorter than this.
    """
    session_requests: int = 65_536
    """Requests that one session may have at once on one engine."""
    waiting_requests: int | None = 32_768
    """Requests without a token yet at one engine, held ones included; over it: OverloadedError. None, here and below: no limit."""
    waiting_tokens: int | None = 16 << 20
    """Their prompt tokens (four bytes each)."""
    client_waiting_requests: int | None = 16_384
    """Of them, those of one client."""
    client_waiting_tokens: int | None = 8 << 20
    waiting_tensor_bytes: int | None = 1 << 30
    """Bytes of the tensors that came with what waits at one engine."""
    client_requests: int | None = 131_072
    """Requests that one client may have in flight, over all engines; the next one is refused before it is sent."""
    client_tokens: int | None = 64 << 20
    """Their prompt tokens, which the client keeps until they end."""
    weight_portion_bytes: int = 16 << 20
    """Weights that one rank sends to one that joins in one exchange; both hold a buffer of it, the joiner one for each sender."""


class HealthConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Liveness: how often an engine core beats and when silence is a hang."""

    beat_interval_s: float = 0.25
    hang_after_s: float = 5.0
    """No beat for this long: the process hangs."""
    first_beat_s: float = 20.0
    step_budget_s: float = 30.0
    """A step or call may take this long unless the engine declares another budget."""
    grace_s: float = 1.0
    fence_wait_s: float = 10.0
    """A client gives up a suspect engine by itself when no controller has fenced it for so long."""


_GROUPS: dict[str, type[msgspec.Struct]] = {"timeouts": Timeouts, "limits": Limits, "health": HealthConfig}
MAY_BE_NONE = frozenset(name for name in Limits.__struct_fields__ if name.startswith(("waiting_", "client_")))
MAY_BE_ZERO = frozenset({"drain_s", "new_nodes_s", "disconnect_grace_s", "grace_s", "inline_tensor_bytes", "busy_poll_s"})


def debug_checks_wanted() -> bool:
    """Whether RAYCORE_DEBUG_CHECKS is set to anything but 0."""
    return os.environ.get("RAYCORE_DEBUG_CHECKS", "0") != "0"


def event_log_wanted() -> str:
    """Where pools' event logs go: `RAYCORE_EVENT_LOG`, else "auto"."""
    return os.environ.get("RAYCORE_EVENT_LOG") or "auto"


def state_directory() -> Path:
    """Where what outlasts a pool is kept: `XDG_STATE_HOME`, else `~/.local/state`, and `raycore` in it."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "raycore"


DEFAULT_ROUTER = "work"


class PoolConfig(pydantic.BaseModel):
    """All that a deployment is, as `launch` takes it. Unknown names are errors."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    pool: str = "default"
    """Name of the deployment within the Ray namespace `raycore`."""
    engine: str = "torch"
    """`echo`, `torch`, or `module:function` of an engine factory importable on the nodes."""
    model: str | None = None
    """Checkpoint directory or GGUF file, as seen from the engines' nodes."""
    engine_options: dict[str, Any] = pydantic.Field(default_factory=dict)
    data_parallel_size: int = pydantic.Field(default=1, ge=1, le=1024)
    tensor_parallel_size: int = pydantic.Field(default=1, ge=1)
    standby: int = pydantic.Field(default=0, ge=0, le=64)
    """Engine cores that are kept warm beside the ranks: scaling promotes them at once, and a rank that dies is replaced where the others go
    on without it."""
    warm: Literal["process", "weights"] = "process"
    """How warm: the process with its imports and device, or with the model loaded too, but for experts that are spread over the ranks."""
    max_data_parallel_size: int = pydantic.Field(default=8, ge=1)
    """Where raycore starts a local Ray itself, it gives it logical CPUs for this many engines."""
    device: Literal["cpu", "cuda"] = "cpu"
    num_cpus_per_engine: float = pydantic.Field(default=1, ge=0)
    resources_per_engine: dict[str, float] = pydantic.Field(default_factory=dict)
    """Further Ray resources of each rank, e.g. {"memory": 4e9}."""
    node_strategy: Literal["pack", "spread", "strict"] = "pack"
    """pack: fill nodes in order; spread: balance over nodes; strict: every used node holds the same number of ranks."""
    label_selector: dict[str, str] = pydantic.Field(default_factory=dict)
    """Ray node labels that every engine's node must have."""
    forward_env: tuple[str, ...] = ("HF_*", "RAYCORE_*", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    """Names or patterns of the driver's environment variables that engines get, unless their node sets them."""
    lifetime: Literal["scoped", "detached"] = "scoped"
    coordinator: Literal["auto", "never"] = "auto"
    """auto: a pool that has or may get more than one rank has one; it spreads loads and speeds up waves, and nothing depends on it."""
    tcp: Literal["auto", "always", "never"] = "auto"
    """auto: engines bind TCP where their node's address is not loopback."""
    on_engine_death: Literal["fail", "replay"] = "replay"
    """What happens to a dead engine's requests: re-admission elsewhere, or a typed error."""
    router: str = DEFAULT_ROUTER
    """How clients choose engines (`docs/routing.md`): a policy's name, or `module:name` of a user's own, importable where clients are."""
    router_options: dict[str, Any] = pydantic.Field(default_factory=dict)
    autoscaling: dict[str, Any] | None = None
    """How the pool scales itself (`docs/autoscaling.md`); None: it does not."""
    allow_pickle: bool = False
    """Whether clients may send functions to the engines (`collective_rpc` with a callable): they run with the engines' rights."""
    debug_checks: bool = pydantic.Field(default_factory=debug_checks_wanted)
    """Whether each engine core checks its tables, and its engine's, whenever it becomes idle; a wrong one ends the engine."""
    metrics: bool = True
    """Whether the pool and its clients report to Ray's metrics agents (`docs/operations.md`)."""
    event_log: str = pydantic.Field(default_factory=event_log_wanted)
    """Directory of the pool's event log on the controller's node; "auto": the user's state directory; "off": none."""
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    health: HealthConfig = HealthConfig()

    @pydantic.field_validator("timeouts", "limits", "health", mode="before")
    @classmethod
    def _from_mapping(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """A mapping of some of the group's values is as good as the struct."""
        kind = _GROUPS[info.field_name or ""]
        if not isinstance(value, dict):
            return value
        settings = cast("Mapping[str, Any]", value)
        unknown = [name for name in settings if name not in kind.__struct_fields__]
        if unknown:
            msg = f"no such setting: {', '.join(unknown)}"
            raise ValueError(msg)
        return msgspec.convert(settings, kind)

    @pydantic.field_validator("timeouts", "limits", "health")
    @classmethod
    def _positive(cls, value: msgspec.Struct) -> msgspec.Struct:
        for name in value.__struct_fields__:
            setting = getattr(value, name)
            if setting is None:
                if name in MAY_BE_NONE:
                    continue
                msg = f"{name} must be a number"
                raise ValueError(msg)
            if not setting > 0 and name not in MAY_BE_ZERO:
                msg = f"{name} must be more than 0"
                raise ValueError(msg)
        return value

    @pydantic.field_validator("pool")
    @classmethod
    def _name_is_usable(cls, value: str) -> str:
        if not POOL_NAME.fullmatch(value):
            msg = "a pool name has 1 to 48 of [A-Za-z0-9_.-] and starts with a letter or digit"
            raise ValueError(msg)
        return value

    @pydantic.field_validator("tensor_parallel_size")
    @classmethod
    def _one_process_per_rank(cls, value: int) -> int:
        if value != 1:
            msg = "tensor_parallel_size above 1 is not built yet"
            raise ValueError(msg)
        return value

    @pydantic.model_validator(mode="after")
    def _strict_is_planned(self) -> PoolConfig:
        if self.timeouts.new_nodes_s and self.node_strategy == "strict":
            msg = "node_strategy 'strict' needs nodes that are there; with timeouts.new_nodes_s it is Ray that places ranks on new ones"
            raise ValueError(msg)
        return self

    @pydantic.field_validator("forward_env")
    @classmethod
    def _not_what_ray_sets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in NEVER_FORWARDED:
            for pattern in value:
                if fnmatch.fnmatchcase(name, pattern) or pattern.startswith("RAY_"):
                    msg = f"{pattern!r} would forward {name}, which Ray or torch sets per worker"
                    raise ValueError(msg)
        return value


API_KEY_VARIABLE = "RAYCORE_API_KEY"
"""Holds the HTTP front's key, so that it is on no command line."""

SECRETS = frozenset({API_KEY_VARIABLE})
"""No business of the engines, whatever pattern they match."""

NEVER_FORWARDED = ("RAY_ADDRESS", "RAY_worker_niceness", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR")
"""Copying these from a driver breaks workers (ray-notes, gotcha 10)."""


def parse_config(values: Mapping[str, Any]) -> PoolConfig:
    """The configuration of keyword values; ConfigurationError names each wrong one."""
    try:
        return PoolConfig(**values)
    except (pydantic.ValidationError, TypeError) as error:
        raise ConfigurationError(_readable(error)) from error


def forwarded_environment(patterns: tuple[str, ...]) -> dict[str, str]:
    """The driver's variables that match, secrets excepted: the one place where the environment is read for engines."""
    return {k: v for k, v in os.environ.items() if k not in SECRETS and any(fnmatch.fnmatchcase(k, p) for p in patterns)}


def log_level(environment: Mapping[str, str] | None = None) -> str:
    """From which level a pool's processes log: `RAYCORE_LOG_LEVEL`, else WARNING; an unknown name is WARNING too.

    `environment`: the driver's, which counts where the process has none of its own.
    """
    wanted = (os.environ.get("RAYCORE_LOG_LEVEL") or (environment or {}).get("RAYCORE_LOG_LEVEL", "")).upper()
    return wanted if wanted in logging.getLevelNamesMapping() else "WARNING"


def _readable(error: Exception) -> str:
    if not isinstance(error, pydantic.ValidationError):
        return str(error)
    parts = (f"{'.'.join(map(str, e['loc'])) or 'configuration'}: {e['msg']} (got {e['input']!r})" for e in error.errors())
    return "; ".join(parts)


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine core needs to come up; travels to its actor over Ray."""

    pool: str
    rank: int
    incarnation: str
    engine: str
    model: str | None
    engine_options: dict[str, Any]
    device: str
    tcp: str
    limits: Limits
    timeouts: Timeouts
    health: HealthConfig
    server_public_key: str = ""
    server_secret_key: str = ""
    client_public_key: str = ""
    client_secret_key: str = ""
    """Ranks in lockstep are clients of one another."""
    allow_pickle: bool = False
    debug_checks: bool = False
    data_parallel_size: int = 1
    """Ranks that the pool has, or shall have, when this engine serves."""
    warm_weights: bool = False
    """Whether a standby loads the model before it knows its rank."""
    is_joining: bool = False
    """The pool runs already: an expert-parallel engine gets its experts from the others."""

    def __repr__(self) -> str:
        return f"EngineSpec(pool={self.pool!r}, rank={self.rank}, incarnation={self.incarnation!r}, engine={self.engine!r})"
