"""The description of the service: what it allows is answered as it says, by schemathesis' cases."""

from __future__ import annotations

import json
from typing import Any

import pytest
from service_stub import ask, png, service

from cellseg_deploy.serve.app import make_app
from cellseg_deploy.serve.jobs import Jobs
from cellseg_deploy.serve.limits import Limits
from cellseg_deploy.serve.outputs import OUTPUTS
from cellseg_deploy.serve.settings import PARAMETERS
from cellseg_deploy.serve.uploads import RAW
from cellseg_deploy.web.access import Access

schemathesis = pytest.importorskip("schemathesis", reason="pip install -e '.[dev]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")

EXAMPLES = 12
"""Per operation; hypothesis' own default is 100."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with service() as opened, Jobs.open(tmp_path_factory.mktemp("jobs"), opened.engine, Limits()) as jobs:
        yield make_app(opened, Access("cellseg-serve", None), jobs)


def test_the_description_lists_every_parameter_and_output() -> None:
    with service() as opened:
        described = ask(opened, "GET", "/openapi.json").json()
    operation = described["paths"]["/v1/segment"]["post"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert names == {"output", "name"} | {parameter.name for parameter in PARAMETERS}
    assert set(operation["responses"]["200"]["content"]) == {output.kind for output in OUTPUTS}
    text = json.dumps(described)
    for reference in {part.partition('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert reference in described["components"]["schemas"]


def test_an_answer_has_the_members_of_its_schema() -> None:
    with service() as opened:
        schema = ask(opened, "GET", "/openapi.json").json()["components"]["schemas"]["Result"]
        found = ask(opened, "POST", "/v1/segment?pixel_size=0.1", content=png()).json()
    assert set(schema["required"]) <= set(found) <= set(schema["properties"])


@pytest.mark.parametrize("kind", ["allowed", "allowed, with an image", "not allowed"])
def test_schemathesis_finds_nothing(app: Any, kind: str) -> None:
    """That what is allowed is accepted cannot be checked: whether bytes are an image, and that ``scale`` and
    ``cell_diameter`` exclude each other, no schema says."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

    mode = GenerationMode.NEGATIVE if kind == "not allowed" else GenerationMode.POSITIVE
    statuses = set()
    for operation in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.ok().as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            excluded = [positive_data_acceptance]
            if kind != "allowed" and case.media_type in RAW:
                excluded.append(negative_data_rejection)  # it takes an image for wrong, and a number for no bytes
                case.body = png() if kind == "allowed, with an image" else case.body
            statuses.add(case.call_and_validate(excluded_checks=excluded).status_code)

        try:
            check()
        except Unsatisfiable:  # nothing can be wrong in an operation without parameters
            assert kind == "not allowed"
            assert not operation.ok().query
            assert not operation.ok().body
    assert statuses & {400, 404, 415, 422}
    assert (200 in statuses) or kind == "not allowed"
