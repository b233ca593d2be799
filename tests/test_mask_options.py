"""Every command that reads masks takes ``--mask-foreground``."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

import cellseg_benchmarks.cli
import cellseg_deploy.cli.evaluate
import cellseg_export.cli
import cellseg_train.cli


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield name, command
        return
    for inner in command.list_commands(click.Context(command)):
        found = command.get_command(click.Context(command), inner)
        assert found is not None
        yield from leaves(found, f"{name} {inner}")


ROOTS = {
    "cellseg-train": cellseg_train.cli.command,
    "cellseg-evaluate": cellseg_deploy.cli.evaluate.command,
    "cellseg-export": cellseg_export.cli.command,
    "cellseg_benchmarks": cellseg_benchmarks.cli.command,
}
READING_MASKS = {
    name: command
    for root, group in ROOTS.items()
    for name, command in leaves(group, root)
    if any("--masks" in parameter.opts for parameter in command.params)
}


def test_they_are_known() -> None:
    assert set(READING_MASKS) == {
        "cellseg-train",
        *(f"cellseg-evaluate {name}" for name in ("score", "calibrate", "describe")),
        *(f"cellseg-export {name}" for name in ("onnx", "verify", "tensorrt", "openvino", "int8")),
        *(f"cellseg_benchmarks {name}" for name in ("parity", "study", "savings", "robustness")),
    }


@pytest.mark.reliability
@pytest.mark.parametrize("name", READING_MASKS)
def test_it_says_which_numbers_are_cells(name: str) -> None:
    (option,) = (p for p in READING_MASKS[name].params if "--mask-foreground" in p.opts)
    assert option.default == "auto"
