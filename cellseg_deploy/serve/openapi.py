"""The service as OpenAPI 3.1, made from the lists of parameters and outputs that the service itself uses."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cellseg_deploy.serve.metrics import KIND
from cellseg_deploy.serve.outputs import JSON, OUTPUTS
from cellseg_deploy.serve.settings import PARAMETERS
from cellseg_deploy.serve.uploads import MULTIPART, RAW

if TYPE_CHECKING:
    from cellseg_deploy.serve.service import Service

PROBLEM = "application/problem+json"
_BINARY: dict[str, Any] = {"type": "string", "contentMediaType": "application/octet-stream"}
_TEXT, _NUMBER, _WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
_OR_NULL = {"type": ["number", "null"]}
_RESULT = {
    "image": _TEXT,
    "width": _WHOLE,
    "height": _WHOLE,
    "model": _TEXT,
    "task": _TEXT,
    "count": {**_WHOLE, "description": "cells found"},
    "counted": {**_WHOLE, "description": "cells that count: by the count rule, and by their class"},
    "by_class": {"type": "object", "additionalProperties": _WHOLE, "description": "only if the model has classes"},
    "confluence": {**_NUMBER, "description": "share of the field of view that cells cover, 0 to 1"},
    "field_of_view_share": _NUMBER,
    "median_cell_area_px": _OR_NULL,
    "scale": {**_NUMBER, "description": "model px per image px"},
    "pixel_size_um": {**_NUMBER, "description": "this and the next three only if the pixel size is known"},
    "pixel_size_source": _TEXT,
    "median_cell_area_um2": _OR_NULL,
    "counted_per_mm2": {**_NUMBER, "description": "density"},
    "warnings": {
        "type": "array",
        "items": {"type": "object", "required": ["kind", "text"], "properties": {"kind": _TEXT, "text": _TEXT}},
    },
    "conversions": {"type": "array", "items": _TEXT},
    "seconds": {"type": "object", "additionalProperties": _NUMBER},
    "cells": {
        "type": "array",
        "items": {"type": "object", "required": ["label"]},
        "description": "the columns of cells.csv",
    },
}
_OPTIONAL = {"by_class", "pixel_size_um", "pixel_size_source", "median_cell_area_um2", "counted_per_mm2"}
_EXAMPLE = {
    "image": "smear.png",
    "width": 130,
    "height": 100,
    "model": "default",
    "task": "counting",
    "count": 1,
    "counted": 1,
    "confluence": 0.0242,
    "field_of_view_share": 1.0,
    "median_cell_area_px": 315.0,
    "scale": 0.5,
    "warnings": [],
    "conversions": [],
    "seconds": {"read": 0.001, "network": 0.05},
    "cells": [{"label": 1, "area_px": 315, "centroid_x_px": 20.0, "centroid_y_px": 20.0, "counted": True}],
}
SCHEMAS: dict[str, Any] = {
    "Problem": {
        "type": "object",
        "required": ["type", "title", "status", "detail"],
        "properties": {"type": _TEXT, "title": _TEXT, "status": {"type": "integer"}, "detail": _TEXT},
    },
    "Result": {"type": "object", "required": sorted(set(_RESULT) - _OPTIONAL), "properties": _RESULT},
    "Batch": {
        "type": "object",
        "required": ["done", "failed", "images"],
        "properties": {
            "done": _WHOLE,
            "failed": _WHOLE,
            "images": {
                "type": "array",
                "items": {
                    "oneOf": [
                        {
                            "type": "object",
                            "required": ["status", "result"],
                            "properties": {
                                "status": {"const": "done"},
                                "result": {"$ref": "#/components/schemas/Result"},
                            },
                        },
                        {
                            "type": "object",
                            "required": ["status", "image", "code", "error"],
                            "properties": {
                                "status": {"const": "failed"},
                                "image": _TEXT,
                                "code": {"type": "integer"},
                                "error": _TEXT,
                            },
                        },
                    ]
                },
            },
        },
    },
    "Job": {
        "type": "object",
        "required": ["id", "image", "output", "state"],
        "properties": {
            "id": _TEXT,
            "image": _TEXT,
            "output": _TEXT,
            "state": {"enum": ["queued", "running", "done", "failed", "lost"]},
            "tiles": {**_WHOLE, "description": "while it is running, with tiles_done: where it is in the network"},
            "tiles_done": _WHOLE,
            "count": _WHOLE,
            "counted": _WHOLE,
            "warnings": {"type": "array", "items": _TEXT},
            "code": {"type": "integer"},
            "error": {**_TEXT, "description": "why it failed, or was lost"},
        },
    },
    "Jobs": {
        "type": "object",
        "required": ["jobs"],
        "properties": {"jobs": {"type": "array", "items": {"$ref": "#/components/schemas/Job"}}},
    },
    "Models": {
        "type": "object",
        "required": ["models"],
        "properties": {"models": {"type": "array", "items": {"type": "object", "required": ["name", "classes"]}}},
    },
    "Status": {"type": "object", "required": ["status"], "properties": {"status": _TEXT}},
}
_WHY = {
    400: "A parameter or the form is wrong.",
    401: "The token is missing or wrong.",
    403: "Another Host or Origin.",
    404: "There is no such job.",
    406: "None of the media types in Accept can be given.",
    408: "The request did not arrive in time.",
    409: "The job is not done.",
    410: "The job was lost, or failed.",
    413: "The body is too large, or holds too many files.",
    415: "The body is neither an image nor a form.",
    422: "The image cannot be used; the sentence says why.",
    429: "The queue is full, or its files are too large together; ask again after Retry-After seconds.",
    500: "Internal error.",
    503: "The network has failed, or there is not enough memory.",
    504: "Not done in time.",
}
SENDING = (400, 401, 403, 406, 408, 413, 415, 422, 429, 500, 503, 504)


def describe(service: Service, *, with_jobs: bool) -> dict[str, Any]:
    """Return the description of ``service``, for JSON; ``with_jobs``: whether it takes jobs."""
    paths: dict[str, Any] = {
        "/v1/segment": {
            "post": operation(
                "segment",
                "Count and outline the cells of one image",
                parameters=[*_settings(), _output(), _name()],
                requestBody=body(),
                responses={"200": image_answer(), **problems(*SENDING)},
            )
        },
        "/v1/batch": {
            "post": operation(
                "batch",
                "Several images in one request; a failed image does not fail the others",
                parameters=[*_settings()],
                requestBody={
                    "required": True,
                    "content": {MULTIPART: {"schema": _form({"type": "array", "items": _BINARY, "minItems": 1})}},
                },
                responses={"200": answer("One entry per image, in their order", "Batch"), **problems(*SENDING)},
            )
        },
        "/v1/models": {
            "get": operation(
                "models",
                "The model: classes, tasks, licence, engine",
                responses={"200": answer("The model", "Models"), **problems(401, 403)},
            )
        },
        "/healthz": {"get": _status("healthz", "Whether the process works; 503: restart it")},
        "/readyz": {"get": _status("readyz", "Whether a request would be taken now")},
        "/metrics": {
            "get": operation(
                "metrics",
                "Figures for Prometheus",
                responses={
                    "200": {"description": "Text format", "content": {KIND.partition(";")[0]: {"schema": _TEXT}}},
                    **problems(401, 403),
                },
            )
        },
        "/openapi.json": {
            "get": operation(
                "openapi",
                "This description",
                responses={
                    "200": {"description": "OpenAPI", "content": {JSON: {"schema": {"type": "object"}}}},
                    **problems(401, 403),
                },
            )
        },
    }
    if with_jobs:
        paths |= _job_paths()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "cellseg-serve",
            "version": version("cellseg-deploy"),
            "description": f"Counts cells with the model {service.engine.backend.spec.name}.",
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {"schemas": SCHEMAS, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _job_paths() -> dict[str, Any]:
    number = {"name": "id", "in": "path", "required": True, "schema": _TEXT}
    location = {"Location": {"required": True, "schema": _TEXT}}
    return {
        "/v1/jobs": {
            "post": operation(
                "submit",
                "A long image: accepted now, its answer is fetched later",
                parameters=[*_settings(), _output(), _name()],
                requestBody=body(),
                responses={"202": answer("Accepted", "Job", headers=location), **problems(*SENDING)},
            ),
            "get": operation("jobs", "All jobs", responses={"200": answer("The jobs", "Jobs"), **problems(401, 403)}),
        },
        "/v1/jobs/{id}": {
            "parameters": [number],
            "get": operation(
                "job",
                "How far a job is; lost: the service ended before it was done",
                responses={"200": answer("The job", "Job"), **problems(401, 403, 404)},
            ),
            "delete": operation(
                "delete",
                "Cancel a job, or forget its result",
                responses={"200": answer("It is gone", "Status"), **problems(401, 403, 404)},
            ),
        },
        "/v1/jobs/{id}/result": {
            "parameters": [number],
            "get": operation(
                "result",
                "The answer, in the form asked for when the image was sent",
                responses={"200": image_answer(), **problems(401, 403, 404, 409, 410)},
            ),
        },
    }


def operation(name: str, summary: str, **more: Any) -> dict[str, Any]:
    """Return one operation with the id ``name``."""
    return {"operationId": name, "summary": summary, **more}


def problems(*statuses: int) -> dict[str, Any]:
    """Return the answers for errors with ``statuses``."""
    found: dict[str, Any] = {}
    for status in statuses:
        found[str(status)] = {
            "description": _WHY[status],
            "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        if status == 429:
            found[str(status)]["headers"] = {"Retry-After": {"required": True, "schema": _WHOLE}}
    return found


def answer(what: str, schema: str, **more: Any) -> dict[str, Any]:
    """Return an answer in JSON."""
    return {"description": what, "content": {JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}, **more}


def body() -> dict[str, Any]:
    """Return the body with one image."""
    content: dict[str, Any] = {kind: {"schema": _BINARY} for kind in RAW}
    return {"required": True, "content": {**content, MULTIPART: {"schema": _form(_BINARY)}}}


def image_answer() -> dict[str, Any]:
    """Return the answer to one image, by media type."""
    content: dict[str, Any] = {
        JSON: {"schema": {"$ref": "#/components/schemas/Result"}, "examples": {"one cell": {"value": _EXAMPLE}}}
    }
    for output in OUTPUTS:
        schema = {"type": "object"} if "json" in output.kind else {**_BINARY, "contentMediaType": output.kind}
        content.setdefault(output.kind, {"schema": schema})
    headers = {name: {"schema": _WHOLE, "required": True} for name in ("Cellseg-Count", "Cellseg-Counted")}
    warned = {"schema": _TEXT, "description": "kinds of warnings, with commas between"}
    return {"description": "The cells", "headers": {**headers, "Cellseg-Warnings": warned}, "content": content}


def _status(name: str, summary: str) -> dict[str, Any]:
    responses = {"200": answer("Yes", "Status"), **problems(403, 503)}
    return operation(name, summary, security=[{}], responses=responses)


def _form(image: dict[str, Any]) -> dict[str, Any]:
    fields = {
        each["name"]: {**each["schema"], "description": each["description"]} for each in (*_settings(), _output())
    }
    properties = {"image": image, **fields}
    return {"type": "object", "required": ["image"], "properties": properties, "additionalProperties": False}


def _settings() -> list[dict[str, Any]]:
    return [{"name": each.name, "in": "query", "description": each.what, "schema": each.schema} for each in PARAMETERS]


def _output() -> dict[str, Any]:
    what = "; ".join(f"{each.name}: {each.what}" for each in OUTPUTS)
    return {
        "name": "output",
        "in": "query",
        "description": f"What to answer, in place of Accept. {what}",
        "schema": {"type": "string", "enum": [each.name for each in OUTPUTS]},
        "example": "overlay.png",
    }


def _name() -> dict[str, Any]:
    return {"name": "name", "in": "query", "description": "Name of an image sent as the body.", "schema": _TEXT}
