"""A run to look at, and a viewer with the stub network in place of the model that a run names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import DarknessBackend, draw_discs
from PIL import Image

from cellseg_deploy.images.find import find_images
from cellseg_deploy.run.folder import RunOptions, run_folder
from cellseg_deploy.run.record import Inputs
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.threads import plan
from cellseg_deploy.view.workspace import Workspace

TOUCHING = [(30, 30), (48, 30), (100, 70)]
"""Two discs that touch, which the stub finds as one cell, and one apart."""


class StubWorkspace(Workspace):
    """As ``Workspace``; ``DarknessBackend`` labels."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.labeller._segmenter = Segmenter(DarknessBackend())


def make_viewed_run(folder: Path) -> Path:
    """A run in ``folder/out`` over two images and a damaged one in ``folder/smears``; gives ``folder/out``."""
    smears = folder / "smears"
    (smears / "sub").mkdir(parents=True)
    Image.fromarray(draw_discs((100, 130), TOUCHING)).save(smears / "a.png")
    Image.fromarray(draw_discs((100, 130), [(20, 20), (60, 22)])).save(smears / "sub" / "b<i>.png")
    (smears / "bad.png").write_bytes((smears / "a.png").read_bytes()[:-30])
    return make_run(smears, folder / "out")


def make_run(images: Path, out: Path) -> Path:
    """A run of the stub network over ``images`` into ``out``, which it gives."""
    with Segmenter(DarknessBackend()) as segmenter:
        run_folder(
            segmenter,
            find_images([images]),
            out,
            options=RunOptions(),
            threads=plan(1, device="cpu"),
            inputs=Inputs.of([images]),
        )
    return out


def main() -> None:
    """``cellseg-view`` with the stub, for a process of its own."""
    from cellseg_deploy.cli import view
    from cellseg_deploy.view import workspace

    workspace.Workspace = StubWorkspace  # type: ignore[misc]
    view.main()


if __name__ == "__main__":
    main()
