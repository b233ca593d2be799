"""Shards of a run joined into one folder: what a run of all images would have left, but for order and times.

Everything is checked before anything is written. Files and journal lines are then written image by image as in a run,
so a merge that was killed is resumed by merging again, and the merged folder can be resumed by ``cellseg-infer``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellseg_deploy.cells.classes import counting_classes
from cellseg_deploy.errors import DataError, OutputError, UsageError, plural
from cellseg_deploy.files.apart import check_apart
from cellseg_deploy.files.atomic import write_bytes
from cellseg_deploy.files.json_record import content_of
from cellseg_deploy.images.find import FoundImage
from cellseg_deploy.models import spec as specs
from cellseg_deploy.models.spec import ModelSpec
from cellseg_deploy.outputs.formats import chosen_formats
from cellseg_deploy.report.page import About
from cellseg_deploy.run import tables as run_tables
from cellseg_deploy.run.commit import Committer
from cellseg_deploy.run.identity import RunIdentity, differences
from cellseg_deploy.run.image_work import Finished
from cellseg_deploy.run.journal import ImageRecord, Journal, JournalContent, whole_records
from cellseg_deploy.run.output_folder import RUN_JSON, held_folder, places, sweep
from cellseg_deploy.run.plan import Planned
from cellseg_deploy.run.record import EDITED, SHARD, ImageResult, RunOptions, RunSummary, scales_in
from cellseg_deploy.run.reporting import Reporting
from cellseg_deploy.run.resume import begin, check_files, look_at, some
from cellseg_deploy.run.shard import Shard
from cellseg_deploy.run.state import RunState

_OF_ALL = ("images_found", "names_sha256")
"""What run.json records of all images found, equal for all shards of a run."""


@dataclass(frozen=True)
class FinishedShard:
    """A shard's folder, complete. ``record``: its run.json; ``identity``: that of the whole run."""

    out: Path
    shard: Shard
    journal: JournalContent
    record: Mapping[str, Any]
    identity: RunIdentity

    @property
    def scales(self) -> dict[str, float]:
        """Scales by group of images, measured or taken from another run."""
        return {**scales_in(self.out / RUN_JSON), **self.journal.scales}

    @property
    def told(self) -> dict[str, Any]:
        """``identity`` in the order in which the run told it, for report and run.json."""
        told: dict[str, Any] = self.record["identity"]
        return {**told, "settings": {name: value for name, value in told["settings"].items() if name != SHARD}}

    @property
    def spec(self) -> ModelSpec:
        """Description of the model."""
        return specs.from_json(json.dumps(self.record["shard"]["model_spec"]), source=str(self.out / RUN_JSON))


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    overwrite: bool = False,
    group_by: str = "",
    report: bool = True,
    on_result: Callable[[ImageResult], None] = lambda _: None,
) -> RunSummary:
    """Join the shards in ``folders`` into the folder ``out``; the shards stay as they are.

    ``overwrite``: replace an earlier run in ``out``. ``group_by``, ``report``: see ``RunOptions``.

    Raises ``UsageError`` if the folders are not all the shards of one run, ``OutputError`` if ``out`` cannot be used.
    """
    check_apart(folders, out)
    shards = read_shards(folders)
    first = shards[0]
    spec, identity = first.spec, first.identity
    formats = chosen_formats(identity.saved)
    options = RunOptions(save=identity.saved, overwrite=overwrite, group_by=group_by, report=report)
    counting = counting_classes(spec.classes, identity.settings.get("classes"))
    summary = RunSummary(out, classes=spec.classes, counting=counting)
    about = About(first.told, spec, first.record["settings"]["save"], group_by) if report else None
    with_thresholds = report and any(_has_thresholds(shard) for shard in shards)
    run_files = Reporting(replace(options, report_thresholds=int(with_thresholds)), about).run_files()
    with held_folder(out):
        folder = begin(out, identity, overwrite=overwrite)
        state = RunState.of(folder.journal)
        _check_no_others(out, state, shards)
        with Journal.create(out, identity) if folder.journal is None else Journal.resume(folder.journal) as journal:
            committer = Committer(out, state, journal, formats, run_files)
            sweep(out, state.image_files, places(formats, state.output_names.values()))
            for shard in shards:
                for group, scale in shard.journal.scales.items():
                    if state.scales.get(group) != scale:
                        committer.append_scale(group, scale)
            for shard, record in _records(shards):
                result = _one_image(committer, shard, record)
                summary.add(result)
                on_result(result)
            for write in committer.writers():
                write()
            summary.warnings = run_tables.warned(state.in_order)
            summary.edited = {file for shard in shards for file in shard.record.get(EDITED, [])}
        write_bytes(out / RUN_JSON, _run_json(shards, summary))
    return summary


