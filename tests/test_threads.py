"""Who gets how many threads, and OpenCV's setting around a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from cellseg_deploy import threads
from cellseg_deploy.backends import default_device
from cellseg_deploy.cli import console
from cellseg_deploy.errors import UsageError
from cellseg_deploy.threads import ThreadPlan, plan_for


@pytest.mark.parametrize(
    ("n_cores", "total", "expected"),
    [
        (2, None, ThreadPlan(None, 2)),
        (64, None, ThreadPlan(None, 16)),
        (1, None, ThreadPlan(None, 1)),
        (1, 1, ThreadPlan(1, 1, exclusive=True)),
        (64, 1, ThreadPlan(1, 1, exclusive=True)),
        (2, 2, ThreadPlan(2, 2)),
        (2, 5, ThreadPlan(5, 2)),
        (64, 2, ThreadPlan(1, 1)),
        (64, 8, ThreadPlan(6, 2)),
        (1, 3, ThreadPlan(3, 1)),
    ],
)
def test_on_a_cpu(n_cores: int, total: int | None, expected: ThreadPlan) -> None:
    assert plan_for(n_cores, total, on_gpu=False) == expected


@pytest.mark.parametrize("total", range(2, 64))
def test_fewer_than_the_cores_are_kept_to(total: int) -> None:
    plan = plan_for(64, total, on_gpu=False)
    assert plan.engine is not None
    assert plan.engine + plan.helpers == total


@pytest.mark.parametrize(
    ("n_cores", "total", "expected"),
    [
        (8, None, ThreadPlan(None, 8)),
        (64, None, ThreadPlan(None, 16)),
        (8, 3, ThreadPlan(1, 3)),
        (8, 1, ThreadPlan(1, 1)),
    ],
)
def test_on_a_gpu_the_helpers_get_the_cores(n_cores: int, total: int | None, expected: ThreadPlan) -> None:
    assert plan_for(n_cores, total, on_gpu=True) == expected


def test_none_at_all_cannot_be_meant() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        threads.plan(0)


def test_the_plan_is_for_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads.cores() >= 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5, 7}, raising=False)
    assert threads.plan() == ThreadPlan(None, 3)
    assert threads.plan(2, device="cuda:1") == ThreadPlan(1, 2)


def test_opencv_has_one_thread_within_and_its_own_afterwards() -> None:
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        with threads.single_threaded_libraries():
            assert cv2.getNumThreads() == 1
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_blocks_that_overlap_restore_what_was_before_the_first() -> None:
    """As two maps in two threads."""
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    try:
        first, second = threads.single_threaded_libraries(), threads.single_threaded_libraries()
        with first:
            second.__enter__()
        assert cv2.getNumThreads() == 1
        second.__exit__(None, None, None)
        assert cv2.getNumThreads() == 2
    finally:
        cv2.setNumThreads(before)


def test_many_images_get_as_many_helpers_as_the_engine_has_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    assert threads.plan_of_engine(None) == ThreadPlan(None, 8)
    assert threads.plan_of_engine(3) == ThreadPlan(3, 3)
    assert threads.plan_of_engine(1) == ThreadPlan(1, 1, exclusive=True)
    assert threads.plan_of_engine(64) == ThreadPlan(64, threads.MAX_HELPERS)


@pytest.mark.parametrize(
    ("model", "backend", "device"),
    [
        (None, "auto", "cpu"),
        ("m.onnx", "openvino", "cpu"),
        ("m.xml", "auto", "cpu"),
        ("m.onnx", "tensorrt", "cuda"),
        ("m.ENGINE", "auto", "cuda"),
    ],
)
def test_the_command_plans_for_the_device_that_will_be_opened(
    monkeypatch: pytest.MonkeyPatch, model: str | None, backend: str, device: str
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    path = None if model is None else Path(model)
    assert default_device(path, backend) == device
    plan = console.plan_threads(4, device=None, model=path, backend=backend)
    assert plan == (ThreadPlan(3, 1) if device == "cpu" else ThreadPlan(1, 4))
    assert console.plan_threads(4, device="cuda:1", model=path, backend=backend) == ThreadPlan(1, 4)


def group(root: Path, name: str, **files: str) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (folder / file.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("groups", "own", "expected"),
    [
        ({"": {"cpu__max": "150000 100000\n"}}, "0::/\n", 1.5),
        ({"": {"cpu__max": "max 100000\n"}}, "0::/\n", None),
        ({"a/b": {"cpu__max": "400000 100000"}, "a": {"cpu__max": "200000 100000"}}, "0::/a/b\n", 2.0),
        ({"other": {"cpu__max": "100000 100000"}}, "0::/a\n", None),
        ({"cpu": {"cpu__cfs_quota_us": "50000\n", "cpu__cfs_period_us": "100000\n"}}, "4:cpu,cpuacct:/\n", 0.5),
        ({"cpu": {"cpu__cfs_quota_us": "-1\n", "cpu__cfs_period_us": "100000\n"}}, "4:cpu,cpuacct:/\n", None),
        ({}, "", None),
    ],
)
def test_the_quota_of_a_container_is_known(
    tmp_path: Path, groups: dict[str, dict[str, str]], own: str, expected: float | None
) -> None:
    (tmp_path / "own").write_text(own)
    for name, files in groups.items():
        group(tmp_path / "root", name, **files)
    assert threads.cpu_quota(tmp_path / "root", tmp_path / "own") == expected


def test_a_container_gets_as_many_threads_as_its_quota_pays_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for quota, expected in ((None, 8), (0.5, 1), (2.0, 2), (2.5, 3), (64.0, 8)):
        monkeypatch.setattr(threads, "cpu_quota", lambda quota=quota: quota)
        assert threads.cores() == expected
