"""The rooms of the package, and which of them may import which: the contracts in pyproject.toml."""

import ast
from pathlib import Path

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

_ROOT = Path(__file__).parents[1]

_OPENING = {
    "exists", "glob", "is_dir", "is_file", "iterdir", "mkdir", "read_bytes", "read_text", "rename",
    "rglob", "stat", "unlink", "write_bytes", "write_text",
}  # fmt: skip
"""Methods of paths that look at files."""


def test_imports_go_one_way(capsys, monkeypatch):
    monkeypatch.chdir(_ROOT)
    # It would disable the loggers of this process, which other tests listen to.
    monkeypatch.setattr("logging.config.dictConfig", lambda settings: None)
    status = lint_imports(config_filename=str(_ROOT / "pyproject.toml"), no_cache=True)
    assert status == EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_files_of_models_are_opened_by_storage_alone():
    package = _ROOT / "src" / "starmerge_models"
    found = []
    for room in ("checkpoints", "merging"):
        for file in sorted((package / room).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    name = node.func
                    opens = isinstance(name, ast.Name) and name.id == "open"
                    opens |= (
                        isinstance(name, ast.Attribute)
                        and name.attr in _OPENING
                        and not isinstance(name.value, ast.Call)  # storage_of(file).stat
                        and ast.unparse(name) != "ACCELERATOR.exists"
                    )
                    opens |= isinstance(name, ast.Attribute) and ast.unparse(name) == "os.open"
                    if opens:
                        found.append(f"{file.relative_to(package)}:{node.lineno}")
    assert found == []
