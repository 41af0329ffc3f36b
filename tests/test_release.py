"""What is released: two distributions that install and run, and the files that describe them."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import starmerge_models
from tests.conftest import MakeAdapter

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest has there

_ROOT = Path(__file__).parents[1]
_DEMO = _ROOT / "packages" / "demo"
_WORKFLOWS = sorted((_ROOT / ".github" / "workflows").glob("*.yml"))
_CHANGELOG = (_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
_CITATION = yaml.safe_load((_ROOT / "CITATION.cff").read_text(encoding="utf-8"))

_FRESH = os.environ.get("FRESH_PYTHONS", "").split()
"""Interpreters to install into with all that is needed, from a package index: ``make fresh``."""


def _project(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return content


def _run(*command: object, **options: Any) -> str:
    """Run a command that succeeds, without this checkout on the path; return what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        list(map(str, command)),
        check=False,
        **{"capture_output": True, "text": True, "env": env, **options},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return str(finished.stdout)


def _build(folder: Path, output: Path, *kinds: str) -> None:
    options = [part for kind in kinds for part in ("-t", kind)]
    _run(sys.executable, "-m", "hatchling", "build", "-d", output, *options, cwd=folder)


def _contents(wheel: Path) -> dict[str, str]:
    """Return the SHA-256 of a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@dataclass(frozen=True)
class Built:
    """The distributions, core first."""

    wheels: tuple[Path, Path]
    sdists: tuple[Path, Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return the wheels and source distributions of this checkout."""
    wheels, sdists = [], []
    for project in (_ROOT, _DEMO):
        folder = tmp_path_factory.mktemp("dist")
        _build(project, folder, "wheel", "sdist")
        wheels += folder.glob("*.whl")
        sdists += folder.glob("*.tar.gz")
    return Built((wheels[0], wheels[1]), (sdists[0], sdists[1]))