def read_shards(folders: Sequence[Path]) -> list[FinishedShard]:
    """Return the shards in ``folders`` in their order, all of one run. Raises ``UsageError`` for anything else."""
    if not folders:
        raise UsageError("no shard to merge; pass the output folders of `cellseg-infer --shard I/N`")
    shards = sorted((_read(Path(folder)) for folder in folders), key=lambda each: each.shard.index)
    first = shards[0]
    for other in shards[1:]:
        if other.shard.count != first.shard.count:
            raise UsageError(
                f"{first.out} is shard {first.shard} and {other.out} shard {other.shard}; expected shards of one run"
            )
        if unlike := differences(first.identity, other.identity):
            raise UsageError(
                f"{other.out} is not of the same run as {first.out}: {'; '.join(unlike)}; run one of them again"
            )
        if any(other.record["shard"][key] != first.record["shard"][key] for key in _OF_ALL):
            found = [plural(each.record["shard"]["images_found"], "image") for each in (first, other)]
            raise UsageError(
                f"{first.out} is a part of {found[0]} and {other.out} of {found[1]}, not the same ones; start all "
                "shards again, which does only what is missing"
            )
        of_first, of_other = first.scales, other.scales
        for group in sorted(of_first.keys() & of_other.keys()):
            if (here := of_first[group]) != (there := of_other[group]):
                raise UsageError(
                    f"the scale of {group} is {here:g} in {first.out} and {there:g} in {other.out}, as the images "
                    "changed in between; run the later shards again with `cellseg-infer --like` and the run.json of "
                    "the first"
                )
    _check_complete(shards)
    return shards


def _check_complete(shards: Sequence[FinishedShard]) -> None:
    count = shards[0].shard.count
    by_index: dict[int, Path] = {}
    for each in shards:
        if (same := by_index.setdefault(each.shard.index, each.out)) is not each.out:
            raise UsageError(f"{same} and {each.out} are both shard {each.shard}; pass each shard once")
    if missing := [f"{index}/{count}" for index in range(1, count + 1) if index not in by_index]:
        raise UsageError(f"{plural(len(missing), 'shard')} of {count} missing: {some(missing)}; pass all of them")
    for each in shards:
        if strangers := [name for name in each.journal.entries if not each.shard.has(name)]:
            raise UsageError(f"{each.out}: {some(strangers)} does not belong to shard {each.shard}; run it again")
    owners = Counter(name for each in shards for name in RunState.of(each.journal).output_names.values())
    if twice := [name for name, number in owners.items() if number > 1]:
        raise UsageError(f"files named {some(twice)} are in several shards, as images were added; run all shards again")


def _read(folder: Path) -> FinishedShard:
    try:
        journal = look_at(folder).journal
    except OutputError as error:
        raise UsageError(f"{folder}: not the output folder of a shard ({error})") from error
    record = content_of(folder / RUN_JSON)
    if journal is None or record.get("status") is None:
        raise UsageError(f"{folder}: not the output folder of a shard; expected one of `cellseg-infer --shard I/N`")
    settings = dict(journal.identity.settings)
    said = settings.pop(SHARD, None)
    if said is None or "shard" not in record:
        raise UsageError(f"{folder}: a whole run, not a shard; expected a folder of `cellseg-infer --shard I/N`")
    if record["status"] != "finished" or record["totals"]["remaining"]:
        raise UsageError(
            f"{folder}: shard {said} has not finished (it is {record['status']}, or was killed); start it again, "
            "which resumes it"
        )
    return FinishedShard(folder, Shard.parse(said), journal, record, replace(journal.identity, settings=settings))


