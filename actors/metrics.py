"""Metrics through `ray.util.metrics`: what Ray's agent of each node exports to Prometheus, with `ray_` before each name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, final

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from raycore.client.control import PoolAccess
from raycore.metrics import METRICS, POOL_TAGS, Metric

logger = logging.getLogger(__name__)

_instruments: dict[str, Any] = {}
"""By metric name: one for each process, whatever pools and clients it has."""


@final
class RayMetrics:
    """A `MetricsSink` for one pool. A value that Ray does not take is dropped, with one line in the log."""

    def __init__(self, pool: str, model: str, node_ip: str) -> None:
        self._tags = {"pool": pool, "model": model, "node_ip": node_ip}
        self._has_failed = False

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Set, add or observe."""
        instrument = _instruments.get(metric.name) or _make(metric)
        every = {**self._tags, **tags}
        try:
            if metric.kind == "gauge":
                instrument.set(value, every)
            elif metric.kind == "counter":
                instrument.inc(value, every)
            else:
                instrument.observe(value, every)
        except (ValueError, TypeError, RuntimeError) as error:
            if not self._has_failed:
                self._has_failed = True
                logger.warning("metric %s of pool %s: %s", metric.name, self._tags["pool"], error)


def metrics_of(access: PoolAccess) -> RayMetrics | None:
    """Where a client of this pool reports from here; None where the pool was launched with `metrics=False`."""
    if not access.metrics:
        return None
    return RayMetrics(access.membership.pool, model_name(access.model, access.engine), ray.util.get_node_ip_address())


def model_name(model: str | None, engine: str) -> str:
    """The `model` tag: the checkpoint's last part, or the engine where there is none."""
    return PurePath(model).name if model else engine


def _make(metric: Metric) -> Any:
    tags = (*POOL_TAGS, *metric.tags)
    match metric.kind:
        case "gauge":
            made: Any = Gauge(metric.name, metric.text, tags)
        case "counter":
            made = Counter(metric.name, metric.text, tags)
        case "histogram":
            made = Histogram(metric.name, metric.text, list(metric.boundaries), tags)
    _instruments[metric.name] = made
    return made


def series_names() -> set[str]:
    """Every name that Prometheus sees."""
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {f"ray_{metric.name}{part}" for metric in METRICS for part in parts.get(metric.kind, ("",))}
