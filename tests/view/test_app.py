"""Who may call the page's server, and what it refuses: token, Host, Origin, bodies, paths."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cellseg_deploy.view.app import make_app

httpx = pytest.importorskip("httpx", reason="pip install -e '.[dev]'")
pytest.importorskip("starlette", reason="pip install -e '.[view]'")

TOKEN, PORT, LIMIT = "t0ken", 8123, 200_000
HERE = f"http://127.0.0.1:{PORT}"


class Client:
    """Asks the application without a server; the token is in a header unless ``headers`` are given."""

    def __init__(self, workspace) -> None:
        self.app = make_app(workspace, token=TOKEN, port=PORT, max_upload=LIMIT)

    def __call__(self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> Any:
        import anyio

        async def ask() -> Any:
            transport = httpx.ASGITransport(app=self.app)
            async with httpx.AsyncClient(transport=transport, base_url=HERE) as client:
                given = {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers
                return await client.request(method, path, headers=given, **more)

        return anyio.run(ask)


@pytest.fixture
def ask(workspace) -> Client:
    return Client(workspace)


def png(width: int = 130, height: int = 100) -> bytes:
    pixels = np.full((height, width, 3), 230, np.uint8)
    pixels[10:30, 10:30] = 40
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PATHS = [
    "/",
    "/static/main.js",
    "/api/run",
    "/api/images/0",
    "/api/images/0/thumbnail",
    "/api/images/0/tiles/0/0_0.jpg",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Cookie": f"cellseg-view-{PORT}=wrong"}])
def test_nothing_is_told_without_the_token(ask, path, headers) -> None:
    answer = ask("GET", path, headers=headers)
    assert answer.status_code == 403
    assert "token" in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": f"evil.example:{PORT}"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{PORT}"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/run"), ("POST", "/api/export"), ("POST", "/api/images?name=a.png")]
)
def test_foreign_hosts_and_origins_are_refused_even_with_the_token(ask, out, headers, method, path) -> None:
    answer = ask(method, path, headers={"Authorization": f"Bearer {TOKEN}", **headers})
    assert answer.status_code == 403
    assert not (out / "uploads").exists()


def test_a_foreign_host_gets_no_cookie_for_a_token(ask) -> None:
    answer = ask("GET", f"/?token={TOKEN}", headers={"Host": "evil.example"})
    assert answer.status_code == 403
    assert "set-cookie" not in answer.headers


def test_the_address_with_the_token_opens_the_page(ask) -> None:
    answer = ask("GET", f"/?token={TOKEN}", headers={})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= {part.strip() for part in cookie.split(";")}
    page = ask("GET", "/", headers={"Cookie": cookie.partition(";")[0], "Origin": HERE})
    assert page.status_code == 200
    assert "cellseg-view" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]


def test_images_tiles_and_cells_are_served_by_id(ask, ids) -> None:
    listed = ask("GET", "/api/run").json()["images"]
    assert [image["name"] for image in listed] == ["a.png", "bad.png", "sub/b<i>.png"]
    cells = ask("GET", f"/api/images/{ids.a}").json()
    assert (cells["width"], cells["height"], cells["found"]) == (130, 100, 2)
    for path in ("thumbnail", "tiles/8/0_0.jpg", "tiles/0/0_0.jpg"):
        answer = ask("GET", f"/api/images/{ids.a}/{path}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
    whole = Image.open(io.BytesIO(ask("GET", f"/api/images/{ids.a}/tiles/8/0_0.jpg").content))
    assert whole.size == (130, 100)


@pytest.mark.parametrize("place", ["tiles/9/0_0.jpg", "tiles/8/1_0.jpg", "tiles/x/0_0.jpg", "tiles/8/-1_0.jpg"])
def test_tiles_that_are_not_there_are_refused(ask, ids, place) -> None:
    assert ask("GET", f"/api/images/{ids.a}/{place}").status_code in (400, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2Fapp.py",
        "/static/%2e%2e/app.py",
        "/static/app.py",
        "/static/openseadragon.LICENSE.txt",
        "/api/images/..%2F..%2Frun.json",
        "/api/images/a.png",
        "/api/images/%2Fetc%2Fpasswd/thumbnail",
        "/journal.jsonl",
    ],
)
def test_no_path_leads_out_of_what_was_opened(ask, path) -> None:
    answer = ask("GET", path)
    assert answer.status_code in (400, 404)
    assert "import" not in answer.text


def test_edits_come_back_with_what_changed(ask, ids) -> None:
    number = ask("GET", f"/api/images/{ids.a}").json()["cells"][0]["n"]
    answer = ask("POST", f"/api/images/{ids.a}/edits", json={"op": "delete", "cells": [number]}).json()
    assert (answer["removed"], answer["found"], answer["can_undo"]) == ([number], 1, True)
    assert ask("POST", f"/api/images/{ids.a}/undo").json()["cells"][0]["n"] == number
    refused = ask("POST", f"/api/images/{ids.a}/edits", json={"op": "merge", "cells": [1, 2]})
    assert refused.status_code == 400
    assert "touches none of the others" in refused.json()["error"]
    assert ask("POST", f"/api/images/{ids.a}/edits", content=b"[]").status_code == 400
    assert ask("POST", f"/api/images/{ids.a}/edits", content=b"{").status_code == 400
    assert ask("POST", f"/api/images/{ids.a}/confirm", json={"value": "yes"}).status_code == 400


def test_an_image_that_is_dragged_in_is_counted(ask, out) -> None:
    for expected in ("uploads/new smear.png", "uploads/new smear~2.png"):
        image = ask("POST", "/api/images?name=..%2F..%2Fnew%20smear.png", content=png()).json()
        assert image["name"] == expected
        assert (out / expected).read_bytes() == png()
        assert ask("GET", f"/api/images/{image['id']}").json()["found"] == 1
    assert ask("GET", "/api/run").json()["images"][-1]["name"] == "uploads/new smear~2.png"


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("cut.png", png()[:-30], "cut.png: the PNG is cut short"),
        ("words.png", b"no image at all", "words.png: not a PNG, JPEG or TIFF"),
        ("empty.tif", b"", "empty.tif: the file is empty"),
    ],
)
def test_a_corrupt_image_is_refused_with_the_readers_sentence(ask, out, name, data, reason) -> None:
    answer = ask("POST", f"/api/images?name={name}", content=data)
    assert answer.status_code == 422
    assert reason in answer.json()["error"]
    assert str(out) not in answer.json()["error"]
    assert list((out / "uploads").iterdir()) == []


def test_an_upload_over_the_limit_is_refused_before_and_while_it_arrives(ask, out) -> None:
    async def parts() -> Any:  # without a length in the header
        for _ in range(5):
            yield bytes(100_000)

    for content in (bytes(LIMIT + 1), parts()):
        answer = ask("POST", "/api/images?name=a.png", content=content)
        assert answer.status_code == 413
        assert "limit" in answer.json()["error"]
    assert not (out / "uploads").exists()


def test_a_name_with_markup_stays_text(ask) -> None:
    answer = ask("POST", "/api/images?name=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E.png", content=png())
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.text)["name"] == "uploads/<img src=x onerror=alert(1)>.png"