def _has_thresholds(shard: FinishedShard) -> bool:
    return any(record.thresholds for record in whole_records(shard.journal.path, shard.journal.entries.values()))


def _records(shards: Sequence[FinishedShard]) -> list[tuple[FinishedShard, str]]:
    """Return all images with their shards, in the order of a run."""
    return sorted(((shard, name) for shard in shards for name in shard.journal.entries), key=lambda item: item[1])


def _check_no_others(out: Path, state: RunState, shards: Sequence[FinishedShard]) -> None:
    ours = {name for shard in shards for name in shard.journal.entries}
    if others := sorted(state.entries.keys() - ours):
        raise OutputError(
            f"{out}: holds images that are in no shard ({some(others)}); choose another folder, or replace it with "
            "`overwrite=True`"
        )


def _one_image(committer: Committer, shard: FinishedShard, name: str) -> ImageResult:
    """Copy one image's files and line, unless an earlier merge did. Raises ``UsageError`` if a file is missing."""
    (record,) = whole_records(shard.journal.path, [shard.journal.entries[name]])
    known = committer.state.entries.get(name)
    if known is not None and _same(known.record, record) and not any(check_files(known.record, committer.out)):
        return ImageResult.of(record)
    item = Planned(FoundImage(Path(name), name), "work", "", record.output_name, ())
    if record.status != "done":
        return committer.commit_failure(item, record.result["error"])
    problem, _ = check_files(record, shard.out)  # an edited file is kept as it is
    if problem:
        raise UsageError(f"{shard.out}: {name}: {problem}; start shard {shard.shard} again, which makes it again")
    try:
        files = {file.path: (shard.out / file.path).read_bytes() for file in record.outputs}
    except OSError as error:
        raise UsageError(f"{error.filename}: cannot be read ({error.strerror}); check permissions") from error
    try:
        return committer.commit(item, Finished(record, {**files}, {"write": 0.0, **record.seconds}))
    except DataError as error:  # the name fits the file system of the shard, not this one
        raise OutputError(f"{committer.out}: {error}") from error


def _same(one: ImageRecord, other: ImageRecord) -> bool:
    return (one.status, one.input, one.outputs, one.result) == (other.status, other.input, other.outputs, other.result)


def _run_json(shards: Sequence[FinishedShard], summary: RunSummary) -> bytes:
    """Content of run.json: as of a whole run, with the times of the shards."""
    first = shards[0].record
    walls = [float(shard.record["wall_seconds"]) for shard in shards]
    busy = sum(float(shard.record["engine_busy"]) * wall for shard, wall in zip(shards, walls, strict=True))
    stages = Counter[str]()
    for shard in shards:
        stages.update(shard.record["stage_seconds"])
    record = {
        **{name: value for name, value in first.items() if name != "shard"},
        "settings": {
            **{k: v for k, v in first["settings"].items() if k != SHARD},
            "scales": {group: scale for shard in shards for group, scale in shard.scales.items()},
        },
        "identity": shards[0].told,
        "started": min(shard.record["started"] for shard in shards),
        "wall_seconds": round(max(walls), 3),
        "engine_busy": round(busy / sum(walls), 4) if sum(walls) else 0.0,
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in stages.items()},
        "totals": summary.totals,
        "warnings": summary.warnings,
        EDITED: summary.edited_files,
        "merged": [
            {name: shard.record[name] for name in ("machine", "started", "wall_seconds")}
            | {"shard": str(shard.shard), "path": str(shard.out.absolute())}
            for shard in shards
        ],
    }
    return json.dumps(record, indent=2, allow_nan=False).encode("ascii") + b"\n"
