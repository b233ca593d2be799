"""The far side of ``faults``: forks a process for each run of ``cellseg-infer``, and lets it meet its fault.

    python fault_runner.py        a line of JSON in for each request, a line of JSON out for each answer

Libraries are loaded once; a run then starts in milliseconds, so that hundreds of them can be killed. It forks while it
is a single thread (and says so at the start): no lock of a library can be held by a thread that is not copied along. So
it loads no engine; the network is the stub of the other tests, everything else is the command as it is.
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

NO_RESULT = 70
"""Exit code of a run that broke outside of the command."""
CALLS = ("open", "write", "fsync", "rename", "remove", "mkdir", "truncate")


@dataclass
class Fault:
    """What happens at the ``at``-th (from 1) of the ``calls`` that change ``out``: ``action`` is ``kill`` (SIGKILL),
    ``stop`` (SIGSTOP), the name of an error number, or ``count`` for nothing.

    ``lasting``: at each later one too, as with a full disk. A write that fails, or is killed, is half done.
    """

    out: Path
    action: str = "count"
    calls: tuple[str, ...] = CALLS
    at: int = 0
    lasting: bool = False
    seen: list[list[str]] = field(default_factory=list)
    matching: int = 0

    def meet(self, call: str, where: str | int, halfway: Callable[[], object] = lambda: None) -> None:
        """To be called before each call; ``where``: a path or a descriptor."""
        path = str(Path(f"/proc/self/fd/{where}").readlink()) if isinstance(where, int) else os.path.abspath(where)  # noqa: PTH100
        if not Path(path).is_relative_to(self.out):
            return
        self.seen.append([call, path])
        if call not in self.calls:
            return
        self.matching += 1
        if self.matching < self.at or self.at < 1 or (self.matching > self.at and not self.lasting):
            return
        if self.action in ("kill", "stop"):
            halfway()
            os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)
        elif self.action != "count":
            halfway()
            number = getattr(errno, self.action)
            raise OSError(number, os.strerror(number), path)


class _Writer(io.BufferedWriter):
    """What ``open(descriptor, "wb")`` gives, with the fault at each write."""

    def __init__(self, descriptor: int, fault: Fault) -> None:
        super().__init__(io.FileIO(descriptor, "wb"))
        self._fault = fault

    def write(self, data: Any) -> int:
        def halfway() -> None:
            super(_Writer, self).write(memoryview(data)[: len(data) // 2])
            self.flush()

        self._fault.meet("write", self.fileno(), halfway)
        return super().write(data)


def watch(fault: Fault) -> None:
    """Let every call of this process that changes ``fault.out`` meet the fault first."""
    from cellseg_deploy.files import atomic

    def before(module: Any, name: str, call: str) -> None:
        real = getattr(module, name)

        def meeting(where: Any, *arguments: Any, **settings: Any) -> Any:
            fault.meet(call, where if isinstance(where, int) else os.fspath(where))
            return real(where, *arguments, **settings)

        setattr(module, name, meeting)

    real_open, real_write, real_rename = os.open, os.write, os.replace

    def opening(path: Any, flags: int, *arguments: Any, **settings: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            fault.meet("open", os.fspath(path))
        return real_open(path, flags, *arguments, **settings)

    def writing(descriptor: int, data: Any) -> int:
        fault.meet("write", descriptor, lambda: real_write(descriptor, memoryview(data)[: len(data) // 2]))
        return real_write(descriptor, data)

    def renaming(source: Any, target: Any, **settings: Any) -> None:
        fault.meet("rename", os.fspath(target))
        real_rename(source, target, **settings)

    os.open, os.write, os.replace, os.rename = opening, writing, renaming, renaming  # type: ignore[assignment]
    for name, call in (
        *(("fsync", "fsync"), ("truncate", "truncate"), ("ftruncate", "truncate")),
        *(("unlink", "remove"), ("remove", "remove"), ("rmdir", "remove"), ("mkdir", "mkdir")),
    ):
        before(os, name, call)
    atomic.open = lambda descriptor, mode: _Writer(descriptor, fault)  # type: ignore[attr-defined]

    def unseen(event: str, arguments: tuple[Any, ...]) -> None:
        """A file that is opened for writing by any other way would escape the faults: seen as a call of its own."""
        if event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[1] is not None:
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100
            if set(arguments[1]) & set("wax+") and Path(path).is_relative_to(fault.out):
                fault.seen.append(["unwatched open", path])

    sys.addaudithook(unseen)


def limit(file_bytes: int | None, more_memory: int | None) -> None:
    """Bound the largest file (in bytes), and the address space by what it is now and ``more_memory`` bytes."""
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if more_memory is not None:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        total = pages * resource.getpagesize() + more_memory
        resource.setrlimit(resource.RLIMIT_AS, (total, total))


def run(request: dict[str, Any]) -> int:
    """One run of the command in this process; gives its exit code."""
    from conftest import DarknessBackend

    from cellseg_deploy import segmenter
    from cellseg_deploy.cli import console
    from cellseg_deploy.cli.infer import command

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell started in the background
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((nothing, said, said)):
        os.dup2(source, target)

    def backend(*_: Any, **settings: Any) -> DarknessBackend:
        return DarknessBackend()

    setattr(segmenter, "open_backend", backend)  # noqa: B010  (which is not there to be set, as mypy knows)
    fault = Fault(Path(request["out"]), **request["fault"])
    watch(fault)
    limit(request["file_bytes"], request["more_memory"])
    code = console.run(command, request["arguments"])
    if request["trace"]:
        Path(request["trace"]).write_text(json.dumps(fault.seen), encoding="utf-8")
    return code


def serve() -> None:
    """Answer requests until there are no more."""
    _preload()
    _answer({"threads": len(list(Path("/proc/self/task").iterdir()))})
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status, usage = os.wait4(request["wait"], 0)
            code = os.waitstatus_to_exitcode(status)
            _answer({"pid": pid, "code": code, "peak_bytes": usage.ru_maxrss * 1024})
            continue
        pid = os.fork()
        if pid == 0:
            code = NO_RESULT
            try:
                code = run(request)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        _answer({"pid": pid})


def _preload() -> None:
    """Everything that a run with the stub loads, so that it is loaded once; nothing here starts a thread."""
    metadata.version = functools.cache(metadata.version)  # asked for each library in each run: half of its time
    for name in (
        *("conftest", "cv2", "numpy.random", "tifffile", "imagecodecs", "PIL.PngImagePlugin"),
        *("cellseg_deploy.run.folder", "cellseg_deploy.cli.infer", "cellseg_deploy.cli.progress"),
        *("cellseg_deploy.outputs.label_tiff", "cellseg_deploy.outputs.overlay", "cellseg_deploy.run.tables"),
    ):
        importlib.import_module(name)
    from cellseg_deploy.run.record import library_versions

    library_versions()


def _answer(content: dict[str, Any]) -> None:
    print(json.dumps(content), flush=True)


if __name__ == "__main__":
    serve()
