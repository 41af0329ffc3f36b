"""What stands on a page, for tests."""

from starmerge_models.study.page import Chart, Page, Table
from starmerge_models.study.page.charts import specification


def parts_of(page: Page, kind: type) -> list:
    return [part for section in page.sections for part in section.parts if isinstance(part, kind)]


def table_of(page: Page, caption: str) -> Table:
    return next(table for table in parts_of(page, Table) if table.caption.startswith(caption))


def layers_of(chart: Chart) -> list[dict]:
    """Return the layers of a chart, each with its data."""
    whole = specification(chart)
    return [{"data": whole.get("data"), **layer} for layer in whole["layer"]]


def drawn(chart: object, mark: str) -> list[dict]:
    """Return the data of the layers of one mark."""
    layers = layers_of(Chart(chart, "", ""))
    return [row for one in layers if one["mark"]["type"] == mark for row in one["data"]["values"]]
