"""Every image of the corpus, posted: the answer of the folder run, or a 4xx with its sentence; the service lives.

What a run reads by region is too large for a service, which says so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DarknessBackend
from corpus import BY_REGION, CASES, Case
from service_stub import service, talk

from cellseg_deploy.images.read import find_images
from cellseg_deploy.run.folder import ImageResult, RunOptions, run_folder
from cellseg_deploy.segmenter import Segmenter

pytest.importorskip("httpx", reason="pip install -e '.[serve]'")
pytest.importorskip("starlette", reason="pip install -e '.[serve]'")
pytest.importorskip("prometheus_client", reason="pip install -e '.[serve]'")
pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ImageResult]]:
    """Output and results of a folder run over all cases."""
    folder, out = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("out")
    for case in CASES:
        (folder / f"{case.name}.png").write_bytes(case.make())
    seen: list[ImageResult] = []
    options = RunOptions(save=("labels",), report=False)
    run_folder(Segmenter(DarknessBackend()), find_images([folder]), out, options=options, on_result=seen.append)
    return out, {result.image: result for result in seen}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, dict, bytes]]:
    """Status, JSON and label image of each case, from one service, which is well afterwards."""
    found = {}

    async def post_all(client) -> None:
        for case in CASES:
            place, data = f"/v1/segment?name={case.name}.png", case.make()
            answer = await client.post(place, content=data)
            labels = await client.post(place, content=data, headers={"Accept": "image/tiff"})
            assert labels.status_code == answer.status_code
            found[case.name] = (answer.status_code, answer.json(), labels.content)
        assert (await client.get("/healthz")).status_code == 200

    with service() as opened:
        talk(opened, post_all)
        assert len(opened.accepted) == 0
    return found


@pytest.mark.parametrize("case", CASES, ids=[f"{case.group}-{case.name}" for case in CASES])
def test_the_answer_is_that_of_a_run(
    case: Case, run: tuple[Path, dict[str, ImageResult]], answers: dict[str, tuple[int, dict, bytes]]
) -> None:
    out, results = run
    result = results[f"{case.name}.png"]
    status, answer, labels = answers[case.name]
    if result.status == "failed":
        assert status == 422
        if case.name in BY_REGION:  # a run reads it by region, a service does not
            assert case.words in answer["detail"]
            return
        assert " ".join(answer["detail"].split()) == result.error
        return
    assert status == 200, answer
    assert (answer["count"], answer["counted"]) == (result.cells, result.counted)
    assert labels == (out / "labels" / f"{case.name}.png.tif").read_bytes()
    said = [each["text"] for each in answer["warnings"]] + answer["conversions"]
    assert all(text in result.warning for text in said)
    assert len("; ".join(said)) == len(result.warning)
