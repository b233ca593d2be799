"""The service without its web framework: what it was started with, and what it answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Self

from cellseg_deploy.errors import CellsegError, UsageError, plural
from cellseg_deploy.outputs.tables import utf8
from cellseg_deploy.serve import outputs, settings
from cellseg_deploy.serve.engine import Answer, Engine, Task, TaskCancelledError
from cellseg_deploy.serve.limits import Accepted, Held, Limits, QueueFullError, Waiting
from cellseg_deploy.serve.metrics import Metrics
from cellseg_deploy.serve.outputs import Output
from cellseg_deploy.serve.settings import Settings
from cellseg_deploy.serve.uploads import UnsupportedBodyError, Upload
from cellseg_deploy.web.replies import Reply, status_of

_log = logging.getLogger(__name__)

PROBLEM = "application/problem+json"
OTHERS = ("output", "name")
"""Parameters of a request that are not settings: what to answer, and the name of an image sent as the body."""


class RefusedError(Exception):
    """The request is answered with ``status`` and a sentence, and nothing else happens."""

    def __init__(self, status: int, words: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(words)
        self.status, self.headers = status, dict(headers or {})


@dataclass
class Service:
    """``engine``: running. ``defaults``: settings of a request that sets nothing."""

    engine: Engine
    defaults: Settings = field(default_factory=Settings)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        _ = self.defaults.segmenter(self.engine.backend), self.defaults.reading  # raises now, not in every request
        self.accepted = Accepted(self.limits.queue, self.limits.seconds)
        self.waiting = Waiting(self.limits.held_bytes, self.accepted.retry_seconds)
        self.metrics: Metrics = self.engine.metrics
        self.metrics.watch_queue(lambda: len(self.accepted), lambda: self.waiting.used)

    def settings_of(self, given: Iterable[tuple[str, str]]) -> Settings:
        """Return the settings that the parameters ``given`` set, checked against the model. Raises ``UsageError``."""
        asked = settings.parse(given, self.defaults, others=OTHERS)
        asked.segmenter(self.engine.backend)
        return asked

    def output_of(self, given: Iterable[tuple[str, str]], accept: str) -> Output:
        """Return what to answer: the parameter ``output``, else what the header ``accept`` prefers. Raises
        ``UsageError``, ``RefusedError``."""
        names = [text for name, text in given if name == "output"]
        if len(names) > 1:
            raise UsageError("output is given twice; give it once")
        if names:
            return outputs.named(names[0])
        found = outputs.accepted(accept or "*/*")
        if found is None:
            kinds = ", ".join(dict.fromkeys(each.kind for each in outputs.OUTPUTS))
            raise RefusedError(406, f"Accept is {accept!r}; expected one of {kinds}")
        return found

    def check_files(self, files: list[Upload], most: int) -> None:
        """Raise ``UsageError`` without a file, and ``RefusedError`` for more than ``most``."""
        if not files:
            raise UsageError("the form has no file; send an image, as in: curl -F image=@smear.png")
        if len(files) > most:
            more = "; send several to /v1/batch" if most == 1 else ""
            raise RefusedError(413, f"{plural(len(files), 'file')} in one request; expected at most {most}{more}")

    def models(self) -> dict[str, Any]:
        """Describe the model: what it is, what it may be used for, what runs it."""
        backend = self.engine.backend
        spec = backend.spec
        model = {
            "name": spec.name,
            "variant": spec.variant,
            "channels": list(spec.channels),
            "classes": list(spec.classes),
            "tasks": {task: point.foreground_threshold for task, point in sorted(spec.operating_points.items())},
            "tile_size": spec.tile_size,
            "image_scale": spec.image_scale,
            "cell_diameter_px": spec.cell_diameter_px,
            "weights": {"origin": spec.weights.origin, "licence": spec.weights.licence},
            "engine": {
                "backend": backend.name,
                "device": backend.device,
                "precision": backend.precision,
                "verified": backend.verified,
            },
        }
        return {"models": [model]}

    def health(self) -> Reply:
        """Whether the process does its work: 503 only if a restart is needed."""
        if self.engine.is_well:
            return as_json({"status": "ok"})
        return problem(503, f"the network has failed ({self.engine.failure}); restart the service")

    def ready(self) -> Reply:
        """Whether a request would be taken now."""
        if not self.engine.is_well:
            return self.health()
        if (refusal := self.accepted.refusal()) is not None:
            return problem(503, refusal)
        return as_json({"status": "ok"})


class Slots:
    """Places in the queue, and bytes among those that ``waiting`` counts, that a request holds: one place from
    the start of the block, which raises ``QueueFullError``. Those not handed to a task are given back at its end."""

    def __init__(self, service: Service, waiting: Waiting, *, timed: bool = True) -> None:
        self._service, self._waiting, self._timed, self._n = service, waiting, timed, 0
        self._held = Held(waiting)

    def __enter__(self) -> Self:
        self._service.accepted.admit(timed=self._timed)
        self._n = 1
        return self

    def __exit__(self, *_: object) -> None:
        self._held.give_back()
        for _each in range(self._n):
            self._service.accepted.give_back()

    def take(self, n: int) -> None:
        """Take ``n`` more. Raises ``QueueFullError``."""
        self._service.accepted.take(n)
        self._n += n

    def hold(self, nbytes: int) -> None:
        """Hold ``nbytes`` for the body that is to arrive. Raises ``QueueFullError``."""
        self._held = self._waiting.take(nbytes)

    def keep(self, nbytes: int) -> None:
        """Hold only ``nbytes`` of the body: the files in it."""
        whole, self._held = self._held, self._held.split(nbytes)
        whole.give_back()

    def hand_bytes_to(self, task: Task) -> None:
        """Let ``task`` hold its file's bytes."""
        task.held = self._held.split(len(task.data))

    def submit(self, task: Task) -> Future[Answer]:
        """Submit ``task``, which gives its bytes back when it is decoded, and its place when it ends."""
        self.hand_bytes_to(task)
        try:
            future = self._service.engine.submit(task)
        except BaseException:
            task.drop()
            raise
        self._n -= 1
        future.add_done_callback(lambda _: self._service.accepted.give_back(seconds=task.seconds))
        return future


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return ``content`` as JSON."""
    body = json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
    return Reply(body, status=status, headers=dict(headers or {}))


def problem(status: int, words: str, headers: Mapping[str, str] | None = None) -> Reply:
    """Return an error as RFC 9457 says; ``detail``: the sentence."""
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": utf8(words)}
    return Reply(json.dumps(content).encode("ascii"), PROBLEM, status, headers=dict(headers or {}))


def reply_of(answer: Answer) -> Reply:
    """Return the answer to one image. Its counts and kinds of warnings are in the head too, where a picture has no
    room for them."""
    headers = {"Cellseg-Count": str(answer.found), "Cellseg-Counted": str(answer.counted)}
    if answer.warnings:
        headers["Cellseg-Warnings"] = ", ".join(answer.warnings)
    return Reply(answer.body, answer.output.kind, headers={**headers, "Vary": "Accept"})


def batch_reply(names: list[str], results: list[Answer | BaseException]) -> Reply:
    """Return the answers to several images, in the order they were sent; a failed image does not fail the others."""
    parts, n_failed = list[bytes](), 0
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Answer):
            parts.append(b'{"status":"done","result":' + result.body + b"}")
            continue
        status, words = why(result, name)
        n_failed += 1
        failed = {"status": "failed", "image": utf8(name), "code": status, "error": utf8(words)}
        parts.append(json.dumps(failed).encode("ascii"))
    head = f'{{"done":{len(parts) - n_failed},"failed":{n_failed},"images":['
    return Reply(head.encode("ascii") + b",".join(parts) + b"]}")


def why(error: BaseException, name: str = "") -> tuple[int, str]:
    """Return status and sentence for ``error``; ``name``: of the image, with which sentences of the reader begin. The
    sentences are those of a folder run."""
    words = str(error).removeprefix(f"{name}: ")
    match error:
        case RefusedError():
            return error.status, words
        case UnsupportedBodyError():
            return 415, words
        case QueueFullError():
            return 429, words
        case TaskCancelledError():
            return 504, "the image was not done in time"
        case CellsegError():
            return status_of(error), words
        case MemoryError():
            return 503, f"not enough memory{f' ({words})' if words else ''}; try smaller images"
    _log.error("%s: internal error", name or "request", exc_info=error)
    return 500, f"internal error, please report it: {type(error).__name__}: {words}"


def problem_of(error: BaseException, name: str = "") -> Reply:
    """Return the answer for ``error``; see ``why``."""
    headers = error.headers if isinstance(error, RefusedError) else {}
    if isinstance(error, QueueFullError):
        headers = {"Retry-After": str(error.retry_seconds)}
    return problem(*why(error, name), headers)
