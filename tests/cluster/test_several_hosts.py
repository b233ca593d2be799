"""A cluster of several hosts with TLS, one of which is cut off and comes back: the results of one process.

The hosts are network namespaces: the network is real, and so is the cut; the disk is shared, as a cluster's is.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tifffile
from certificates import authority
from conftest import draw_discs, make_onnx, make_spec
from made_jobs import wait_until
from run_records import journal_without_times
from running import infer, results, save
from small_network import SmallNetwork, small_network

pytest.importorskip("distributed")
pytest.importorskip("onnxruntime")

from cellseg_deploy.cli import console
from cellseg_deploy.cli.slide import command as slide_command
from cellseg_deploy.slides.run import RECORD

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


class Hosts:
    """A scheduler and two workers, on hosts of their own, that trust each other. ``bands``: see ``gates``."""

    def __init__(self, network: SmallNetwork, folder: Path, bands: str) -> None:
        self.network, self.gates = network, folder / "gates"
        self._folder, self._bands = folder, bands
        self.open("free")
        files = authority(folder)("host", 2)
        self.tls = ("--tls-ca-file", files["ca"], "--tls-cert", files["cert"], "--tls-key", files["key"])
        self.address = f"tls://{network.addresses['scheduler']}:{PORT}"
        options = ("--protocol", "tls", "--no-dashboard", "--port", PORT, "--host", network.addresses["scheduler"])
        self._log = network.start("scheduler", "-m", "distributed.cli.dask_scheduler", *options, *self.tls, **QUICK)[1]
        self.start_worker("one")
        self.start_worker("two")
        self.wait_for("Register worker addr", 2)

    def open(self, gate: str) -> None:
        self.gates.mkdir(exist_ok=True)
        (self.gates / gate).touch()

    def start_worker(self, host: str) -> None:
        dask = ("-m", "distributed.cli.dask_worker", self.address, "--nthreads", 2, "--no-dashboard", *self.tls)
        preload = ("--preload", HELPERS / "gates.py", "--local-directory", self._folder / host)
        environment = {"GATES": str(self.gates), "BANDS": self._bands, "OMP_NUM_THREADS": "1"}
        self.network.start(host, *dask, *preload, **environment, **QUICK)

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until the scheduler has said so."""
        wait_until(lambda: self._log.read_text().count(text) >= times, SECONDS)

    def start_at_desk(self, program: str, *arguments: object) -> tuple[subprocess.Popen[str], Path]:
        """Start a command of ours on the cluster; return the process and its log."""
        command = f"from cellseg_deploy.cli.{program} import main; main()"
        return self.network.start("desk", "-c", command, *arguments, "--scheduler", self.address, *self.tls, **QUICK)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with small_network(("scheduler", "one", "two", "desk"), tmp_path) as network:
        yield Hosts(network, tmp_path, "0:free,300:gone,600:back")


@pytest.mark.parametrize("cut_off", ["one", pytest.param("desk", marks=pytest.mark.night)])
def test_a_host_is_cut_off_and_comes_back(made: Path, hosts: Hosts, cut_off: str) -> None:
    """``one``: a worker; ``desk``: the host where the run was started."""
    out = made / "out"
    model = ("--model", made / "stub.onnx", "--scale", 1, "--threads", 1, "-q", "--backend", "onnxruntime")
    run, said = hosts.start_at_desk("infer", made / "in", "-o", out, *model)
    wait_until(lambda: run.poll() is not None or n_done(out) >= 8, SECONDS)
    assert run.poll() is None, said.read_text()

    hosts.network.cut(cut_off, off=True)
    where = hosts.network.addresses[cut_off]
    hosts.wait_for(f"Remove worker addr: tls://{where}" if cut_off == "one" else "Remove client")
    hosts.open("gone")  # also at the host that is cut off, whose results come too late
    if cut_off == "one":
        wait_until(lambda: n_done(out) >= 16, SECONDS)
    hosts.network.cut(cut_off, off=False)
    if cut_off == "one":  # a Dask worker ends when it loses its scheduler: a supervisor starts it again
        hosts.start_worker(cut_off)
    hosts.wait_for(f"Register worker addr: tls://{where}" if cut_off == "one" else "Receive client connection", 2)
    hosts.open("back")

    run.wait(SECONDS)
    assert run.returncode == 0, said.read_text()
    assert infer(made / "in", "-o", made / "whole", *model) == 0
    assert results(out) == results(made / "whole")
    assert journal_without_times(out) == journal_without_times(made / "whole")
    assert sorted(images_in(out)) == sorted(path.name for path in (made / "in").iterdir())
    assert not temporary_files(out)


@pytest.mark.night
def test_a_worker_is_cut_off_in_the_middle_of_a_slide(made: Path, hosts: Hosts) -> None:
    """Bands of its upper third are done, those of the second in progress on both hosts; the cut one's come too late."""
    slide, out = made / "slide.tif", made / "out"
    centres = [(30.0 + 40 * x, 30.0 + 40 * y) for x in range(7) for y in range(22)]
    image = draw_discs((900, 300), centres, radius=7)
    tifffile.imwrite(slide, image, photometric="rgb", tile=(128, 128), metadata=None)
    model = ("--model", made / "stub.onnx", "--scale", 1, "--threads", 1, "-q", "--backend", "onnxruntime")
    arguments = (slide, *model, "--memory", "1GB", "--save", "labels,geojson")
    run, said = hosts.start_at_desk("slide", *arguments, "-o", out)

    def rows_done() -> int:
        """Rows of probabilities of all channels in the file."""
        file = out / "unfinished/probabilities.f32"
        return file.stat().st_size // (4 * 300 * len(make_spec().channels)) if file.exists() else 0

    wait_until(lambda: run.poll() is not None or rows_done() >= 300, SECONDS)
    assert run.poll() is None, said.read_text()
    where = f"tls://{hosts.network.addresses['one']}"
    hosts.network.cut("one", off=True)
    hosts.wait_for(f"Remove worker addr: {where}")
    assert rows_done() < 600
    hosts.open("gone")
    wait_until(lambda: rows_done() >= 600, SECONDS)
    hosts.network.cut("one", off=False)
    hosts.start_worker("one")
    hosts.wait_for(f"Register worker addr: {where}", 2)
    assert run.poll() is None, said.read_text()
    hosts.open("back")

    run.wait(SECONDS)
    assert run.returncode == 0, said.read_text()
    whole = made / "whole"
    assert console.run(slide_command, [str(argument) for argument in (*arguments, "-o", whole)]) == 0
    records = [json.loads((folder / RECORD).read_text()) | {"seconds": None} for folder in (out, whole)]
    assert records[0] == records[1]
    contents = [{name: data for name, data in results(folder).items() if name != RECORD} for folder in (out, whole)]
    assert contents[0] == contents[1]
    assert records[0]["result"]["cells"] == len(centres)


def images_in(out: Path) -> list[str]:
    journal = out / "journal.jsonl"
    whole = journal.read_text().rpartition("\n")[0].splitlines() if journal.exists() else []
    return [line["image"] for line in map(json.loads, whole) if line["kind"] == "image"]


def n_done(out: Path) -> int:
    return len(images_in(out))


def temporary_files(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if path.name.startswith(".") and path.suffix == ".tmp"]
