"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Counters:
    """One set for each server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("nextstate_requests", "answered requests", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "nextstate_request_seconds",
            "from a request to the end of its answer",
            ["path"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.waiting = Gauge("nextstate_answers_waiting", "answers that are not over", registry=self.registry)
        self.batch_size = Histogram(
            "nextstate_batch_size", "answers that took a turn together", registry=self.registry, buckets=BATCH_SIZES
        )
        self.tokens = Counter("nextstate_generated_tokens", "generated tokens", registry=self.registry)
        self.pictures = Counter("nextstate_generated_pictures", "generated pictures", registry=self.registry)
        self.disconnects = Counter(
            "nextstate_disconnects", "requests whose client went before the answer was over", registry=self.registry
        )

    def page(self) -> bytes:
        return generate_latest(self.registry)

    def num_requests(self) -> int:
        return int(
            sum(one.value for metric in self.requests.collect() for one in metric.samples if "total" in one.name)
        )
