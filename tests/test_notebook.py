"""The quickstart notebook, run by a real kernel on the demo's models, cut to two layers."""

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

_NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_quickstart_runs_and_shows_its_results(small_demo: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(_NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("rows=24", "rows=2")  # the same code, quickly
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = ["".join(map(_html, cell.get("outputs", ()))) for cell in notebook.cells]
    page = "\n".join(shown)
    assert page.count("<table") >= 4  # the inspection, the frame, two evaluations
    assert "<b>shares</b>" in page  # the method that auto has taken
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "merged-adapter" / "adapter_model.safetensors").is_file()


def test_the_quickstart_is_stored_without_outputs() -> None:
    notebook = nbformat.read(_NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def _html(output: Any) -> str:
    return str(output.get("data", {}).get("text/html", ""))
