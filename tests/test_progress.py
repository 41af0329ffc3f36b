"""Progress bars, where nobody sees them."""

import pytest

from starmerge.progress import progress_bar


def test_a_bar_leaves_nothing_in_a_file_or_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("merging", 2, show=True) as advance:
        advance(1)
        advance(1)
    assert capfd.readouterr() == ("", "")
