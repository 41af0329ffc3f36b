"""The rooms of the package, and which of them may import which: the contracts in pyproject.toml."""

from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

_ROOT = Path(__file__).parents[1]


def test_imports_go_one_way(capsys, monkeypatch):
    monkeypatch.chdir(_ROOT)
    status = lint_imports(config_filename=str(_ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out
