"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from anomalyst.station.judges import Judges


class Metrics:
    """Counts of one station, in a registry of its own."""

    def __init__(self, judges: Judges) -> None:
        self._registry = CollectorRegistry()
        self.inspections = Counter(
            "anomalyst_inspections",
            "Pictures judged and stored.",
            ["recipe", "verdict", "source"],
            registry=self._registry,
        )
        self.decisions = Counter(
            "anomalyst_decisions", "Operators' decisions.", ["decision"], registry=self._registry
        )
        self.seconds = Histogram(
            "anomalyst_inspection_seconds",
            "From a picture's arrival to its stored result.",
            buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30),
            registry=self._registry,
        )
        self.requests = Counter(
            "anomalyst_requests", "Requests by status.", ["status"], registry=self._registry
        )
        self.watch_errors = Counter(
            "anomalyst_watch_errors",
            "Times that a watched folder or its file could not be read or stored.",
            registry=self._registry,
        )
        waiting = Gauge(
            "anomalyst_waiting", "Pictures that wait to be judged.", registry=self._registry
        )
        waiting.set_function(lambda: judges.waiting)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)
