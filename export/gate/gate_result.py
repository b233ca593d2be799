"""Outcome of the gate for a form: the report, the note in its ModelSpec, or the refusal.

    accepted  MODEL.parity.json, and files of an earlier refusal are removed
    refused   MODEL.refused.json and .jpg, so that an older model of that name keeps its own report

Needs no PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.errors import ParityError, plural
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.parity import picture as parity_picture
from cellseg_deploy.parity.compare import ParityReport

REPORT_END = ".parity.json"
REFUSED_END = ".refused.json"


def judge(report: ParityReport, path: Path, report_path: Path, *, unverified: bool) -> str:
    """Return the note for ``ModelSpec.parity`` of the model to be at ``path``; its report is then at ``report_path``.

    Raises ``ParityError`` if ``report`` does not let the model pass; the report and a picture of the worst image are
    written first, see ``refused_path_of``. Raises ``OutputError``.
    """
    figures = (
        f"{plural(report.n_cells, 'cell')} in {plural(len(report.images), 'image')} "
        f"({report.images_from}), largest difference of a "
        f"probability {report.max_difference:.1e}{''.join(f'; {note}' for note in report.notes)}"
    )
    # Where nothing is found all probabilities are near 0, and so are their differences: compare inner modules as well.
    tensors_agree = report.tensors_agree and not report.parts_at
    if report.verdict == "passed":
        sentence = f"verified: counts as {report.reference.backend} does under policy {report.policy.name}; {figures}"
    elif report.verdict == "inconclusive" and unverified and tensors_agree:
        sentence = f"unverified: too few cells to judge by, only tensors were compared; {figures}"
    else:
        raise _refusal(report, path, report_path, unverified=unverified)
    write_bytes(report_path, report.to_json())
    refused = refused_path_of(report_path)
    for left in (refused, refused.with_suffix(".jpg")):
        left.unlink(missing_ok=True)
    return sentence


def refused_path_of(report_path: Path) -> Path:
    """Path of a refused model's report, next to its picture (.jpg); ``report_path``: that of an accepted one."""
    return report_path.with_name(report_path.name.removesuffix(REPORT_END) + REFUSED_END)


def _refusal(report: ParityReport, path: Path, report_path: Path, *, unverified: bool) -> ParityError:
    """Return the error to raise, after writing the report and its picture."""
    refused = refused_path_of(report_path)
    picture = refused.with_suffix(".jpg")
    write_bytes(refused, report.to_json())
    if report.worst is not None:
        write_bytes(picture, parity_picture.encode(report.worst, picture.suffix))
    hint = ""
    if report.verdict == "inconclusive" and not unverified:
        hint = "\n--unverified writes it anyway if the tensors agree, and records that in the model"
    elif report.verdict == "inconclusive":
        hint = (
            f"\n--unverified needs probabilities that agree to {report.policy.tensor_tolerance:g} (they differ by "
            f"{report.max_difference:.1e}), and modules that agree within"
        )
    older = "; the older file of that name and its report were left as they are" if path.exists() else ""
    why = "\n  - ".join(report.reasons)
    return ParityError(f"{path} was not written: parity {report.verdict}{older}; see {refused}\n  - {why}{hint}")
