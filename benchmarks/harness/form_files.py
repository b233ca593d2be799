"""Files that forms are opened from, and the parity gate's verdict on each.

They are in a folder made by ``python -m cellseg_benchmarks parity``, or are made here by the same table; engines for
a GPU are built by ``cellseg-export tensorrt`` on that GPU. A form that the gate refused has no file and is not timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cellseg_benchmarks.harness.flops import Flops, count_flops
from cellseg_benchmarks.harness.forms import FP32_ONNX, Form
from cellseg_benchmarks.quality.parity_table import FORMS as PARITY_FORMS
from cellseg_benchmarks.quality.parity_table import TABLE_FILE, parity_table, run_export, sha256_of
from cellseg_deploy.errors import BackendUnavailableError, ModelError, ParityError, UsageError
from cellseg_deploy.files.atomic import make_folder

Say = Callable[[str], None]
NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Network:
    """A network and the files of its forms. ``weights``: .safetensors or run folder. ``verdicts``: of the gate, by form
    of the parity table or file name. ``flops``: per tile, None without an fp32 .onnx to count them in."""

    name: str
    weights: Path
    folder: Path
    verdicts: dict[str, str]
    flops: Flops | None

    def file(self, form: Form) -> Path:
        """Path of the file that ``form`` is opened from."""
        return self.folder / form.file if form.file else self.weights

    def verdict(self, form: Form) -> str:
        """The gate's verdict on ``form``."""
        if form.engine == "pytorch":
            return "reference" if form.arithmetic == "fp32" else NOT_JUDGED
        return self.verdicts.get(form.judged_as or form.file, NOT_JUDGED)

    def missing(self, form: Form) -> str:
        """Why ``form`` has no file, "" if it has one."""
        if self.file(form).exists():
            return ""
        verdict = self.verdict(form)
        return f"{form.file} was not made" + ("" if verdict == NOT_JUDGED else f": {verdict}")


def network_of(weights: Path, folder: Path) -> Network:
    """``weights`` with the files in ``folder``. Raises ``UsageError`` if the folder is of another network."""
    name = weights.stem if weights.is_file() else weights.name
    onnx = folder / FP32_ONNX
    return Network(name, weights, folder, read_verdicts(folder, weights), count_flops(onnx) if onnx.is_file() else None)


def read_verdicts(folder: Path, weights: Path) -> dict[str, str]:
    """Verdicts of the parity table in ``folder`` by form, empty without one; ``UsageError`` if not of ``weights``."""
    path = folder / TABLE_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
        of, verdicts = found["network_sha256"], {row["form"]: row["verdict"] for row in found["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}); delete it, or make the forms again") from error
    if of != sha256_of(weights):
        raise UsageError(f"{path} is of another network than {weights.name}; name the folder of its own forms")
    return verdicts


def make_forms(
    weights: Path, folder: Path, forms: Sequence[Form], *, gate: Sequence[str] = (), say: Say = lambda _: None
) -> None:
    """Make the files that ``forms`` need of ``weights`` in ``folder``, through the gate; existing files are kept."""
    make_folder(folder)
    by_file = {form.file: form.name for form in PARITY_FORMS}
    names = {form.judged_as for form in forms if form.judged_as}
    names |= {by_file[form.file] for form in forms if form.file in by_file}
    if names:
        parity_table(weights, folder, sorted(names), gate=gate, say=say)
    for precision in ("fp16", "fp32"):
        engine = f"{precision}.engine"
        if any(form.file == engine for form in forms) and not (folder / engine).is_file():
            _make_engine(folder, engine, precision, say)


def _make_engine(folder: Path, engine: str, precision: str, say: Say) -> None:
    say(f"{engine} ...")
    code, text = run_export(("tensorrt", str(folder / FP32_ONNX), "-o", str(folder / engine), "--precision", precision))
    verdict = {0: "passed", ParityError.exit_code: "failed", BackendUnavailableError.exit_code: "not run"}
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    say(f"{engine}: {verdict.get(code, 'failed')}{'' if code == 0 else f': {last}'}")
