"""Every metric that raycore exports through its control plane: name, kind, tags; and the Protocol behind which Ray stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import msgspec

POOL_TAGS = ("pool", "model", "node_ip")
"""What every series has. `node_ip` is the rank's node where there is a `dp_rank` of the controller's, the reporting process's otherwise."""
RANK = "dp_rank"

LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
GAP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PHASE_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metric(msgspec.Struct, frozen=True):
    """One metric as it is declared; Ray exports it as `ray_NAME`. `tags`: those beside `POOL_TAGS`. `boundaries`: of a histogram's bins."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    text: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


class MetricsSink(Protocol):
    """Where values go."""

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Set a gauge, add to a counter, or observe one value; `tags` beside the sink's own, which they override."""
        ...


# -- by the controller ------------------------------------------------------------------------------------------------------

DP_SIZE = Metric("raycore_dp_size", "gauge", "Ranks that serve.")
DP_TARGET_SIZE = Metric("raycore_dp_target_size", "gauge", "Ranks that the running operation leads to, or that were asked for last.")
STANDBYS = Metric("raycore_standbys", "gauge", "Warm engine cores without a rank.")
EPOCH = Metric("raycore_epoch", "gauge", "The epoch of the membership.")
REQUESTS_RUNNING = Metric("raycore_requests_running", "gauge", "Requests in a rank's batch, of all its clients.", (RANK,))
REQUESTS_WAITING = Metric("raycore_requests_waiting", "gauge", "Requests without a token yet at a rank.", (RANK,))
KV_CACHE_USAGE = Metric("raycore_kv_cache_usage", "gauge", "Share of a rank's KV cache that is in use, 0 to 1.", (RANK,))
IS_PAUSED = Metric("raycore_is_paused", "gauge", "1 while a rank is paused.", (RANK,))
IS_SLEEPING = Metric("raycore_is_sleeping", "gauge", "1 while a rank sleeps.", (RANK,))
SCALE_OPERATIONS = Metric("raycore_scale_operations_total", "counter", "Scaling operations that ended: done or undone.", ("outcome",))
SCALE_DURATION = Metric("raycore_scale_duration_s", "histogram", "Seconds that a phase of a scaling operation took.", ("phase",), PHASE_S)
ENGINE_DEATHS = Metric("raycore_engine_deaths_total", "counter", "Ranks that were lost, by what it was.", ("cause", RANK))

# -- by each client ---------------------------------------------------------------------------------------------------------

REQUESTS = Metric("raycore_requests_total", "counter", "Requests that ended: stop, length, abort, error.", ("outcome", RANK))
REPLAYED = Metric(
    "raycore_requests_replayed_total",
    "counter",
    "Requests sent to an engine again: their rank died or left, or the session was lost.",
    ("cause", RANK),
)
TOKENS = Metric("raycore_tokens_total", "counter", "Tokens of prompts and of answers.", ("kind", RANK))
TTFT = Metric("raycore_ttft_s", "histogram", "Seconds from a request's admission to its first token.", (RANK,), LATENCY_S)
INTER_TOKEN = Metric("raycore_inter_token_s", "histogram", "Seconds between two tokens of one request.", (RANK,), GAP_S)
UTILITY_CALLS = Metric("raycore_utility_calls_total", "counter", "Utility calls on a rank: ok or the error's type.", ("method", "outcome"))
UTILITY_CALL = Metric("raycore_utility_call_s", "histogram", "Seconds that a utility call on a rank took.", ("method",), LATENCY_S)

OF_CONTROLLER = (
    DP_SIZE,
    DP_TARGET_SIZE,
    STANDBYS,
    EPOCH,
    REQUESTS_RUNNING,
    REQUESTS_WAITING,
    KV_CACHE_USAGE,
    IS_PAUSED,
    IS_SLEEPING,
    SCALE_OPERATIONS,
    SCALE_DURATION,
    ENGINE_DEATHS,
)
OF_CLIENTS = (REQUESTS, REPLAYED, TOKENS, TTFT, INTER_TOKEN, UTILITY_CALLS, UTILITY_CALL)
METRICS = (*OF_CONTROLLER, *OF_CLIENTS)
