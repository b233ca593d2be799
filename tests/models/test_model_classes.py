"""Classes of cells in the description of a model: read back, refused where they contradict the channels."""

from __future__ import annotations

import json

import pytest
from conftest import make_spec

from cellseg_deploy.errors import ModelError
from cellseg_deploy.models.spec import from_json, to_json

CLASSES = ("red", "white", "platelet")


def test_classes_are_read_back() -> None:
    spec = make_spec(channels=("foreground", *CLASSES), classes=CLASSES)
    assert from_json(to_json(spec), source="m") == spec


def test_a_model_written_before_there_were_classes_has_none() -> None:
    old = json.loads(to_json(make_spec()))
    del old["classes"]
    assert from_json(json.dumps(old), source="m").classes == ()


@pytest.mark.parametrize(
    ("channels", "classes", "words"),
    [
        (("foreground", "white", "red"), ("red", "white"), "are not the last of the channels"),
        (("foreground",), ("red", "white"), "are not the last of the channels"),
        (("foreground", "red"), ("red",), "expected two or more"),
        (("foreground", "red", "red"), ("red", "red"), "expected each class once, got red, red"),
        (("foreground", "red", "boundary"), ("red", "boundary"), "'boundary' is the name of another channel"),
        (("foreground", "red", "a,b"), ("red", "a,b"), "leading or trailing spaces, got 'a,b'"),
        (("foreground", "red", " x"), ("red", " x"), "leading or trailing spaces, got ' x'"),
        (("foreground", "red", ""), ("red", ""), "leading or trailing spaces, got ''"),
    ],
)
def test_classes_that_contradict_the_model_are_refused(
    channels: tuple[str, ...], classes: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        from_json(to_json(make_spec(channels=channels, classes=classes)), source="m")
