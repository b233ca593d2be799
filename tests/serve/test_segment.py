"""What the service answers to one image and to several: results, parameters, forms of the answer."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
import tifffile
from conftest import DarknessBackend
from service_stub import DEFAULTS, ask, png, service

from cellseg_deploy.errors import UsageError
from cellseg_deploy.outputs.formats import FORMATS
from cellseg_deploy.segmenter import Segmenter
from cellseg_deploy.serve.limits import Limits
from cellseg_deploy.serve.outputs import accepted
from cellseg_deploy.serve.service import Service
from cellseg_deploy.serve.settings import PARAMETERS, parse
from cellseg_deploy.serve.uploads import UnsupportedBodyError, clean_name, uploads_in

pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")


@pytest.fixture(scope="module")
def opened():
    with service() as running:
        yield running


def expected():
    """The result of the library for the same bytes."""
    file = io.BytesIO(png())
    file.name = "a.png"
    return Segmenter(DarknessBackend())(file)


@pytest.mark.parametrize("way", ["raw", "form"])
def test_an_image_is_counted_as_by_the_library(opened: Service, way: str) -> None:
    sent = {"content": png()} if way == "raw" else {"files": {"image": ("dir/a.png", png())}}
    answer = ask(opened, "POST", "/v1/segment?name=a.png" if way == "raw" else "/v1/segment", **sent)
    assert answer.status_code == 200, answer.text
    found, want = answer.json(), expected()
    assert (found["image"], found["count"], found["counted"]) == ("a.png", want.count, int(want.counted().sum()))
    assert found["confluence"] == want.confluence
    assert (found["width"], found["height"], found["task"]) == (130, 100, "counting")
    for name, column in want.segmented.columns.items():
        assert [cell[name] for cell in found["cells"]] == column.tolist()


@pytest.mark.parametrize(
    ("accept", "output", "name"),
    [
        ("image/tiff", "labels.tif", "labels"),
        ("application/geo+json", "geojson", "geojson"),
        ("image/jpeg", "overlay.jpg", "overlays"),
    ],
)
def test_files_are_byte_equal_to_those_of_a_run(opened: Service, accept: str, output: str, name: str) -> None:
    want = next(each for each in FORMATS if each.name == name).encode(expected().segmented)
    by_accept = ask(opened, "POST", "/v1/segment?name=a.png", content=png(), headers={"Accept": accept})
    by_name = ask(opened, "POST", f"/v1/segment?name=a.png&output={output}", content=png())
    assert by_accept.content == by_name.content == want
    assert by_accept.headers["content-type"] == accept
    assert by_accept.headers["cellseg-count"] == "3"


def test_label_images_and_overlays_come_as_png_too(opened: Service) -> None:
    labels = ask(opened, "POST", "/v1/segment?output=labels.png", content=png()).content
    decoded = imagecodecs.png_decode(labels)
    assert decoded.dtype == np.uint16
    assert (decoded == expected().labels).all()
    overlay = ask(opened, "POST", "/v1/segment", content=png(), headers={"Accept": "image/png"}).content
    assert imagecodecs.png_decode(overlay).shape[2] == 3


def test_warnings_are_where_people_look(opened: Service) -> None:
    dark = io.BytesIO()
    tifffile.imwrite(dark, np.full((60, 60), 300, np.uint16), photometric="minisblack")
    found = ask(opened, "POST", "/v1/segment", content=dark.getvalue())
    kinds = [each["kind"] for each in found.json()["warnings"]]
    assert "bit depth" in kinds
    picture = ask(opened, "POST", "/v1/segment?output=overlay.png", content=dark.getvalue())
    assert "bit depth" in picture.headers["cellseg-warnings"]


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("task=x", "task must be one of counting, confluence, got 'x'"),
        ("threshold=2", "threshold must be a number between 0 and 1, got 2"),
        ("threshold=nan", "threshold must be a number, got 'nan'"),
        ("scale=0x10", "scale must be a number, got '0x10'"),
        ("scale=99", "scale must lie between 1/32 and 32"),
        ("scale=1&cell_diameter=20", "exclude each other"),
        ("cell_diameter=large", "cell_diameter must be a number of pixels or auto, got 'large'"),
        ("cell_diameter=-1", "cell diameter must be a positive number"),
        ("count_rule=most", "count_rule must be one of half, all, exclude-border, frame"),
        ("border_cells=all", "border_cells must be one of visible, model"),
        ("field=round", "field must be one of auto, full"),
        ("pixel_size=0", "pixel size must be above 0"),
        ("bit_depth=8", "bit depth must be 9 to 16"),
        ("bit_depth=1.5", "bit_depth must be a whole number"),
        ("classes=red", "does not distinguish classes"),
        ("output=zip", "output must be one of json, geojson"),
        ("output=json&output=json", "output is given twice"),
        ("task=counting&task=counting", "task is given twice"),
        ("treshold=0.5", "unknown parameter 'treshold'; expected some of output, name, task, threshold"),
    ],
)
def test_a_wrong_parameter_is_one_sentence(opened: Service, query: str, words: str) -> None:
    answer = ask(opened, "POST", f"/v1/segment?{query}", content=png())
    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in answer.json()["detail"]
    assert len(opened.accepted) == 0


def test_parameters_reach_the_result(opened: Service) -> None:
    um = ask(opened, "POST", "/v1/segment?pixel_size=0.5&scale=0.5", content=png()).json()
    assert (um["pixel_size_um"], um["scale"]) == (0.5, 0.5)
    assert um["counted_per_mm2"] == pytest.approx(3 / (130 * 100 * 0.25) * 1e6)
    form = ask(opened, "POST", "/v1/segment", files={"image": ("a.png", png())}, data={"task": "confluence"}).json()
    assert form["task"] == "confluence"
    cut = png([(0, 50), (60, 50)])
    counts = {
        rule: ask(opened, "POST", f"/v1/segment?count_rule={rule}", content=cut).json()["counted"]
        for rule in ("all", "exclude-border")
    }
    assert counts == {"all": 2, "exclude-border": 1}
    assert ask(opened, "POST", "/v1/segment?threshold=0.001", content=png([], (57, 200))).json()["count"] == 0


def test_defaults_give_way_to_what_is_asked() -> None:
    fixed = replace(DEFAULTS, scale=0.5, task="confluence")
    assert parse([("cell_diameter", "auto")], fixed).scale is None
    assert parse([("scale", "2")], replace(DEFAULTS, cell_diameter="auto")).cell_diameter is None
    assert parse([], fixed) == fixed
    values = {"task": "counting", "count_rule": "all", "border_cells": "model", "field": "full", "bit_depth": "12"}
    for parameter in PARAMETERS:  # each is read into the setting of its name
        text = values.get(parameter.name, "0.5")
        assert getattr(parse([(parameter.name, text)], fixed), parameter.name) not in ("", None)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "the file is empty"), (png()[:-30], "the PNG is cut short"), (b"<html>", "not a PNG, JPEG or TIFF")],
)
def test_a_damaged_image_is_refused_with_the_readers_sentence(opened: Service, data: bytes, words: str) -> None:
    answer = ask(opened, "POST", "/v1/segment?name=b.png", content=data)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(words)


@pytest.mark.parametrize(
    ("status", "more"),
    [
        (415, {"content": b"{}", "headers": {"Content-Type": "application/json"}}),
        (400, {"files": {"note": (None, "hello")}}),
        (413, {"files": [("image", ("a.png", png())), ("image", ("b.png", png()))]}),
        (400, {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
        (400, {"content": b"", "headers": {"Content-Type": "multipart/form-data"}}),
        (406, {"content": png(), "headers": {"Accept": "text/html"}}),
    ],
)
def test_another_body_is_refused(opened: Service, status: int, more: dict) -> None:
    answer = ask(opened, "POST", "/v1/segment", **more)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert len(opened.accepted) == 0


def test_several_images_are_answered_together_and_a_bad_one_fails_alone(opened: Service) -> None:
    files = [("image", ("a.png", png())), ("image", ("bad.png", png()[:-30])), ("image", ("c.png", png([(50, 50)])))]
    answer = ask(opened, "POST", "/v1/batch", files=files).json()
    assert (answer["done"], answer["failed"]) == (2, 1)
    first, bad, last = answer["images"]
    assert (first["result"]["count"], last["result"]["count"]) == (3, 1)
    assert (bad["status"], bad["image"], bad["code"]) == ("failed", "bad.png", 422)
    assert bad["error"].startswith("the PNG is cut short")
    assert ask(opened, "POST", "/v1/batch", files=files, headers={"Accept": "image/tiff"}).status_code == 406
    assert len(opened.accepted) == 0


def test_too_many_files_are_refused() -> None:
    with service(limits=Limits(files=2)) as small:
        answer = ask(small, "POST", "/v1/batch", files=[("image", (f"{n}.png", png())) for n in range(3)])
    assert answer.status_code == 413
    assert answer.json()["detail"].startswith("3 files in one request; expected at most 2")


def test_the_model_and_the_state_are_told(opened: Service) -> None:
    (model,) = ask(opened, "GET", "/v1/models").json()["models"]
    assert (model["name"], model["engine"]["device"], sorted(model["tasks"])) == (
        *("stub", "cpu"),
        ["confluence", "counting"],
    )
    assert ask(opened, "GET", "/healthz").json() == ask(opened, "GET", "/readyz").json() == {"status": "ok"}
    missing = ask(opened, "GET", "/v2/segment")
    assert (missing.status_code, missing.json()["status"]) == (404, 404)
    assert ask(opened, "GET", "/v1/segment").status_code == 405


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("*/*", "json"),
        ("image/*", "labels.tif"),
        ("image/png, image/tiff;q=0.9", "overlay.png"),
        ("application/json;q=0, */*;q=0.1", "geojson"),
        ("text/html, application/geo+json;q=0.2", "geojson"),
        ("text/html", None),
        ("application/json;q=x", None),
    ],
)
def test_accept_is_followed(header: str, name: str | None) -> None:
    output = accepted(header)
    assert (None if output is None else output.name) == name


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


FILE = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


def test_a_form_is_taken_apart_as_it_was_put_together() -> None:
    data = b"\r\n--b\r\r\n--c--\0\xff\r\n"  # nearly a boundary
    body = form(
        *(FILE + data.replace(b"--b\r", b"--a\r"), b'Content-Disposition: form-data; name="task"\r\n\r\ncounting'),
        FILE.replace(b"a.png", "ü/é.png".encode()),
    )
    files, fields = uploads_in("multipart/form-data; boundary=b", body)
    assert [(each.name, each.data) for each in files] == [
        ("a.png", data.replace(b"--b\r", b"--a\r")),
        ("é.png", b""),
    ]
    assert fields == [("task", "counting")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        form(FILE + b"x", end=b""),
        form(b"no head"),
        form(b'Content-Disposition: form-data; name="scale"', FILE + b"x"),  # would take the next part for its own
        form(b"Content-Type: text/plain\r\n\r\nx"),
        form(b'Content-Disposition: form-data; name="a"\r\n\r\n' + b"\xff"),
        form(b'Content-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 5000),
        form(b"X: " + b"x" * 20_000 + b"\r\n\r\n"),
        form(*[FILE] * 1001),
    ],
)
def test_a_form_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(UsageError):
        uploads_in("multipart/form-data; boundary=b", body)


def test_names_and_types_of_bodies() -> None:
    assert [clean_name(name) for name in ("../../a.png", "c:\\x\\b.png", "", "a\nb", "x" * 300)] == [
        *("a.png", "b.png", "image", "a_b", "x" * 200)
    ]
    for kind in ("", "image/png", "image/tiff", "application/octet-stream", "application/x-www-form-urlencoded"):
        ((upload,), _) = uploads_in(kind, b"x", "n.png")
        assert (upload.name, upload.data) == ("n.png", b"x")
    with pytest.raises(UnsupportedBodyError, match="text/plain"):
        uploads_in("text/plain", b"x")


def test_answers_are_json_that_every_parser_reads(opened: Service) -> None:
    """No NaN: a cell of one pixel has measurements without a value."""
    text = ask(opened, "POST", "/v1/segment?count_rule=all", content=png([(5, 5)], (11, 11))).text
    json.loads(text, parse_constant=pytest.fail)


def test_a_form_says_what_to_answer(opened: Service) -> None:
    files = {"image": ("a.png", png())}
    overlay = ask(opened, "POST", "/v1/segment", files=files, data={"output": "overlay.png"})
    assert overlay.headers["content-type"] == "image/png"
    for path, data, status, said in [
        ("/v1/segment?output=json", {"output": "geojson"}, 400, "output is given twice"),
        ("/v1/segment", {"output": "words"}, 400, "words"),
        ("/v1/segment", {"name": "b.png"}, 400, "each file has its own filename"),
        ("/v1/segment?name=b.png", {}, 400, "each file has its own filename"),
        ("/v1/batch?name=b.png", {}, 400, "each file has its own filename"),
        ("/v1/batch", {"output": "geojson"}, 406, "application/json"),
    ]:
        answer = ask(opened, "POST", path, files=files, data=data)
        assert answer.status_code == status
        assert said in answer.json()["detail"]
