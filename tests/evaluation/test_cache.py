"""The cache of answers: found again if nothing changed, never found if anything did."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from platformdirs import user_cache_path
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.hashing import cached_blake3_of
from starmerge_models.evaluation import cache as caching
from starmerge_models.evaluation.cache import Record, ScoreCache, score_key
from starmerge_models_demo import ADAPTERS
from tests.conftest import edit_json

RECORDS: list[Record] = [
    {"response": "four", "shortened": False},
    {"response": 'a "b"\n\r\u2028 ß 四\0', "shortened": True},
    {"response": "", "credit": 1 / 3, "value": None},
]
KEY = "0123456789abcdef" * 4


def _key(*folders: Path, device: str = "cpu", dtype: str = "bfloat16", **asked: Any) -> str:
    return score_key(folders, {"task": "Is it?"} | asked, device=device, dtype=dtype)


@pytest.fixture
def model(tmp_path: Path, tiny_base: Path) -> tuple[Path, Path]:
    """Return the folders of one of the demo's adapters and of a base with a chat template."""
    adapter, base = tmp_path / "model" / "past", tmp_path / "model" / "base"
    shutil.copytree(ADAPTERS / "past", adapter)
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (base / "tokenizer.json").write_text('{"vocab": {}}')
    return adapter, base


def _flip_last_byte(file: Path) -> None:
    """Change a byte in place, so that size, inode and the time of writing stay as they were."""
    status = file.stat()
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    [
        "past/adapter_model.safetensors",
        "past/adapter_config.json",
        "base/model.safetensors",
        "base/config.json",
        "base/generation_config.json",
        "base/tokenizer.json",
        "base/chat_template.jinja",
    ],
)
def test_a_changed_byte_of_any_file_of_the_model_is_a_miss(
    model: tuple[Path, Path], name: str
) -> None:
    key = _key(*model)
    file = model[0].parent / name
    _flip_last_byte(file)
    assert _key(*model) != key
    _flip_last_byte(file)
    assert _key(*model) == key


def test_another_alpha_of_the_adapter_is_a_miss(model: tuple[Path, Path]) -> None:
    key = _key(*model)
    config = json.loads((model[0] / "adapter_config.json").read_text())
    edit_json(model[0] / "adapter_config.json", lora_alpha=config["lora_alpha"] * 2)
    assert _key(*model) != key


def test_a_changed_weight_is_a_miss(model: tuple[Path, Path]) -> None:
    key = _key(*model)
    file = model[1] / "model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    save_file(tensors, file, metadata={"format": "pt"})
    assert _key(*model) != key


def test_a_file_more_or_less_is_a_miss(model: tuple[Path, Path]) -> None:
    key = _key(*model)
    added = model[1] / "special_tokens_map.json"
    added.write_text("{}")
    assert _key(*model) != key
    added.rename(model[1] / "added_tokens.json")
    assert _key(*model) != key
    (model[1] / "added_tokens.json").unlink()
    (model[1] / "chat_template.jinja").unlink()
    assert _key(*model) != key


def test_an_adapter_on_its_base_is_neither_of_them_alone(model: tuple[Path, Path]) -> None:
    adapter, base = model
    assert len({_key(adapter, base), _key(adapter), _key(base), _key(base, adapter)}) == 4


def test_what_is_asked_and_how_is_part_of_the_key(model: tuple[Path, Path]) -> None:
    keys = {
        _key(*model),
        _key(*model, task="Is it not?"),
        _key(*model, scorer="rank"),
        _key(*model, max_prompt=512),
        _key(*model, device="cuda"),
        _key(*model, dtype="float32"),
    }
    assert len(keys) == 6


def test_the_order_of_the_settings_does_not_count(model: tuple[Path, Path]) -> None:
    assert _key(*model, chat="none", date=None) == _key(*model, date=None, chat="none")


def test_a_moved_and_renamed_model_is_found_again(model: tuple[Path, Path], tmp_path: Path) -> None:
    key = _key(*model)
    adapter = model[0].rename(tmp_path / "renamed")
    base = Path(shutil.copytree(model[1], tmp_path / "copied"))
    assert _key(adapter, base) == key


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE.txt", ".gitattributes", "merge_report.json", "optimizer.pt"]
)
def test_what_has_no_part_in_answers_does_not_count(model: tuple[Path, Path], name: str) -> None:
    key = _key(*model)
    for folder in model:
        (folder / name).write_text("other")
        (folder / "checkpoint-500").mkdir()
        (folder / "checkpoint-500" / "model.safetensors").write_text("other")
    assert _key(*model) == key


def test_a_file_of_a_subfolder_counts(model: tuple[Path, Path]) -> None:
    shard = model[1] / "weights" / "model-1.safetensors"
    shard.parent.mkdir()
    shard.write_text("one")
    key = _key(*model)
    shard.write_text("other")
    assert _key(*model) != key


