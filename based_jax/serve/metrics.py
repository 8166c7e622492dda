"""What Prometheus reads at /metrics."""

from collections.abc import Callable

import prometheus_client

from based_jax.generate.scheduler import Event

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
        self.first_token = self._histogram("time_to_first_token_seconds", "from a request to its first token")
        self.text_seconds = self._histogram("text_seconds", "from a request to the end of a continuation")

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a value that is asked for when the metrics are read."""
        prometheus_client.Gauge(f"{PREFIX}_{name}", help, registry=self.registry).set_function(value)

    def observe(self, event: Event, seconds: float, is_first: bool) -> None:
        """Count an event that came so long after its request."""
        self.new_tokens.inc(len(event.tokens))
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
