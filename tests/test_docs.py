"""The manual, where it speaks of what the code has."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import starmerge_models
from starmerge_models import Dense, merge_state
from starmerge_models.evaluation.scoring.matching import Reading, read
from starmerge_models.evaluation.scoring.metrics import Prediction, score
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.methods import METHODS, Pipeline, make_pipeline

_ROOT = Path(__file__).parents[1]
_PAGE = (_ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
_FIRST_TABLE = _PAGE.partition("\n## ")[0]
_ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\w-]+) \|", _FIRST_TABLE, flags=re.MULTILINE))
_CHAINS = sorted(set(re.findall(r"\b\w+(?:\+\w+)+\b", _PAGE)))


def test_the_page_on_methods_has_a_row_for_each_method_and_says_its_kind() -> None:
    kinds = {name: method.kind for name, method in METHODS.items()}
    assert kinds == _ROWS


def test_the_manual_describes_every_public_name() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (_ROOT / "docs").glob("*.md"))
    found = set(re.findall(r"^\.\. auto\w+:: starmerge_models\.(\w+)$", pages, flags=re.MULTILINE))
    names = {name for name in starmerge_models.__all__ if name[0] != "_"}
    assert names - found == set()


def test_the_examples_on_the_page_on_plug_ins_can_be_used(tmp_path: Path) -> None:
    page = (_ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.py").write_text(block)
    chain = make_pipeline(f"star+{tmp_path}/0.py:RootSum", {"power": 1})
    deltas = [{"w": Dense(torch.full((2, 2), float(n)))} for n in (1, 2)]
    merged = merge_state(deltas, Pipeline.of([chain.merge]))["w"].to_dense()
    assert torch.equal(merged, torch.full((2, 2), 1.5))
    predictions = [Prediction("1", "abcd", "abcd", "ab", 0.0)]
    assert score(predictions, f"{tmp_path}/1.py:brevity").value == 0.5
    assert score(predictions, f"{tmp_path}/1.py:length_ratio").value == 2
    bare = {"name": "t", "source": {"file": "rows.jsonl"}, "prompt": ""}
    rules = Task(**bare, match=f"{tmp_path}/2.py:json_field")
    assert read(rules, 'So: {"answer": "4"}', "4") == Reading("4", 1.0)
    assert read(rules, "So: 4", "4") == Reading(None, 0.0)
    close = Task(**bare, match=f"{tmp_path}/2.py:close_number", metric="f1")
    assert read(close, "3, no, 5", "4") == Reading(5.0, 0.9)
    (row,) = find_task(f"{tmp_path}/3.py:quiz").examples("test", 1)
    assert float(row.label) == int(row.fields["input"].split()[0]) + 1
    project = (_ROOT / "examples" / "plugin" / "pyproject.toml").read_text(encoding="utf-8")
    (offers,) = re.findall(r"^```toml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert all(line in project.splitlines() for line in offers.splitlines())


@pytest.mark.parametrize("chain", _CHAINS)
def test_every_chain_on_the_page_on_methods_can_be_made(chain: str) -> None:
    make_pipeline(chain)


def test_the_page_on_results_has_the_tables_that_the_stored_answers_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = _ROOT / "benchmarks" / "results.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), "tables"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    page = (_ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    assert printed.count("\n| ") > 50
    assert [line for line in printed.splitlines() if line not in page] == []
