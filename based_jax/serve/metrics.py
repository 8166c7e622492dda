"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from based_jax.generate import Event, PrefixCache

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
PREFIX = "based_jax"


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self.responses = self._counter("http_responses", "answers to requests by their status", ["status"])
        self.finished = self._counter("texts_finished", "continuations by what ended them", ["reason"])
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of prompts that were taken")
        self.new_tokens = self._counter("generated_tokens", "tokens that were drawn")
        self.steps = self._counter("steps", "steps that drew them, each of which may verify drafted tokens")
        self.drafted = self._counter("drafted_tokens", "tokens that were drafted")
        self.accepted = self._counter("accepted_tokens", "drafted tokens that proved right")
        self.first_token = self._histogram("time_to_first_token_seconds", "from a request to its first token")
        self.text_seconds = self._histogram("text_seconds", "from a request to the end of a continuation")

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a value that is asked for when the metrics are read."""
        prometheus_client.Gauge(f"{PREFIX}_{name}", help, registry=self.registry).set_function(value)

    def observe(self, event: Event, seconds: float, is_first: bool) -> None:
        """Count an event that came so long after its request."""
        self.new_tokens.inc(len(event.tokens))
        self.steps.inc(event.work.steps)
        self.drafted.inc(event.work.offered)
        self.accepted.inc(event.work.accepted)
        if is_first:
            self.first_token.observe(seconds)
        if event.finish is not None:
            self.finished.labels(event.finish).inc()
            self.text_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in the text format."""
        return prometheus_client.generate_latest(self.registry)

    def _counter(self, name: str, help: str, labels: list[str] | None = None) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"{PREFIX}_{name}", help, labels or [], registry=self.registry)

    def _histogram(self, name: str, help: str) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(f"{PREFIX}_{name}", help, buckets=SECONDS, registry=self.registry)


class PrefixCacheMetrics(Collector):
    """What a prefix cache counts itself."""

    COUNTERS = ("lookups", "hits", "tokens_asked", "tokens_restored", "kept", "evicted")
    GAUGES = ("states", "bytes")

    def __init__(self, cache: PrefixCache):
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        """Yield its counters by their names there, and misses by their reasons."""
        found = self._cache.metrics
        for name in self.COUNTERS:
            yield CounterMetricFamily(f"{PREFIX}_prefix_{name}", f"{name} of the prefix cache", getattr(found, name))
        for name in self.GAUGES:
            yield GaugeMetricFamily(f"{PREFIX}_prefix_{name}", f"{name} of the prefix cache", getattr(found, name))
        misses = CounterMetricFamily(f"{PREFIX}_prefix_misses", "why nothing was restored", labels=["reason"])
        for reason, count in found.misses.items():
            misses.add_metric([reason], count)
        yield misses
