"""Folders of inspections: JSON, tables for pandas, figures; written atomically.

- ``inspection.json``: everything
- ``report.md``: the report that the command prints
- ``models.csv``, ``conflicts.csv``, ``layers.csv``, ``tensors.csv``, ``pairs.csv``,
  ``spectra.csv``, and of merges ``kept.csv`` and ``kept_tensors.csv``: the tables
- ``ranks``, ``spectra``, ``conflicts`` and of merges ``kept``, each as ``.png`` and ``.pdf``
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from starmerge_models.checkpoints.writer import json_bytes
from starmerge_models.storage.publishing import Replaceable, check_output, output_folder
from starmerge_models.study.inspection.inspection import Inspection, Table

_JSON = "inspection.json"
_REPORT = "report.md"
_MEMBERS = (_JSON, _REPORT, "*.csv", "*.png", "*.pdf", "*.html")
_KIND = Replaceable("folder of an inspection", _JSON, _MEMBERS)


def check_inspection_folder(folder: Path, *, overwrite: bool) -> None:
    """Make sure that an inspection may be written to ``folder``, and its figures drawn.

    The caller must check before it computes the inspection.

    Raises:
        UsageError: The path exists and may not be replaced.
        ModuleNotFoundError: matplotlib or pandas is not installed.
    """
    import matplotlib  # noqa: F401, PLC0415  (slow to import)
    import pandas  # noqa: F401, PLC0415

    check_output(folder, overwrite=overwrite, kind=_KIND)


def write_inspection(folder: Path, inspection: Inspection, *, overwrite: bool = False) -> None:
    """Write an inspection into a folder, atomically.

    Args:
        folder: The output folder.
        inspection: The inspection.
        overwrite: Whether to replace an existing inspection.

    Raises:
        UsageError: The path exists and may not be replaced.
        StarmergeError: The disk is full, or fails otherwise.
    """
    check_inspection_folder(folder, overwrite=overwrite)
    from starmerge_models.study.figures.inspection import plots_of  # noqa: PLC0415  (slow to import)
    from starmerge_models.study.figures.style import save  # noqa: PLC0415

    with output_folder(folder, overwrite=overwrite, kind=_KIND) as made:
        made.put(_JSON, json_bytes(inspection.to_json()))
        made.put(_REPORT, f"{inspection.report}\n".encode())
        for table in get_args(Table):
            frame = inspection.to_frame(table)
            if len(frame):
                frame.to_csv(made.path / f"{table}.csv", index=False)
        for name, plot in plots_of(inspection).items():
            save(plot(inspection, made.path / f"{name}.png"), made.path / f"{name}.pdf")
