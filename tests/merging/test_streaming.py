"""Merges of files by several threads, within a memory, copied bytes: the same result each time."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import starmerge_models as sm
from tests.conftest import MakeAdapter, MakeFinetune

_METHODS = (
    "star",
    "average",
    "ties",
    "star+ties",
    "dare+task_arithmetic",
    "della+ties",
    "metagpt",
    "tsv_m+scale",
    "task_arithmetic+svc",
    "covariance+own_response",
    "knots",
    "emr",
)


def _content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "README.md"  # whose title is the folder's name
    }


@pytest.mark.parametrize("method", _METHODS)
def test_threads_and_memory_change_no_byte(
    method: str,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    make_finetune: MakeFinetune,
    tmp_path: Path,
) -> None:
    models = {
        "one": make_adapter("one", seed=1),
        "two": make_adapter("two", seed=2, r=3, target_modules=["v_proj", "down_proj"]),
        "full": make_finetune("full", seed=3),
    }
    expected = _content(
        sm.merge(tiny_base, models, method, output=tmp_path / "alone", threads=1).path
    )

    @settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(threads=st.integers(1, 5), memory=st.sampled_from([1, 5_000, 30_000, 10**9]))
    def check(threads: int, memory: int) -> None:
        result = sm.merge(
            tiny_base,
            models,
            method,
            output=tmp_path / "together",
            overwrite=True,
            threads=threads,
            memory=memory,
        )
        assert _content(result.path) == expected

    check()


def test_a_base_on_another_file_system_is_copied_too(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Where copy_file_range may refuse."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    adapter = make_adapter("one", seed=1)
    here = sm.merge(tiny_base, [adapter], output=tmp_path / "out").path
    folder = elsewhere / f"starmerge-{os.getpid()}"
    try:
        there = sm.merge(tiny_base, [adapter], output=folder).path
        assert (there / "model.safetensors").read_bytes() == (
            here / "model.safetensors"
        ).read_bytes()
    finally:
        subprocess.run(["rm", "-rf", folder], check=True)