@pytest.mark.parametrize("package", ["torch", "transformers", "tokenizers", "peft"])
def test_another_version_of_a_package_is_a_miss(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    key = _key(*model)
    installed = tmp_path / "site" / f"{package.replace('-', '_')}-99.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Name: {package}\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(installed.parent)
    assert _key(*model) != key


def test_another_version_of_starmerge_is_a_miss(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = _key(*model)
    monkeypatch.setattr("starmerge_models.versions.__version__", "99.0")
    assert _key(*model) != key


def test_changed_code_of_the_evaluation_is_a_miss(
    model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copied = Path(caching.__file__).parent, tmp_path / "evaluation"
    shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
    before = _key(*model)
    monkeypatch.setattr(caching, "__file__", str(copied / "cache.py"))
    assert _key(*model) == before, "the same code in another place"
    with (copied / "models" / "prompts.py").open("a") as file:
        file.write("#")
    assert _key(*model) != before


def test_the_demos_adapters_have_keys_of_their_own_and_the_base_is_read_once(
    smollm2: Path,
) -> None:
    def bytes_read() -> int:
        status = Path("/proc/self/io").read_text()
        return int(status.partition("rchar: ")[2].partition("\n")[0])

    adapters = sorted(path for path in ADAPTERS.iterdir() if path.is_dir())
    keys = {_key(smollm2), *(_key(adapter, smollm2) for adapter in adapters)}
    assert len(keys) == len(adapters) + 1
    if sys.platform == "linux":
        before = bytes_read()
        assert _key(smollm2) in keys
        assert bytes_read() - before < (smollm2 / "model.safetensors").stat().st_size / 10


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    hashes = set()
    for number in range(200):  # some within one tick of the file system's clock
        file.write_bytes(number.to_bytes(4, "big"))
        hashes.add(cached_blake3_of(file))
    assert len(hashes) == 200


_values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
_records = st.lists(st.fixed_dictionaries({"response": st.text(st.characters()), "value": _values}))


@given(records=_records, others=_records)
def test_what_was_put_is_what_one_gets(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], others: list[Record]
) -> None:
    cache = ScoreCache(tmp_path_factory.mktemp("cache") / "not" / "yet")
    assert cache.get(KEY) is None
    cache.put(KEY, others)
    cache.put(KEY, records)
    assert cache.get(KEY) == records
    assert cache.get(KEY[::-1]) is None
    assert ScoreCache(cache.folder).get(KEY) == records
    assert [file.name for file in cache.folder.iterdir()] == [f"{KEY}.jsonl"]


def test_a_torn_file_is_absent_and_replaced(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.put(KEY, RECORDS)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert cache.get(KEY) is None
    cache.put(KEY, RECORDS)
    assert file.read_bytes() == whole
    assert cache.get(KEY) == RECORDS


def test_a_damaged_file_is_absent(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.put(KEY, RECORDS)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert cache.get(KEY) is None
    file.write_bytes(whole + b"\n")
    assert cache.get(KEY) is None


def test_a_file_under_the_name_of_another_is_absent(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.put(KEY, RECORDS)
    [file] = tmp_path.iterdir()
    file.rename(tmp_path / f"{KEY[::-1]}.jsonl")
    assert cache.get(KEY[::-1]) is None


def test_a_folder_in_a_files_place_is_absent(tmp_path: Path) -> None:
    (tmp_path / f"{KEY}.jsonl").mkdir()
    assert ScoreCache(tmp_path).get(KEY) is None


def test_processes_that_write_one_file_at_once_leave_a_whole_one(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path;"
        "from starmerge_models.evaluation.cache import ScoreCache;"
        "child = os.fork();"
        "cache = ScoreCache(Path(sys.argv[1]));"
        "records = [{'response': ('a' if child else 'b') * 1000}] * 50;"
        "[cache.put(sys.argv[2], records) for _ in range(100)];"
        "sys.exit(os.waitpid(child, 0)[1] if child else 0)"
    )
    cache = ScoreCache(tmp_path / "cache")
    whole = [[{"response": text * 1000}] * 50 for text in "ab"]
    writing = subprocess.Popen([sys.executable, "-c", code, str(cache.folder), KEY])
    seen = 0
    while writing.poll() is None:
        records = cache.get(KEY)
        assert records in whole or (records is None and not seen)
        seen += records is not None
        time.sleep(0.001)
    assert writing.returncode == 0
    assert seen
    assert cache.get(KEY) in whole
    assert [file.name for file in cache.folder.iterdir()] == [f"{KEY}.jsonl"]


def test_a_disk_that_takes_nothing_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = ScoreCache(tmp_path / "file" / "scores")
    with pytest.warns(UserWarning, match=r"could not be cached in .*scores, and the next run"):
        cache.put(KEY, RECORDS)
    assert cache.get(KEY) is None
    assert cache.size == 0


def test_clearing_takes_the_cached_files_and_nothing_else(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "cache")
    assert (cache.size, cache.clear()) == (0, 0)
    cache.put(KEY, RECORDS)
    cache.put(KEY[::-1], [])
    (cache.folder / ".partial-killed").mkdir()
    (cache.folder / ".partial-killed" / "record").write_text("x")
    assert cache.size == sum(file.stat().st_size for file in cache.folder.glob("*.jsonl"))
    (cache.folder / "mine.jsonl").write_text("kept")
    assert cache.clear() == 2
    assert cache.size == 0
    assert [file.name for file in cache.folder.iterdir()] == ["mine.jsonl"]


def test_the_files_lie_in_the_users_cache_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ScoreCache().folder == user_cache_path("starmerge") / "scores"
