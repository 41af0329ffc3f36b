"""The manual, where it speaks of what the code has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from starmerge.methods import METHODS, make_pipeline

_ROOT = Path(__file__).parents[1]
_PAGE = (_ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
_FIRST_TABLE = _PAGE.partition("\n## ")[0]
_ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\w-]+) \|", _FIRST_TABLE, flags=re.MULTILINE))
_CHAINS = sorted(set(re.findall(r"\b\w+(?:\+\w+)+\b", _PAGE)))


def test_the_page_on_methods_has_a_row_for_each_method_and_says_its_kind() -> None:
    kinds = {name: method.kind for name, method in METHODS.items()}
    assert kinds == _ROWS


@pytest.mark.parametrize("chain", _CHAINS)
def test_every_chain_on_the_page_on_methods_can_be_made(chain: str) -> None:
    make_pipeline(chain)


def test_the_page_on_results_has_the_tables_that_the_stored_answers_give() -> None:
    command = [sys.executable, str(_ROOT / "benchmarks" / "results.py"), "tables"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    page = (_ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    assert printed.count("\n| ") > 50
    assert [line for line in printed.splitlines() if line not in page] == []
