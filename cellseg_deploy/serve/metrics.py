"""Figures for Prometheus. The only module that imports ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TILES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counts requests, stages and batches, in a registry of its own. Thread-safe.

    ``cellseg_requests_total{path,status}``, ``cellseg_request_seconds{path}``, ``cellseg_stage_seconds{stage}``,
    ``cellseg_queue_images``, ``cellseg_waiting_bytes``, ``cellseg_batch_tiles``, ``cellseg_batch_limit_tiles``,
    ``cellseg_engine_busy_seconds_total``.
    """

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        self._requests = Counter(
            "cellseg_requests_total", "Requests answered.", ("path", "status"), registry=self._registry
        )
        self._request_seconds = Histogram(
            "cellseg_request_seconds",
            "Time from the head of a request to its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stages = Histogram(
            "cellseg_stage_seconds",
            "Time of one image in a stage.",
            ("stage",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._queue = Gauge("cellseg_queue_images", "Images accepted and not yet answered.", registry=self._registry)
        self._waiting = Gauge(
            "cellseg_waiting_bytes",
            "Files received, not yet decoded; without those of jobs.",
            registry=self._registry,
        )
        self._tiles = Histogram("cellseg_batch_tiles", "Tiles per batch.", buckets=_TILES, registry=self._registry)
        self._limit = Gauge("cellseg_batch_limit_tiles", "Most tiles per batch.", registry=self._registry)
        self._busy = Counter("cellseg_engine_busy_seconds_total", "Time in the network.", registry=self._registry)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count one request. ``path``: the route, not what was asked, which could be anything."""
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def stages(self, seconds: Mapping[str, float]) -> None:
        """Count one image; ``seconds`` by stage."""
        for stage, value in seconds.items():
            self._stages.labels(stage).observe(value)

    def batch(self, tiles: int, most: int, seconds: float) -> None:
        """Count one call of the network with ``tiles`` of at most ``most`` tiles."""
        self._tiles.observe(tiles)
        self._limit.set(most)
        self._busy.inc(seconds)

    def watch_queue(self, length: Callable[[], int], waiting_bytes: Callable[[], int]) -> None:
        """Read the length of the queue, and the bytes of the files that wait, when asked for."""
        self._queue.set_function(length)
        self._waiting.set_function(waiting_bytes)

    def text(self) -> bytes:
        """Return all figures in the text format of Prometheus (``KIND``)."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self._registry))


KIND = "text/plain; version=0.0.4; charset=utf-8"
