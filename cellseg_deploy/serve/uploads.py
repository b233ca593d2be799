"""The files in the body of a request: raw bytes, or multipart/form-data (RFC 7578), whose body is in memory already."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.message import Message
from pathlib import PurePosixPath

from cellseg_deploy.errors import CellsegError, UsageError

MULTIPART = "multipart/form-data"
RAW = ("image/png", "image/jpeg", "image/tiff", "application/octet-stream")
_ALSO_RAW = ("", "application/x-www-form-urlencoded")  # what curl --data-binary says
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{1,70}")
_MAX_PARTS, _MAX_HEAD, _MAX_FIELD, _MAX_NAME = 1000, 16 << 10, 4 << 10, 200


class UnsupportedBodyError(CellsegError):
    """The body is neither an image nor a form."""


@dataclass(frozen=True)
class Upload:
    """``name``: of the file, without folders. ``data``: its bytes."""

    name: str
    data: bytes


def uploads_in(content_type: str, body: bytes, name: str = "") -> tuple[list[Upload], list[tuple[str, str]]]:
    """Return the files and the text fields of ``body``. ``name``: of the image if the body is one.

    Raises ``UsageError`` for a form that is not as RFC 7578 says, ``UnsupportedBodyError`` for another type of body.
    """
    head = Message()
    head["Content-Type"] = content_type or "application/octet-stream"
    kind = head.get_content_type()
    if kind == MULTIPART:
        files, fields = _parts(str(head.get_param("boundary", "")), body)
        if name or any(field == "name" for field, _ in fields):
            raise UsageError("name is for an image sent as the body; in a form, each file has its own filename")
        return files, fields
    if not (kind.startswith("image/") or kind in RAW or kind in _ALSO_RAW):
        raise UnsupportedBodyError(f"a body of the type {kind} was sent; expected {', '.join(RAW)}, or {MULTIPART}")
    return [Upload(clean_name(name), body)], []


def clean_name(name: str) -> str:
    """Return the last part of the path ``name``, ``image`` if that is empty."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(sign if sign.isprintable() else "_" for sign in last)[:_MAX_NAME] or "image"


def _parts(boundary: str, body: bytes) -> tuple[list[Upload], list[tuple[str, str]]]:
    if not _BOUNDARY.fullmatch(boundary):
        raise UsageError("the form has no boundary, or an invalid one, in its Content-Type")
    mark = b"\r\n--" + boundary.encode("ascii")
    files, fields = list[Upload](), list[tuple[str, str]]()
    end = -2 if body.startswith(mark[2:]) else body.find(mark)  # the first one may have no line before it
    while True:
        if end == -1:
            raise UsageError("the form is cut short: its last boundary is missing")
        start = end + len(mark)
        if body.startswith(b"--", start):
            return files, fields
        if len(files) + len(fields) >= _MAX_PARTS:
            raise UsageError(f"the form has more than {_MAX_PARTS} parts")
        gap = body.find(b"\r\n\r\n", start, start + _MAX_HEAD)
        end = body.find(mark, start)
        if gap < 0 or (0 <= end < gap):
            raise UsageError("a part of the form has no head, or one that is too long")
        content = body[gap + 4 : end] if end >= gap + 4 else b""  # an empty part ends with its head
        _take(_head(body[start : gap + 4]), content, files, fields)


def _take(head: Message, content: bytes, files: list[Upload], fields: list[tuple[str, str]]) -> None:
    if head.get_content_disposition() != "form-data":
        raise UsageError("a part of the form has no Content-Disposition: form-data")
    file_name = head.get_param("filename", None, "content-disposition")
    name = head.get_param("name", "", "content-disposition")
    if file_name is not None or head.get_content_maintype() == "image":
        given = file_name[2] if isinstance(file_name, tuple) else file_name
        files.append(Upload(clean_name(str(given or "")), content))
        return
    if len(content) > _MAX_FIELD:
        raise UsageError(f"the field {name!r} of the form is longer than {_MAX_FIELD} bytes; send images as files")
    try:
        fields.append((str(name), content.decode()))
    except UnicodeDecodeError as error:
        raise UsageError(f"the field {name!r} of the form is not text in UTF-8; send images as files") from error


def _head(raw: bytes) -> Message:
    from email.parser import HeaderParser

    return HeaderParser().parsestr(raw.decode("utf-8", "replace").strip() + "\r\n\r\n")
