"""What the front counts, and what its client knows of the pool, in Prometheus' text format. Nothing here waits for anybody."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from raycore.client.client import EngineCoreClient

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 30)
_REQUEST_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class HttpMetrics:
    """One registry for each application, so that two in a process do not meet. `replica` tells the series of several replicas apart."""

    def __init__(self, client: EngineCoreClient, replica: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._replica = replica
        self._requests = Counter(
            "raycore_http_requests", "Requests, by status; 499: the caller left.", ("replica", "route", "code"), registry=registry
        )
        self._seconds = Histogram(
            "raycore_http_request_seconds",
            "From a request to the end of its answer.",
            ("replica", "route"),
            buckets=_REQUEST_S,
            registry=registry,
        )
        in_flight = Gauge("raycore_http_in_flight", "Requests that are being answered.", ("replica",), registry=registry)
        tokens = Counter("raycore_http_tokens", "Tokens of prompts and of answers.", ("replica", "kind"), registry=registry)
        ttft = Histogram(
            "raycore_http_time_to_first_token_seconds", "From a body to its first output.", ("replica",), buckets=_TTFT_S, registry=registry
        )
        self._in_flight = in_flight.labels(replica)
        self.ttft = ttft.labels(replica)
        self._prompt_tokens, self._completion_tokens = tokens.labels(replica, "prompt"), tokens.labels(replica, "completion")
        registry.register(_PoolCollector(client, replica))

    def begin(self) -> None:
        """A request has come."""
        self._in_flight.inc()

    def end(self, route: str, code: int, seconds: float) -> None:
        """Its answer has ended."""
        self._in_flight.dec()
        self._requests.labels(self._replica, route, str(code)).inc()
        self._seconds.labels(self._replica, route).observe(seconds)

    def count_tokens(self, prompt_tokens: int, completion_tokens: int) -> None:
        """A request gave so many."""
        self._prompt_tokens.inc(prompt_tokens)
        self._completion_tokens.inc(completion_tokens)

    def text(self) -> bytes:
        """Everything, now."""
        return generate_latest(self._registry)


class _PoolCollector(Collector):
    """The pool as the client knows it from the engines' frames: nobody is asked, so that no scaling can be in the way."""

    def __init__(self, client: EngineCoreClient, replica: str) -> None:
        self._client = client
        self._replica = replica

    def collect(self) -> Iterable[Metric]:
        """The families."""
        pool, replica = self._client.pool, self._replica
        size = GaugeMetricFamily("raycore_dp_size", "Ranks that serve.", labels=("pool", "replica"))
        size.add_metric((pool, replica), len(self._client.ranks()))
        families = {
            name: GaugeMetricFamily(f"raycore_{metric}", text, labels=("pool", "replica", "dp_rank"))
            for name, metric, text in (
                ("running", "requests_running", "Requests in a rank's batch, of all its clients."),
                ("waiting", "requests_waiting", "Requests without a token yet at a rank."),
                ("kv_tokens_used", "kv_tokens_used", "Tokens in a rank's KV cache."),
            )
        }
        for rank, load in self._client.loads().items():
            for name, family in families.items():
                family.add_metric((pool, replica, str(rank)), getattr(load, name))
        return (size, *families.values())
