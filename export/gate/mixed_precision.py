"""The gate in real half arithmetic, and the search for the parts of a network that need FP32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cellseg_deploy.backends.base import Backend
from cellseg_deploy.errors import ParityError
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.parity.compare import ParityPolicy, compare
from cellseg_export.forms.fp16_graph import HALF_MAX, check_types, parts_beyond_half, parts_of, to_half
from cellseg_export.gate.fp16_emulator import HalfBackend

if TYPE_CHECKING:
    from cellseg_export.gate.verify import GateImages

_MEMORY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class HalfOutcome:
    """Result of a graph in real half arithmetic. ``faults``: why it is refused, empty if it passes. ``part``: where it
    overflows, empty if it does not. ``notes``: how close it came."""

    faults: tuple[str, ...]
    part: str = ""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the graph has no faults."""
        return not self.faults


def check_in_half(
    model: Any, spec: ModelSpec, reference: Backend, images: GateImages, policy: ParityPolicy, *, batch_size: int = 8
) -> HalfOutcome:
    """Run the half-precision graph ``model`` (onnx.ModelProto) in PyTorch on ``images`` against ``reference``.

    It fails if a value overflows, or if counts and cells violate ``policy``; with too few cells to judge, if a
    probability differs by more than the policy's tolerance.
    """
    backend = HalfBackend(model, spec)
    try:
        report = compare(reference, backend, images.load(), policy, truth=images.truth, batch_size=batch_size)
    except ParityError:
        if backend.overflow is None:
            raise
        return HalfOutcome((f"in half arithmetic: {backend.overflow}",), backend.overflow.part)
    if report.verdict == "failed" or (report.verdict == "inconclusive" and not report.tensors_agree):
        return HalfOutcome(tuple(f"in half arithmetic: {reason}" for reason in report.reasons))
    part = max(backend.largest, key=lambda name: backend.largest[name])
    return HalfOutcome(
        (),
        notes=(
            f"checked in half arithmetic (PyTorch on the CPU): largest value {backend.largest[part]:.4g} in {part}, "
            f"half ends at {HALF_MAX:g}",
        ),
    )


def mixed_form(
    model: Any,
    spec: ModelSpec,
    reference: Backend,
    images: GateImages,
    policy: ParityPolicy,
    *,
    batch_size: int = 8,
    on_try: Callable[[str], None] = lambda _: None,
) -> Any:
    """The fp32 ``model`` in half precision, with the parts that need it kept in FP32; a new onnx.ModelProto.

    If no choice of parts passes, returns the plain half form: the gate that follows reports why. ``on_try``: called for
    each attempt. Raises ``ModelError``.
    """
    remembered = Remembered(reference)

    def attempt(keep: Collection[str]) -> HalfOutcome:
        on_try(f"trying with FP32 in {', '.join(sorted(keep)) or 'no part'}")
        half = to_half(model, keep)
        check_types(half, keep)
        return check_in_half(half, spec, remembered, images, policy, batch_size=batch_size)

    return to_half(model, parts_to_keep(parts_of(model), list(parts_beyond_half(model)), attempt))


def parts_to_keep(
    parts: Sequence[str], start: Collection[str], attempt: Callable[[Collection[str]], HalfOutcome]
) -> tuple[str, ...]:
    """Find which of ``parts`` must stay in FP32 in addition to ``start`` so that ``attempt(kept)`` passes.

    Overflowing parts are found directly, one per attempt. Where precision is insufficient, the shortest passing prefix
    of the other parts is found by bisection; its last part is needed; repeated until the parts found suffice. None of
    them can be left out, as long as more FP32 never makes things worse. ``start`` alone if FP32 in all parts fails too.
    """
    kept = dict.fromkeys(start)
    outcome = attempt(tuple(kept))
    while outcome.part and outcome.part in parts and outcome.part not in kept:
        kept[outcome.part] = None
        outcome = attempt(tuple(kept))
    rest = [part for part in parts if part not in kept]
    if outcome.faults and not attempt((*kept, *rest)).passed:
        return _in_order(parts, start)
    while outcome.faults:
        fails, passes = 0, len(rest)  # lengths of prefixes
        while passes - fails > 1:
            middle = (fails + passes) // 2
            if attempt((*kept, *rest[:middle])).passed:
                passes = middle
            else:
                fails = middle
        kept[rest[passes - 1]] = None
        rest = rest[: passes - 1]
        outcome = attempt(tuple(kept))
    return _in_order(parts, kept)


class Remembered(Backend):
    """Wraps a backend and caches its answers, up to half a gigabyte, so that many candidates cost one reference."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.name, self.device, self.precision = backend.name, backend.device, backend.precision
        self.spec = backend.spec
        self._answers: dict[bytes, npt.NDArray[np.float32]] = {}
        self._bytes = 0

    def _predict(self, tiles_nhwc: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        key = hashlib.sha256(tiles_nhwc.tobytes()).digest()
        if key in self._answers:
            return self._answers[key].copy()
        answer = self._backend.predict(tiles_nhwc)
        if self._bytes + answer.nbytes <= _MEMORY_BYTES:
            self._answers[key] = answer.copy()
            self._bytes += answer.nbytes
        return answer

    def describe(self) -> dict[str, Any]:
        """Description of the wrapped backend."""
        return self._backend.describe()


def _in_order(parts: Sequence[str], chosen: Collection[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part in chosen)
