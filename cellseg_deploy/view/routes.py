"""Requests to the workspace: which address and method does what. Knows no web framework.

Images are named by ids, never by paths. Answers are JSON, pictures, or files of the page.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from cellseg_deploy.errors import CellsegError, UsageError
from cellseg_deploy.view.workspace import Workspace
from cellseg_deploy.web.replies import Reply, status_of

MAX_JSON_BYTES = 4 << 20
_KINDS = {
    f".{ending}": f"text/{name}; charset=utf-8"
    for ending, name in (("html", "html"), ("js", "javascript"), ("css", "css"))
}


@dataclass(frozen=True)
class Call:
    """One request. ``place``: parts of the address by name. ``query``: its parameters. ``body``: bytes."""

    place: Mapping[str, str]
    query: Mapping[str, str]
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The body as a JSON object. Raises ``UsageError``."""
        try:
            content = json.loads(self.body or b"{}")
        except ValueError as error:
            raise UsageError(f"the request is no JSON ({error})") from error
        if not isinstance(content, dict):
            raise UsageError("the request must be a JSON object")
        return content

    def number(self, name: str) -> int:
        """Part ``name`` of the address as a number. Raises ``UsageError``."""
        text = self.place[name]
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UsageError(f"{name} must be a number, got {text!r}")
        return int(text)


Handler = Callable[[Workspace, Call], Reply]


def _json(content: Any) -> Reply:
    return Reply(json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii"))


def failed(error: CellsegError) -> Reply:
    """Return the answer for ``error``: its sentence."""
    return failed_with(status_of(error), str(error))


def failed_with(status: int, words: str) -> Reply:
    """Return an answer that says ``words``."""
    return Reply(json.dumps({"error": words}).encode("ascii"), status=status)


def page(_: Workspace, __: Call) -> Reply:
    """Return the page."""
    return _file("index.html")


def page_file(_: Workspace, call: Call) -> Reply:
    """Return a file of the page."""
    return _file(call.place["name"])


def _file(name: str) -> Reply:
    folder = files("cellseg_deploy.view") / "static"
    known = {each.name: each for each in folder.iterdir() if each.is_file()}
    ending = f".{name.rpartition('.')[2]}"
    if name not in known or ending not in _KINDS:
        return Reply(b'{"error":"there is no such file"}', status=404)
    return Reply(known[name].read_bytes(), _KINDS[ending])


def overview(workspace: Workspace, _: Call) -> Reply:
    """List the images."""
    return _json(workspace.overview())


def model(workspace: Workspace, _: Call) -> Reply:
    """Describe the model; opens it."""
    return _json(workspace.model())


def cells(workspace: Workspace, call: Call) -> Reply:
    """Return the cells of an image."""
    return _json(workspace.cells(call.place["image"]))


def thumbnail(workspace: Workspace, call: Call) -> Reply:
    """Return a small picture of an image."""
    return Reply(workspace.thumbnail(call.place["image"]), "image/jpeg", seconds=3600)


def tile(workspace: Workspace, call: Call) -> Reply:
    """Return a tile of an image."""
    place = (call.number("level"), call.number("column"), call.number("row"))
    return Reply(workspace.tile(call.place["image"], *place), "image/jpeg", seconds=3600)


def edit(workspace: Workspace, call: Call) -> Reply:
    """Make an edit."""
    return _json(workspace.edit(call.place["image"], call.content))


def undo(workspace: Workspace, call: Call) -> Reply:
    """Undo the last edit."""
    return _json(workspace.undo(call.place["image"]))


def redo(workspace: Workspace, call: Call) -> Reply:
    """Make an undone edit again."""
    return _json(workspace.redo(call.place["image"]))


def confirm(workspace: Workspace, call: Call) -> Reply:
    """Set or remove the flag that the labels are right."""
    value = call.content.get("value")
    if not isinstance(value, bool):
        raise UsageError(f"value must be true or false, got {value!r}")
    return _json(workspace.confirm(call.place["image"], value=value))


def label(workspace: Workspace, call: Call) -> Reply:
    """Label an image with other settings."""
    return _json(workspace.label(call.place["image"], call.content))


def save(workspace: Workspace, _: Call) -> Reply:
    """Write the corrected label images of the images edited last."""
    return _json({"files": workspace.save(workspace.corrections.opened)})


def export(workspace: Workspace, call: Call) -> Reply:
    """Write tables and other files from the corrected labels."""
    kinds = call.content.get("kinds", ["labels"])
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise UsageError(f"kinds must be a list of names, got {kinds!r}")
    return _json(workspace.export(kinds, everything=bool(call.content.get("everything"))))


def upload(workspace: Workspace, call: Call) -> Reply:
    """Add an image: its bytes are the body, its name a parameter."""
    return _json(workspace.upload(call.query.get("name", ""), call.body))


ROUTES: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/", page),
    ("GET", "/static/{name}", page_file),
    ("GET", "/api/run", overview),
    ("GET", "/api/model", model),
    ("POST", "/api/save", save),
    ("POST", "/api/export", export),
    ("POST", "/api/images", upload),
    ("GET", "/api/images/{image}", cells),
    ("GET", "/api/images/{image}/thumbnail", thumbnail),
    ("GET", "/api/images/{image}/tiles/{level}/{column}_{row}.jpg", tile),
    ("POST", "/api/images/{image}/edits", edit),
    ("POST", "/api/images/{image}/undo", undo),
    ("POST", "/api/images/{image}/redo", redo),
    ("POST", "/api/images/{image}/confirm", confirm),
    ("POST", "/api/images/{image}/label", label),
)
