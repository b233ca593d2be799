"""Agreement required of two forms of a network before the second is delivered: one policy per kind of arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from cellseg_deploy.errors import UsageError


@dataclass(frozen=True)
class ParityPolicy:
    """Limits for a candidate, at every operating point; the defaults are those of an fp32 form.

    A limit of None: the figure is reported, but decides nothing.

    ``max_count_difference``: cells, in each image. ``max_total_difference``: of the counts of all images together, as a
    share of the reference's. ``min_f1``: matched F1 at ``f1_iou``, over all images. ``max_differing_share``: share of
    the pixels of all images that belong to another cell or to none (see ``parity.differing_pixels``).
    ``max_f1_drop``: how much F1 at IoU 0.5 against the truth may fall below the reference's; needs true labels.
    ``min_cells``: a reference that finds fewer (or, if the truth decides, fewer true cells) is inconclusive, because a
    network that finds nothing agrees with everything. ``tensor_tolerance``: a probability that differs by more counts
    in ``share_over``; with too few cells to judge, none may. ``max_class_changes``: share of the cells that both find
    that may change class, for networks that distinguish classes.
    """

    name: str = "fp32"
    min_cells: int = 200
    max_count_difference: int | None = 0
    f1_iou: float = 0.9
    min_f1: float | None = 0.999
    max_differing_share: float | None = 1e-5
    max_total_difference: float | None = None
    max_f1_drop: float | None = None
    tensor_tolerance: float = 1e-3
    max_class_changes: float = 0.001

    @property
    def needs_truth(self) -> bool:
        """Whether the policy can only be judged with true labels."""
        return self.max_f1_drop is not None

    def __str__(self) -> str:
        limits = []
        if self.max_count_difference is not None:
            limits.append(f"counts within {self.max_count_difference} in each image")
        if self.max_total_difference is not None:
            limits.append(f"total count within {self.max_total_difference:.2%}")
        if self.min_f1 is not None:
            limits.append(f"F1 at IoU {self.f1_iou:g} >= {self.min_f1:g}")
        if self.max_differing_share is not None:
            limits.append(f"differing pixels <= {self.max_differing_share:g}")
        if self.max_f1_drop is not None:
            limits.append(f"F1 against truth falls by at most {self.max_f1_drop:g}")
        return f"{self.name}: {', '.join(limits)}, at least {self.min_cells} cells"


def policy_for(precision: str) -> ParityPolicy:
    """Return the policy for forms that compute in ``precision``: fp32, fp16, mixed (fp16 and fp32), bf16 or int8.

    Raises ``UsageError`` for any other.
    """
    if precision == "fp32":
        return ParityPolicy()
    if precision in ("fp16", "mixed", "bf16"):
        # Half rounds to 3 digits, bf16 to 2: rims move by a pixel here and there, so pixels and single images decide
        # nothing, but cells and their total must stay.
        return ParityPolicy(
            name="bf16" if precision == "bf16" else "fp16",
            max_count_difference=None,
            min_f1=0.99,
            max_differing_share=None,
            max_total_difference=0.005,
            tensor_tolerance=0.1 if precision == "bf16" else 0.05,
            max_class_changes=0.01,
        )
    if precision == "int8":
        return ParityPolicy(
            name="int8",
            max_count_difference=None,
            min_f1=None,
            max_differing_share=None,
            max_f1_drop=0.01,
            tensor_tolerance=0.2,
            max_class_changes=0.02,
        )
    raise UsageError(f"no parity policy for precision {precision!r}; expected fp32, fp16, mixed, bf16 or int8")
