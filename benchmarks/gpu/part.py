"""The process of one part of ``gpu-check``: ``python -m cellseg_benchmarks.gpu.part NAME OUT MODEL SECONDS [dry]``.

It leads a process group and ends it, with all that its commands started, when whoever started it dies: the GPU must
be free again, whatever was killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

from cellseg_benchmarks.gpu.bench import Bench, OutOfTimeError
from cellseg_benchmarks.gpu.findings import Findings, one_line
from cellseg_benchmarks.gpu.plan import PARTS, findings_path
from cellseg_deploy.errors import BackendUnavailableError

UNAVAILABLE = BackendUnavailableError.exit_code
CUT_OFF = 124


def run_part(name: str, out: Path, model: Path, seconds: float, *, dry: bool) -> int:
    """Run the part ``name``; returns 0, ``UNAVAILABLE`` if a package is missing, ``CUT_OFF`` if time was, or 1 if it
    failed."""
    (part,) = [part for part in PARTS if part.name == name]
    found = Findings(findings_path(out, name))
    try:
        getattr(import_module(f"cellseg_benchmarks.gpu.{part.module}"), name)(
            Bench(out, model, seconds, dry=dry), found
        )
    except (BackendUnavailableError, ModuleNotFoundError) as error:
        found.fact("problem", one_line(str(error)))
        return UNAVAILABLE
    except OutOfTimeError as error:
        found.fact("problem", one_line(str(error)))
        return CUT_OFF
    except Exception as error:  # a line of the report: the next part runs
        traceback.print_exc()
        found.fact("problem", f"{type(error).__name__}: {one_line(str(error))}")
        return 1
    return 0


def end_with_parent() -> None:
    """Wait until the other end of stdin closes, then kill this process group."""
    sys.stdin.buffer.read()
    if os.name == "posix":
        os.killpg(0, signal.SIGKILL)
    os._exit(9)


def main() -> None:
    """Entry point of the process."""
    name, out, model, seconds, *dry = sys.argv[1:]
    threading.Thread(target=end_with_parent, daemon=True).start()
    code = run_part(name, Path(out), Path(model), float(seconds), dry=bool(dry))
    sys.stdout.flush()
    os._exit(code)  # the thread above holds stdin's lock, which an ordinary exit would wait for


if __name__ == "__main__":
    main()
