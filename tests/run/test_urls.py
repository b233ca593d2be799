"""Images from a bucket, and results copied to one: what a run on disk gives; one clear sentence for what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import infer, results, rows
from s3_server import S3Server, started

from cellseg_deploy.errors import OutputError
from cellseg_deploy.files import urls
from cellseg_deploy.run import upload

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture
def s3() -> Iterator[S3Server]:
    urls._system.cache_clear()
    with started() as server:
        yield server
    urls._system.cache_clear()


@pytest.fixture
def arguments(model: Path) -> tuple[object, ...]:
    return ("--model", model, "--scale", 1, "-q")


def expect_same(out: Path, disk: Path) -> None:
    """Same results; the report names the folder of the images."""
    report = {"report.html": b""}
    assert results(out) | report == results(disk) | report


def test_images_in_a_bucket_count_as_those_on_disk(
    s3: S3Server, folder: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    (folder / "b #1").mkdir()
    (folder / "b #1/ä+%20.png").write_bytes((folder / "b.png").read_bytes())
    s3.put(folder, "in/deep")
    out = tmp_path / "out"
    assert infer(f"s3://{s3.bucket.name}/in/deep", "-o", out, *arguments) == 3
    assert infer(folder, "-o", tmp_path / "disk", *arguments) == 3
    expect_same(out, tmp_path / "disk")
    record = json.loads((out / "run.json").read_text())
    assert record["inputs"]["paths"] == [f"s3://{s3.bucket.name}/in/deep"]


def test_a_run_of_a_bucket_resumes_and_sees_changed_images(
    s3: S3Server, folder: Path, tmp_path: Path, arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    s3.put(folder, "in")
    run = (f"s3://{s3.bucket.name}/in", "-o", tmp_path / "out", *arguments)
    assert infer(*run) == 3
    s3.bucket.put_object(Key="in/a.png", Body=(folder / "c.png").read_bytes())
    s3.bucket.put_object(Key="in/bad.png", Body=(folder / "b.png").read_bytes())
    assert infer(*run, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["done"], said["skipped"]) == (2, 3)


def test_the_scale_is_measured_in_a_bucket(s3: S3Server, four: Path, tmp_path: Path, model: Path) -> None:
    s3.put(four, "in")
    for images, out in ((f"s3://{s3.bucket.name}/in", "out"), (four, "disk")):
        assert infer(images, "-o", tmp_path / out, "--model", model, "--cell-diameter", "auto", "-q") == 0
    expect_same(tmp_path / "out", tmp_path / "disk")


# --- results to a bucket


def test_a_finished_run_is_copied(s3: S3Server, four: Path, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    out, url = tmp_path / "out", f"s3://{s3.bucket.name}/counts/1"
    assert infer(four, "-o", out, *arguments, "--upload", url) == 0
    there = s3.content("counts/1")
    assert there == {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    assert {"run.json", "journal.jsonl", "labels/a.png.tif", "cells.csv"} <= there.keys()


def test_a_copy_that_was_interrupted_is_resumed_and_never_looks_whole(
    s3: S3Server, four: Path, tmp_path: Path, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, url = tmp_path / "out", f"s3://{s3.bucket.name}/counts"
    run = (four, "-o", out, *arguments, "--upload", url)
    write, written = urls.write, list[str]()

    def fail_at(name: str) -> None:
        def broken(path: Path, content: bytes | Path) -> None:
            if path.name == name:
                raise OSError(5, "the line is cut", str(path))
            if isinstance(content, Path):
                written.append(path.name)
            write(path, content)

        monkeypatch.setattr(urls, "write", broken)

    fail_at("cells.csv")
    assert infer(*run) == 6
    assert set(s3.content("counts")) == {"journal.jsonl"}
    assert len(rows(out / "images.csv")) == 4
    fail_at("")
    assert infer(*run) == 0
    assert written.count("journal.jsonl") == 1  # not again
    assert written[-1] == "run.json"
    assert s3.content("counts").keys() == set(upload._files(out))
    written.clear()
    assert infer(*run) == 0
    assert written == []
    (four / "e.png").write_bytes((four / "a.png").read_bytes())
    fail_at("report.html")
    assert infer(*run) == 6
    assert "run.json" not in s3.content("counts")
    fail_at("")
    assert infer(*run) == 0
    assert s3.content("counts")["run.json"] == (out / "run.json").read_bytes()


def test_other_objects_are_never_taken_over(
    s3: S3Server,
    four: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    s3.bucket.put_object(Key="counts/thesis.txt", Body=b"mine")
    run = (four, "-o", tmp_path / "out", *arguments)
    assert infer(*run, "--upload", f"s3://{s3.bucket.name}/counts") == 6
    assert "is not empty (it holds thesis.txt) and no run of cellseg-infer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    s3.bucket.put_object(Key="ours/", Body=b"")  # a folder made in a browser
    url = ("--upload", f"s3://{s3.bucket.name}/ours")
    assert infer(*run, *url) == 0
    s3.bucket.put_object(Key="ours/thesis.txt", Body=b"mine")
    assert infer(*run, *url) == 0
    assert "has files that are not in" in capsys.readouterr().err
    assert s3.content("ours")["thesis.txt"] == b"mine"
    assert infer(four, "-o", tmp_path / "other", *arguments, "--count-rule", "all", *url) == 6
    assert "holds a different run: count rule" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_of_two_runs_at_the_same_time_one_is_copied(
    s3: S3Server, four: Path, tmp_path: Path, arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, url = tmp_path / "first", tmp_path / "second", Path(f"s3://{s3.bucket.name}/counts")
    assert infer(four, "-o", first, *arguments) == 0
    assert infer(four, "-o", second, *arguments, "--count-rule", "all") == 0
    upload.upload(first, url)
    there = s3.content("counts")
    with pytest.raises(OutputError, match="holds a different run: count rule"):
        upload.upload(second, url)
    monkeypatch.setattr(urls, "checksums", lambda _: {})  # both looked before either wrote
    with pytest.raises(OutputError, match="another run began to copy there"):
        upload.upload(second, url)
    assert s3.content("counts") == there


# --- what can be wrong


def test_each_mistake_gets_one_sentence(
    s3: S3Server,
    four: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3.put(four, "in")
    bucket = f"s3://{s3.bucket.name}"
    out = ("-o", tmp_path / "out", *arguments)

    def expect(code: int, said: str, *command: object) -> None:
        assert infer(*command) == code
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.startswith("Usage: ") or printed.count("\n") == 1, printed
        assert not (tmp_path / "out").exists()

    expect(2, "s3://no-such/in: the folder cannot be listed (no such bucket)", "s3://no-such/in", *out)
    expect(4, f"{bucket}/empty: no image found", f"{bucket}/empty", *out)
    expect(2, "gs://b/in: gs:// cannot be read; expected s3://BUCKET/FOLDER", "gs://b/in", *out)
    expect(2, "a URL must be passed alone", f"{bucket}/in", four, *out)
    expect(2, "OUT must be a folder on disk", four, "-o", f"{bucket}/out", *arguments)
    expect(2, "--upload must be a folder in a bucket", four, *out, "--upload", bucket)
    expect(2, "in/a.png: the folder cannot be listed (an object, not a folder", f"{bucket}/in/a.png", *out)
    expect(2, "must not contain each other", f"{bucket}/in", *out, "--upload", f"{bucket}/in/out")
    expect(6, "s3://no-such/out: cannot be written (no such bucket)", four, *out, "--upload", "s3://no-such/out")

    s3.check_rights()
    said = "access denied; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    expect(2, f"{bucket}/in: the folder cannot be listed ({said}", f"{bucket}/in", *out)
    expect(6, f"{bucket}/out: cannot be written ({said}", four, *out, "--upload", f"{bucket}/out")

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1/latest/meta-data")  # of the machine's role
    urls._system.cache_clear()
    said = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    expect(2, f"{bucket}/in: the folder cannot be listed ({said})", f"{bucket}/in", *out)
    expect(6, f"{bucket}/out: cannot be written ({said})", four, *out, "--upload", f"{bucket}/out")


def test_secrets_in_a_url_are_not_repeated(
    s3: S3Server, four: Path, tmp_path: Path, arguments: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    for secret in ("KEY:SECRET", "KEY:SEC/RET"):
        url = f"s3://{secret}@{s3.bucket.name}/in"
        assert infer(url, "-o", tmp_path / "out", *arguments) == 2
        assert infer(four, "-o", tmp_path / "out", *arguments, "--upload", url) == 6
        assert infer(four, "-o", url, *arguments) == 2
        printed = capsys.readouterr().err
        assert f"s3://...@{s3.bucket.name}/in" in printed
        assert not re.search(r"KEY:|SEC\b|SECRET@|RET@", printed)


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "b//a.png"])
def test_names_that_lead_elsewhere_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {f"bucket/in/{name}": {"size": 1}}
    monkeypatch.setattr(urls, "_system", lambda: SimpleNamespace(find=lambda *_, **__: listed))
    with pytest.raises(OSError, match="has a name that a file cannot have"):
        urls.sizes(Path("s3://bucket/in"))


def test_a_url_is_no_path_and_a_path_no_url() -> None:
    assert urls.text_of(Path("s3://bucket/a b/c.png")) == "s3://bucket/a b/c.png"
    assert Path(urls.text_of(Path("s3://bucket/a"))) == Path("s3://bucket/a")
    for path in ("/s3:/a", "a/s3:/b", "", "s3", "C:/a", "./images"):
        assert not urls.is_url(Path(path)), path
