"""The example of a package with plug-ins, installed into a folder of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.installing import install

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest has there

EXAMPLE = Path(__file__).parents[1] / "examples" / "plugin"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the example's package and its metadata, as its pyproject.toml says."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    shutil.copytree(EXAMPLE / "src" / "starmerge_example", site / "starmerge_example")
    install(site, project["name"], {}, project["entry-points"], version=project["version"])
    return site


def test_the_example_passes_its_own_tests(site: Path) -> None:
    path = [str(site), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # it needs none of those that are installed here
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)]
    finished = subprocess.run(
        command, check=False, capture_output=True, text=True, env=env, cwd=EXAMPLE
    )
    assert finished.returncode == 0, finished.stdout
    assert "5 passed" in finished.stdout


def test_the_example_is_listed_with_its_package(
    starmerge: Callable[..., subprocess.CompletedProcess[str]],
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = starmerge("methods", site=site)
    assert methods.returncode == 0, methods.stderr
    (line,) = (line for line in methods.stdout.splitlines() if line.startswith("  median"))
    assert line.endswith("(of the package starmerge-example 0.1.0)")
    monkeypatch.setenv("COLUMNS", "200")
    tasks = " ".join(starmerge("tasks", site=site).stdout.split())
    assert "How is the word written backwards? (of the package starmerge-example 0.1.0)" in tasks