def _package(folder: Path) -> set[str]:
    """Return the files of a package, as a wheel has them."""
    return {
        str(file.relative_to(folder.parent))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_a_wheel_holds_its_package_and_the_licence_and_nothing_else(built: Built) -> None:
    core, demo = map(_contents, built.wheels)
    for found, package in (
        (core, _ROOT / "src" / "starmerge_models"),
        (demo, _DEMO / "src" / "starmerge_models_demo"),
    ):
        info = {name for name in found if ".dist-info/" in name}
        assert found.keys() - info == _package(package)
        assert f"{package.name}/py.typed" in found
        assert any(name.endswith("/licenses/LICENSE") for name in info)
    assert built.wheels[0].stat().st_size < 1.5e6
    assert not [name for name in core if "adapter_model" in name]
    adapters = [name for name in demo if name.endswith("adapter_model.safetensors")]
    assert len(adapters) == 8
    assert (_DEMO / "LICENSE").read_bytes() == (_ROOT / "LICENSE").read_bytes()


def test_the_wheel_of_a_source_distribution_is_that_of_the_checkout(
    built: Built, tmp_path: Path
) -> None:
    for sdist, wheel in zip(built.sdists, built.wheels, strict=True):
        folder = tmp_path / sdist.name.removesuffix(".tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path)
        _build(folder, tmp_path / "again", "wheel")
        assert _contents(tmp_path / "again" / wheel.name) == _contents(wheel)
        tops = {path.name for path in folder.iterdir()}
        assert tops <= {
            ".gitignore", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", "README.md",
            "pyproject.toml", "src",
        }  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """An environment in which nothing of this checkout can be imported."""

    folder: Path

    def run(self, *command: object, **options: Any) -> str:
        """Run one of its commands, away from this checkout."""
        name, *arguments = command
        return _run(self.folder / "bin" / str(name), *arguments, cwd=self.folder, **options)

    def install(self, wheels: Sequence[Path], *, needs: bool) -> None:
        """Install wheels, with what they need or alone."""
        alone = [] if needs else ["--no-deps", "--no-index"]
        pip = [sys.executable, "-m", "pip", "--python", self.folder / "bin" / "python"]
        _run(*pip, "install", "--quiet", *alone, *wheels)


@pytest.fixture(scope="module", params=[None, *_FRESH])
def environment(
    request: pytest.FixtureRequest, built: Built, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """Return an environment with the core's wheel.

    What it needs is this interpreter's own, or installed for the one that was asked for.
    """
    made = Environment(tmp_path_factory.mktemp("fresh") / "env")
    _run(request.param or sys.executable, "-m", "venv", "--without-pip", made.folder)
    made.install(built.wheels[:1], needs=request.param is not None)
    if request.param is not None:
        made.install([Path("platformdirs")], needs=True)
        return made
    # A folder that a .pth file names is searched, but the .pth files in it, which would lead to
    # this checkout, are not read.
    (site,) = (made.folder / "lib").glob("python*/site-packages")
    paths = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (site / "others.pth").write_text("\n".join(sorted(paths)) + "\n")
    return made


_COMMANDS = """
import contextlib, io, json, sys
from starmerge_models.cli import main

told = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["starmerge", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, \\
            contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as end:
            code = end.code
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""
"""Runs commands one after the other, and prints of each the exit code and what it printed."""


def test_the_wheels_run_in_a_fresh_environment(
    environment: Environment,
    built: Built,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    where = environment.run("python", "-c", "import starmerge_models as s; print(s.__file__)")
    assert Path(where.strip()).is_relative_to(environment.folder)
    assert environment.run("starmerge", "--version") == f"{starmerge_models.__version__}\n"

    def run(*commands: Sequence[object]) -> list[tuple[int, str, str]]:
        arguments = json.dumps([list(map(str, command)) for command in commands])
        told: list[tuple[int, str, str]] = json.loads(
            environment.run("python", "-c", _COMMANDS, arguments)
        )
        return told

    adapters = [make_adapter(name, seed=seed) for seed, name in enumerate("ab")]
    merge = ["merge", tiny_base, *adapters, "-m", "star", "-o", tmp_path / "merged"]
    demo = ["merge", "--as", "adapter", "demo:digits", "demo:past", "-m", "average"]
    demo += ["-o", str(tmp_path / "one")]
    listed, merged, refused = run(["methods"], merge, demo)
    assert listed[0] == 0
    assert "\n  star" in listed[1]
    assert merged[0] == 0, merged
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert refused[0] == 2
    assert "pip install 'starmerge-models[demo]'" in refused[2]

    environment.install(built.wheels[1:], needs=False)
    listed, merged = run(["demo", "list"], demo)
    assert "demo:digits\n" in listed[1]
    assert merged[0] == 0, merged
    assert (tmp_path / "one" / "adapter_model.safetensors").is_file()


def test_changelog_version_and_citation_agree() -> None:
    version = Version(starmerge_models.__version__)
    first, *released = re.findall(r"^## (.+)$", _CHANGELOG, flags=re.MULTILINE)
    if first == "Unreleased":
        assert version.is_devrelease, "Only a released version stands without .dev0."
        assert not released or version > Version(released[0].partition(" - ")[0])
        assert "date-released" not in _CITATION
    else:
        assert first == f"{version} - {_CITATION['date-released']}"
    assert _CITATION["version"] == str(version)


def test_the_pythons_are_those_of_the_classifiers_and_are_tested() -> None:
    project = _project(_ROOT)
    prefix = "Programming Language :: Python :: "
    declared = [
        text.removeprefix(prefix)
        for text in project["classifiers"]
        if re.fullmatch(rf"{prefix}3\.\d+", text)
    ]
    jobs = yaml.safe_load((_ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    tested = jobs["tests"]["strategy"]["matrix"]["python"]
    assert len(tested) == 3
    assert set(tested) <= set(declared)
    assert (tested[0], tested[-1]) == (declared[0], declared[-1])
    for folder in (_ROOT, _DEMO):
        assert _project(folder)["requires-python"] == f">={declared[0]}"


def test_extras_differ_and_the_demo_takes_the_data_of_this_checkout() -> None:
    extras = _project(_ROOT)["optional-dependencies"]
    whole = {
        name: frozenset(map(str, map(Requirement, requirements)))
        for name, requirements in extras.items()
    }
    for name, requirements in whole.items():
        assert requirements != {f"starmerge-models[{name}]"}
        assert len(requirements) > 1 or "starmerge-models[" not in next(iter(requirements))
    assert len(set(whole.values())) == len(whole)
    data = _project(_DEMO)
    (wanted,) = (Requirement(r) for r in extras["demo"] if r.startswith(data["name"]))
    assert data["version"] in wanted.specifier


def _script(name: str) -> str:
    """Return a program of this environment."""
    program = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert program is not None, f"{name} is not installed; it comes with the extra dev."
    return program


def test_the_workflows_and_the_citation_follow_their_schemas() -> None:
    assert {file.name for file in _WORKFLOWS} == {"ci.yml", "release.yml"}
    check = [_script("check-jsonschema"), "--builtin-schema"]
    _run(*check, "vendor.github-workflows", *_WORKFLOWS)
    _run(*check, "vendor.citation-file-format", _ROOT / "CITATION.cff")


def test_zizmor_finds_nothing_that_a_stranger_could_use_in_the_workflows() -> None:
    _run(_script("zizmor"), "--offline", "--quiet", *_WORKFLOWS)


def test_the_targets_and_extras_that_the_workflows_name_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in _WORKFLOWS:
        for line in re.findall(r"\bmake (.+)", file.read_text()):
            words = [word for word in line.split() if "=" not in word]
            assert set(words) <= targets, f"{file.name}: make {line}"
