"""What becomes of a form after the gate: the sentence it carries, or the refusal. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

from cellseg_deploy.errors import ParityError
from cellseg_deploy.parity import ParityReport


def judge(report: ParityReport, path: Path, report_path: Path, *, unverified: bool) -> str:
    """The sentence for ``ModelSpec.parity``; raises ``ParityError`` if ``report`` does not let the model pass."""
    figures = (
        f"{report.n_cells} cells in {len(report.images)} images ({report.images_from}), largest difference of a "
        f"probability {report.max_difference:.1e}{''.join(f'; {note}' for note in report.notes)}"
    )
    if report.verdict == "passed":
        return f"verified: counts as {report.reference.backend} does under policy {report.policy.name}; {figures}"
    # Where nothing is found all probabilities are near 0, and so are their differences: look inside, too.
    tensors_agree = report.tensors_agree and not report.parts_at
    if report.verdict == "inconclusive" and unverified and tensors_agree:
        return f"unverified: too few cells to judge by, only tensors were compared; {figures}"
    why = "\n  - ".join(report.reasons)
    hint = ""
    if report.verdict == "inconclusive" and not unverified:
        hint = "\n--unverified writes it all the same if the tensors agree, and the model will say so"
    elif report.verdict == "inconclusive":
        hint = (
            f"\n--unverified needs probabilities that agree to {report.policy.tensor_tolerance:g} (they differ by "
            f"{report.max_difference:.1e}), and modules that agree within"
        )
    older = "; the older file of that name was left as it is" if path.exists() else ""
    raise ParityError(f"{path} was not written: parity {report.verdict}{older}; see {report_path}\n  - {why}{hint}")
