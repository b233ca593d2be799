"""Where a part of ``gpu-check`` works: the device, the files, and the commands of this project it calls."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cellseg_benchmarks.harness.timer import stopwatch
from cellseg_deploy.backends.device_class import engine_problem
from cellseg_deploy.errors import BackendUnavailableError
from cellseg_deploy.models import default_model_path, default_weights_path

EXPORT = ("-c", "from cellseg_export.cli import main; main()")
INFER = ("-c", "from cellseg_deploy.cli.infer import main; main()")
TRAIN = ("-c", "from cellseg_train.cli import main; main()")
MEASURE = ("-m", "cellseg_benchmarks")
RESERVE_SECONDS = 3.0
_ENDED = "ended after"


class OutOfTimeError(Exception):
    """A command that the rest of the part needs was cut off: nothing is proven by that."""


@dataclass(frozen=True)
class Done:
    """Result of a command: exit code (negative: killed), output, duration."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def cut_off(self) -> bool:
        """Whether there was no time left for it."""
        return self.code == -9 and _ENDED in self.err

    @property
    def words(self) -> str:
        """Its last words: the error if there is one."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        said = next(
            (line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no message"
        )
        return f"exit code {self.code}: {said}" if self.code else f"exit code 0, {self.seconds:.0f} s"


class Bench:
    """Settings of a check, as a part sees them. ``seconds``: the part's limit; ``dry``: on the CPU, and little."""

    def __init__(self, out: Path, model: Path, seconds: float, *, dry: bool) -> None:
        self.out, self.model, self.dry = out, model, dry
        self.device = "cpu" if dry else "cuda"
        self.work = out / "work"
        self.shipped, self.large = self.work / "shipped", self.work / "large"
        self._seconds, self._passed = seconds, stopwatch()

    @property
    def left(self) -> float:
        """Seconds that this part has left."""
        return self._seconds - self._passed()

    @property
    def weights(self) -> Path:
        """The PyTorch network of the model. Raises ``BackendUnavailableError`` for a model other than the shipped one,
        which has none."""
        if self.model != default_model_path().resolve():
            raise BackendUnavailableError(f"there is no PyTorch network of {self.model.name} to compare with")
        return default_weights_path()

    @staticmethod
    def require(*modules: str) -> None:
        """Raise ``BackendUnavailableError`` unless all ``modules`` are installed: without them claims are open."""
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            raise BackendUnavailableError(f"not installed: {', '.join(absent)}; pip install 'cellseg-deploy[export]'")

    def missing(self, engine: str) -> str:
        """Why ``engine`` is not installed for the device, "" if it is: then it must open."""
        if engine == "pytorch":
            return "" if importlib.util.find_spec("torch") else "not installed: pip install 'cellseg-deploy[export]'"
        return engine_problem(engine, self.device)

    def python(self, *arguments: Any, cwd: Path | None = None) -> Done:
        """Run this Python with ``arguments`` for at most the time left; its output goes to the log too."""
        words = [str(argument) for argument in arguments]
        limit = max(1.0, self.left - RESERVE_SECONDS)
        print(f"$ python {' '.join(words)}", flush=True)
        seconds = stopwatch()
        command = partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=limit)
        try:
            ran = command([sys.executable, *words], cwd=cwd, text=True, errors="replace", env=dict(os.environ))
            done = Done(ran.returncode, ran.stdout, ran.stderr, seconds())
        except subprocess.TimeoutExpired:  # what it started itself ends with the part's process group
            done = Done(-9, "", f"{_ENDED} {limit:.0f} s", seconds())
        print(
            done.out[-20_000:],
            done.err[-8_000:],
            f"-> exit code {done.code}, {done.seconds:.1f} s",
            sep="\n",
            flush=True,
        )
        return done
