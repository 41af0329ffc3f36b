"""The image: what its Dockerfile says, what it is built of, and how the manual runs it."""

import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from starmerge_models import cli

_ROOT = Path(__file__).parents[1]
_LINES = [
    line
    for line in (_ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]
_PAGE = (_ROOT / "docs" / "operation.md").read_text(encoding="utf-8")


def _all(instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in _LINES if line.startswith(f"{instruction} ")]


def test_hadolint_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which(
        "hadolint"
    )
    if linter is None:
        pytest.skip("hadolint is not installed; it comes with the extra dev, for most platforms.")
    command = [linter, "--failure-threshold", "style", str(_ROOT / "Dockerfile")]
    linted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (linted.returncode, linted.stdout) == (0, "")


def test_the_base_has_a_version_the_user_is_not_root_and_the_command_is_starmerge() -> None:
    (version,) = (text.partition("=")[2] for text in _all("ARG") if text.startswith("PYTHON="))
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", version)
    assert {words.split()[0] for words in _all("FROM")} == {"python:${PYTHON}"}
    user = _all("USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert _all("ENTRYPOINT") == ['["starmerge"]']
    assert yaml.safe_load(_all("VOLUME")[0]) == ["/cache", "/scratch"]
    environment = dict(word.split("=", 1) for line in _all("ENV") for word in shlex.split(line))
    assert environment["XDG_CACHE_HOME"] == "/cache"
    assert environment["TMPDIR"] == "/scratch"
    # Neither by value nor as an argument, which the history of an image keeps.
    assert not re.search(r"token|secret|password|credential", "\n".join(_LINES), re.IGNORECASE)


def test_what_is_copied_is_there_and_is_all_that_the_build_is_given() -> None:
    copied = {
        source
        for line in _all("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert all((_ROOT / source).exists() for source in copied)
    lines = (_ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def _examples() -> dict[str, Any]:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", _PAGE, flags=re.MULTILINE | re.DOTALL)
    compose, job = map(yaml.safe_load, blocks)
    return {"compose": compose, "job": job}


def _check_arguments(arguments: list[str]) -> None:
    """Make sure that the command line takes arguments."""
    group: Any = typer.main.get_command(cli.app)
    command = group.commands[arguments[0]]
    common = {name for parameter in group.params for name in parameter.opts}
    assert arguments[-2] in common
    parsed = command.make_context("merge", arguments[1:-2]).params
    assert str(parsed["output"]) == "merged"


def test_the_example_for_compose_can_be_run() -> None:
    example = _examples()["compose"]
    (service,) = example["services"].values()
    _check_arguments(service["command"])
    mounts = dict(volume.split(":") for volume in service["volumes"])
    assert set(mounts.values()) == {"/models", *yaml.safe_load(_all("VOLUME")[0])}
    assert {name for name in mounts if "/" not in name} == set(example["volumes"])
    assert service["user"] == _all("USER")[-1]


def test_the_example_for_kubernetes_can_be_run() -> None:
    job = _examples()["job"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _check_arguments(container["args"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        "/models",
        "/cache",
        "/scratch",
    }
    # Kubernetes takes a policy for failures only with this, and a name that is a container's.
    assert pod["restartPolicy"] == "Never"
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert f"{pod['securityContext']['runAsUser']}:" in _all("USER")[-1]


def _builder() -> str | None:
    """Return a program that builds images and can: Docker needs its daemon."""
    for program in ("docker", "podman", "buildah"):
        if shutil.which(program):
            asked = subprocess.run([program, "info"], capture_output=True, check=False)
            if asked.returncode == 0:
                return program
    return None


def test_the_image_is_built_and_runs() -> None:
    builder = _builder()
    if builder is None:
        pytest.skip("No builder of images runs here: docker with its daemon, podman or buildah.")
    base = f"docker.io/library/python:{_all('ARG')[0].partition('=')[2]}"
    if subprocess.run([builder, "pull", base], capture_output=True, check=False).returncode:
        pytest.skip(f"{builder} cannot fetch {base} here.")
    subprocess.run([builder, "build", "-t", "starmerge:test", _ROOT], check=True)
    run = [builder, "run", "--rm", "--memory", "1g", "--cpus", "1.5", "starmerge:test"]
    told = subprocess.run(
        [*run, "methods", "star", "--log", "text"], capture_output=True, text=True, check=True
    )
    assert told.stdout.startswith("star: ")
    assert "1.5 processors, 1.07 GB of memory" in told.stderr
