"""A cluster of several hosts with TLS, one of which is cut off and comes back: the results of one process.

The hosts are network namespaces: the network is real, and so is the cut; the disk is shared, as a cluster's is.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import authority
from conftest import draw_discs, make_onnx, make_spec
from made_jobs import wait_until
from run_records import journal_without_times
from running import infer, results, save
from small_network import SmallNetwork, small_network

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

PORT = 8786
SECONDS = 120
QUICK = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s"}
"""A host that does not answer for this long is gone: the shortest time that Dask accepts, instead of 30 s."""
HELPERS = Path(__file__).parent.parent / "helpers"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Photographs in ``in``: eight are free, eight wait until a host is gone, eight until it is back."""
    for index in range(24):
        chance = random.Random(index)
        height, width = chance.randint(60, 150), chance.randint(60, 150)
        centres = [(chance.uniform(0, width), chance.uniform(0, height)) for _ in range(height * width // 1500)]
        gate = ("free", "gone", "back")[index // 8]
        save(tmp_path / "in" / f"{index:02}@{gate}.png", draw_discs((height, width), centres, radius=7))
    (tmp_path / "stub.onnx").write_bytes(make_onnx(make_spec(cell_diameter_px=14.0)).SerializeToString())
    return tmp_path


@pytest.fixture
def network(tmp_path: Path) -> Iterator[SmallNetwork]:
    with small_network(("scheduler", "one", "two", "desk"), tmp_path) as network:
        yield network


@pytest.mark.parametrize("cut_off", ["one", pytest.param("desk", marks=pytest.mark.night)])
def test_a_host_is_cut_off_and_comes_back(made: Path, network: SmallNetwork, cut_off: str) -> None:
    """``one``: a worker; ``desk``: the host where the run was started."""
    gates, out = made / "gates", made / "out"
    gates.mkdir()
    (gates / "free").touch()
    files = authority(made)("host", 2)
    tls = ("--tls-ca-file", files["ca"], "--tls-cert", files["cert"], "--tls-key", files["key"])
    address = f"tls://{network.addresses['scheduler']}:{PORT}"
    dask = ("-m", "distributed.cli.dask_scheduler", "--protocol", "tls", "--no-dashboard", "--port", PORT, *tls)
    _, log = network.start("scheduler", *dask, "--host", network.addresses["scheduler"], **QUICK)

    def wait_for(text: str, times: int = 1) -> None:
        wait_until(lambda: log.read_text().count(text) >= times, SECONDS)

    def start_worker(host: str) -> None:
        dask = ("-m", "distributed.cli.dask_worker", address, "--nthreads", 2, "--no-dashboard", *tls)
        preload = ("--preload", HELPERS / "gates.py", "--local-directory", made / host)
        network.start(host, *dask, *preload, GATES=str(gates), OMP_NUM_THREADS="1", **QUICK)

    start_worker("one")
    start_worker("two")
    wait_for("Register worker addr", 2)

    model = ("--model", made / "stub.onnx", "--scale", 1, "--threads", 1, "-q", "--backend", "onnxruntime")
    program = ("-c", "from cellseg_deploy.cli.infer import main; main()", made / "in", "-o", out, *model)
    run, said = network.start("desk", *program, "--scheduler", address, *tls, **QUICK)
    wait_until(lambda: run.poll() is not None or n_done(out) >= 8, SECONDS)
    assert run.poll() is None, said.read_text()

    network.cut(cut_off, off=True)
    where = network.addresses[cut_off]
    wait_for(f"Remove worker addr: tls://{where}" if cut_off == "one" else "Remove client")
    (gates / "gone").touch()  # also at the host that is cut off, whose results come too late
    if cut_off == "one":
        wait_until(lambda: n_done(out) >= 16, SECONDS)
    network.cut(cut_off, off=False)
    if cut_off == "one":  # a Dask worker ends when it loses its scheduler: a supervisor starts it again
        start_worker(cut_off)
    wait_for(f"Register worker addr: tls://{where}" if cut_off == "one" else "Receive client connection", 2)
    (gates / "back").touch()

    run.wait(SECONDS)
    assert run.returncode == 0, said.read_text()
    assert infer(made / "in", "-o", made / "whole", *model) == 0
    assert results(out) == results(made / "whole")
    assert journal_without_times(out) == journal_without_times(made / "whole")
    assert sorted(images_in(out)) == sorted(path.name for path in (made / "in").iterdir())
    assert not [path.name for path in out.iterdir() if path.name.startswith(".") and path.suffix == ".tmp"]


def images_in(out: Path) -> list[str]:
    journal = out / "journal.jsonl"
    whole = journal.read_text().rpartition("\n")[0].splitlines() if journal.exists() else []
    return [line["image"] for line in map(json.loads, whole) if line["kind"] == "image"]


def n_done(out: Path) -> int:
    return len(images_in(out))
