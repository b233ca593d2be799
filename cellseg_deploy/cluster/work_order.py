"""What a worker must know of a run, as a file in its output folder, and what it hands back: no pixels, no tables.

The file has the name of a temporary file, so every next run removes it should it be left behind. That a worker can read
it shows that the worker sees the same output folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from cellseg_deploy.backends import EngineOptions
from cellseg_deploy.cells.count_rules import CountRule
from cellseg_deploy.cells.field_of_view import Field
from cellseg_deploy.cells.instances import BorderCells
from cellseg_deploy.errors import OutputError, UsageError
from cellseg_deploy.files.atomic import temporary_in, write_bytes
from cellseg_deploy.images.find import absolute
from cellseg_deploy.images.options import ReadOptions
from cellseg_deploy.models import default_model_path
from cellseg_deploy.run.identity import RunIdentity
from cellseg_deploy.run.record import SHARD, RunOptions, RunSetup
from cellseg_deploy.run.repeat import engine_arguments
from cellseg_deploy.segmenter import Segmenter


@dataclass(frozen=True)
class WorkOrder:
    """Model, engine and settings of a run, by their names there. ``form``: the file that is opened, ``given``: the one
    that was passed; both without a folder for the model that ships, which each machine has elsewhere. ``threads``: of
    the engine in each worker, None for as many as Dask gives the worker. ``device_per_worker``: whether the N-th
    worker takes the N-th GPU. ``identity``: what results depend on, for the worker to compare."""

    form: str
    given: str
    engine: EngineOptions
    task: str
    scale: float | None
    batch_size: int
    halo: int
    border_cells: BorderCells
    classes: tuple[str, ...] | None
    save: tuple[str, ...]
    reading: ReadOptions
    count_rule: CountRule
    field_of_view: Field
    threads: int | None
    device_per_worker: bool
    roots: tuple[str, ...]
    identity: dict[str, Any]

    @classmethod
    def of(cls, setup: RunSetup, *, threads: int | None, device_per_worker: bool) -> WorkOrder:
        """Return the order for the run ``setup``. Raises ``UsageError`` if its model is in no file."""
        segmenter, options, identity = setup.segmenter, setup.options, setup.identity
        backend = segmenter.backend
        if backend.path is None:
            raise UsageError(
                "workers of a cluster open the model by its path; expected a model that was loaded from a file"
            )
        form, given = absolute(backend.path), absolute(backend.given or backend.path)
        if given == absolute(default_model_path()):
            form, given = Path(form.name), Path(given.name)
        return cls(
            form=str(form),
            given=str(given),
            engine=EngineOptions(**engine_arguments(identity), threads=threads),
            task=segmenter.task,
            scale=None if segmenter.auto_scale else segmenter.scale,
            batch_size=segmenter.batch_size,
            halo=segmenter.halo,
            border_cells=segmenter.border_cells,
            classes=segmenter.counting_classes if backend.spec.classes else None,
            save=options.save,
            reading=options.reading,
            count_rule=options.count_rule,
            field_of_view=options.field_of_view,
            threads=threads,
            device_per_worker=device_per_worker,
            roots=setup.inputs.roots,
            identity=identity.to_json(),
        )

    def open(self, *, threads: int, number: int | None) -> Segmenter:
        """Open the model in a worker with ``threads``; ``number``: of the worker in its cluster, from 0."""
        there = default_model_path().parent
        engine = replace(self.engine, threads=self.threads or threads)
        if self.device_per_worker and number is not None and (self.engine.device or "").startswith("cuda"):
            engine = replace(engine, device=f"cuda:{number}")
        return Segmenter.load(
            there / self.form,
            engine=engine,
            given=there / self.given,
            task=self.task,
            scale="auto" if self.scale is None else self.scale,
            batch_size=self.batch_size,
            halo=self.halo,
            border_cells=self.border_cells,
            classes=self.classes,
        )

    @property
    def options(self) -> RunOptions:
        """Those that the work on an image depends on."""
        return RunOptions(
            save=self.save, reading=self.reading, count_rule=self.count_rule, field_of_view=self.field_of_view
        )


def of_results(identity: RunIdentity) -> RunIdentity:
    """Return what of ``identity`` must be equal on all machines: not where the images are, nor which GPU it is."""
    settings = {name: value for name, value in identity.settings.items() if name != SHARD}
    backend = {**identity.backend, "device": str(identity.backend["device"]).partition(":")[0]}
    return replace(identity, inputs=(), backend=backend, settings=settings)


def write_order(order: WorkOrder, out: Path) -> str:
    """Write ``order`` into ``out``; return the name of its file. Raises ``OutputError``."""
    path = temporary_in(out)
    write_bytes(path, msgspec.json.encode(order))
    return path.name


def read_order(out: Path, name: str) -> WorkOrder:
    """Read what ``write_order`` wrote. Raises ``OutputError`` if this machine does not see the file."""
    try:
        return msgspec.json.decode((out / name).read_bytes(), type=WorkOrder)
    except OSError as error:
        raise OutputError(
            f"{out}: not the output folder of this run ({os.strerror(error.errno or 0)}: {name}); expected a folder "
            "that the workers and the machine that starts the run all see under this path"
        ) from error
