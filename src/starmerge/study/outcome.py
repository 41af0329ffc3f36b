"""What is drawn from a study's store: tables and figures, written into its folder."""

from __future__ import annotations

from starmerge.storage.publishing import output_file
from starmerge.study.averages import Averages
from starmerge.study.store import Store
from starmerge.study.tables import report

TABLE, AVERAGES = "table.md", "averages.csv"


def write_outcome(store: Store) -> str:
    """Write the tables and figures of a store into its folder; return the tables.

    Raises:
        UsageError: The store has no merges that can be averaged yet.
        StarmergeError: The disk is full, or fails otherwise.
    """
    table = report(store)
    with output_file(store.folder / TABLE, overwrite=True) as partial:
        partial.write_text(f"{table}\n", encoding="utf-8")
    with output_file(store.folder / AVERAGES, overwrite=True) as partial:
        Averages(store).to_frame().to_csv(partial, index=False)
    return table
