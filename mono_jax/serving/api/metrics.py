"""What Prometheus reads at /metrics: the API's own counters and histograms, and the engine's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mono_jax.serving.contract import ServingEngine, Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_QUANTILES = (0.5, 0.9, 0.99)
PREFIX = "mono_jax"


class Metrics:
    """The metrics of one server. ``registry``: to be written out by ``prometheus_client.generate_latest``."""

    def __init__(self, engine: ServingEngine):
        disable_created_metrics()  # creation timestamps: one extra line per counter
        self.registry = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}_http_requests", "HTTP requests that ended", ["path", "status"], registry=self.registry
        )
        self.seconds = self._histogram("http_request_seconds", "from request headers to the last byte of the response")
        self.first_token = self._histogram("time_to_first_token_seconds", "from request headers to the first token")
        self.token_gap = self._histogram("time_per_output_token_seconds", "mean of each answer, after its first token")
        self.registry.register(_OfEngine(engine))

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", what, buckets=_SECONDS, registry=self.registry)


class _OfEngine(Collector):
    """``Stats`` at the time of the scrape."""

    def __init__(self, engine: ServingEngine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield _gauge("queue_requests", "waiting requests", stats.queued)
        yield _gauge("running_requests", "requests being answered: the batch size", stats.running)
        yield _gauge("rows", "maximum number of requests answered at a time", stats.max_rows)
        yield _gauge("cache_slots_used", "cache slots (tokens) held by requests", stats.slots_used)
        yield _gauge(
            "cache_slots_reusable", "cache slots in free pages whose prefix can still be reused", stats.slots_reusable
        )
        yield _gauge("cache_slots", "cache slots in total", stats.slots)
        yield _gauge("host_share", "CPU time of the scheduler as a share of the time with work to do", stats.host_share)
        yield _gauge("warm_up_seconds", "duration of the warm-up", stats.warm_up_s)
        yield _counter("prompt_tokens", "prompt tokens", stats.tokens_in)
        yield _counter("prompt_tokens_cached", "prompt tokens reused from the cache", stats.tokens_cached)
        yield _counter("generated_tokens", "answer tokens", stats.tokens_out)
        yield _counter("working_seconds", "seconds with work to do", stats.working_s)
        yield _counter("steps", "decode steps of the running batch", stats.steps)
        yield _counter("prefill_chunks", "prefill chunks", stats.chunks)
        yield _counter("refused", "requests refused because the queue was full", stats.refused)
        yield _counter(
            "compilations", "programs compiled after the warm-up: 0 unless there is a bug", stats.compilations
        )
        yield _ended(stats)
        yield _latest("step_seconds", "latest decode steps that followed another one directly", stats.step_s)
        yield _latest("queue_seconds", "latest waits before prefill began", stats.queue_s)
        yield _latest(
            "engine_first_token_seconds", "latest times from submission to the first token", stats.first_token_s
        )


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", what, value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", what, value)


def _ended(stats: Stats) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_answers", "finished answers, by finish reason", labels=["finish"])
    for finish, count in sorted(stats.requests.items()):
        family.add_metric([finish], count)
    return family


def _latest(name: str, what: str, values: Sequence[float]) -> Metric:
    """Quantiles of the latest values, of which the engine keeps a few thousand."""
    family = GaugeMetricFamily(f"{PREFIX}_{name}", what, labels=["quantile"])
    for quantile, value in zip(_QUANTILES, np.quantile(values, _QUANTILES) if len(values) else ()):
        family.add_metric([str(quantile)], float(value))
    return family
