"""Progress bars, where nobody sees them."""

from io import StringIO

import pytest
from rich.console import Console
from rich.progress import Progress as Bar

from starmerge.progress import Progress, progress_bar


def test_a_bar_leaves_nothing_in_a_file_or_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("merging", 2, show=True) as advance:
        advance(1)
        advance(1)
    assert capfd.readouterr() == ("", "")


def test_a_bar_says_how_far_it_is_and_what_is_waited_for() -> None:
    console = Console(file=StringIO(), force_terminal=True)
    with Bar(console=console) as bar:
        task = bar.add_task("evaluating", total=None)
        progress = Progress("evaluating", (bar, task))
        progress.expects(12)
        progress.waits_for("asking [merged]: past")
        progress(5)
        (shown,) = bar.tasks
        assert (shown.description, shown.completed, shown.total) == (
            "evaluating: asking [merged]: past",
            5,
            12,
        )
