"""The description of the service: what it allows is answered as it says, by schemathesis' cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from service_stub import HERE, access, ask, png, service

from cellseg_deploy.serve.app import make_app
from cellseg_deploy.serve.jobs import Jobs
from cellseg_deploy.serve.limits import Limits
from cellseg_deploy.serve.outputs import OUTPUTS
from cellseg_deploy.serve.settings import PARAMETERS

schemathesis = pytest.importorskip("schemathesis", reason="pip install -e '.[dev]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")

EXAMPLES = 12
"""Per operation; hypothesis' own default is 100."""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with service() as opened, Jobs.open(tmp_path_factory.mktemp("jobs"), opened.engine, Limits()) as jobs:
        yield make_app(opened, access(), jobs)


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


def test_schemathesis_finds_nothing(app: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, base_url=HERE)
    checks = schemathesis.checks.load_all_checks
    _ = checks
    for operation in schema.get_all_operations():
        checked(operation.ok())


def checked(operation: Any) -> None:
    from hypothesis import given

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        case.call_and_validate()

    run()


def test_the_document_is_small_enough_to_read(tmp_path: Path) -> None:
    with service() as opened:
        assert len(ask(opened, "GET", "/openapi.json").content) < 60_000
