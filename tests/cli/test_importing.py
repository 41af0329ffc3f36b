"""What the package and its commands import, and how."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from starmerge_models.cli.importing import importing
from tests.conftest import MakeAdapter

Run = Callable[..., subprocess.CompletedProcess[str]]

_PROFILED = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
"""With it, Python tells on standard error what it imports."""

_FOR_MERGES = {"torch", "numpy", "pydantic", "yaml", "blake3"}
_FOR_SOME_MERGES = {"huggingface_hub", "transformers", "scipy", "regex"}
"""For models of the Hub, tensors that transformers renames, SVDs, and patterns of tensors."""
_NOT_FOR_MERGES = {"datasets", "matplotlib", "pandas", "peft", "pyarrow", "sklearn"}


def _imported(stderr: str) -> set[str]:
    """Return which packages a process imported, from what Python told of it."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


def test_the_package_imports_nothing_heavy() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", "import starmerge_models"],
        capture_output=True,
        text=True,
        check=True,
        env=_PROFILED,
    )
    imported = _imported(finished.stderr)
    assert "starmerge_models" in imported
    assert not imported & {"typer", "rich"}
    assert not imported & (_FOR_MERGES | _FOR_SOME_MERGES | _NOT_FOR_MERGES)


def test_help_imports_nothing_heavy(starmerge: Run) -> None:
    imported = _imported(starmerge("--help", env=_PROFILED).stderr)
    assert "typer" in imported
    assert not imported & (_FOR_MERGES | _FOR_SOME_MERGES | _NOT_FOR_MERGES)


@pytest.mark.parametrize("arguments", [["merge", "--help"], ["clean", "."], ["tasks"]])
def test_commands_that_compute_nothing_do_without_torch(
    starmerge: Run, arguments: list[str], tmp_path: Path
) -> None:
    finished = starmerge(*arguments, env=_PROFILED, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    imported = _imported(finished.stderr)
    assert "typer" in imported
    assert not imported & ({"torch"} | _FOR_SOME_MERGES | _NOT_FOR_MERGES)


def test_the_list_of_methods_imports_none_of_what_some_methods_need(starmerge: Run) -> None:
    finished = starmerge("methods", env=_PROFILED)
    assert finished.returncode == 0, finished.stderr
    assert not _imported(finished.stderr) & (_FOR_SOME_MERGES | _NOT_FOR_MERGES | {"rich", "yaml"})


def test_a_merge_of_adapters_in_folders_imports_what_it_needs(
    starmerge: Run, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    one, two = make_adapter("one", seed=1), make_adapter("two", seed=2)
    finished = starmerge("merge", tiny_base, one, two, "-o", tmp_path / "out", env=_PROFILED)
    assert finished.returncode == 0, finished.stderr
    imported = _imported(finished.stderr)
    assert imported >= _FOR_MERGES
    assert not imported & (_FOR_SOME_MERGES | _NOT_FOR_MERGES)


def test_the_collector_waits_for_imports_and_leaves_alone_what_they_made() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError), importing():
        assert not gc.isenabled()
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()
    assert gc.get_freeze_count() > before


def test_a_command_ends_without_a_search_for_garbage() -> None:
    script = (
        "import atexit, gc, sys\n"
        "atexit.register(lambda: print(len(gc.get_objects())))  # runs last\n"
        "from starmerge_models.cli import main\n"
        "sys.argv = ['starmerge', '--version']\n"
        "main()\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    _, left = finished.stdout.split()
    assert int(left) < 100  # of some 20,000
