"""Bad input, kind by kind: each is refused with a message that tells, soon, and nothing is left."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import starmerge_models
from starmerge_models.checkpoints import filling, isolated, names
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.metric import open_metric
from starmerge_models.checkpoints.names import naming_of
from starmerge_models.checkpoints.opening import open_checkpoint, open_safetensors
from starmerge_models.checkpoints.renaming import naming
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.tasks.files import load_task
from starmerge_models.evaluation.tasks.sources import read_file
from starmerge_models.evaluation.tasks.suites import load_suite
from starmerge_models.methods.notation import read_parameters
from starmerge_models.reading import read_json, read_yaml
from starmerge_models.storage.local_folder import LocalFile
from tests.checkpoints.bad_files import (
    World,
    legacy_bytes,
    merge_recipe,
    rezip,
    split_safetensors,
    time_limit,
    write_safetensors,
)
from tests.conftest import edit_json

Spoil = Callable[[World], Any]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "world")


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "find_spec", lambda _: None)


def _refuses(
    act: Callable[[], object], words: str, kind: type[StarmergeError] = StarmergeError
) -> None:
    with time_limit(20), pytest.raises(kind, match=words):
        act()


# The header of a safetensors file.


def _entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (json.dumps({"a": _entry()}).encode("utf-16"), "utf-8"),
        (b"\xef\xbb\xbf" + json.dumps({"a": _entry()}).encode(), "BOM"),
        (b" " + json.dumps({"a": _entry()}).encode(), "is no JSON object"),
        (json.dumps({"__metadata__": "x", "a": _entry()}), "__metadata__ is no object of texts"),
        (json.dumps({"__metadata__": {"a": 1}, "a": _entry()}), "__metadata__ is no object"),
        (json.dumps({"a": _entry(shape=[2**63])}), "a strange shape"),
        (json.dumps({"a": _entry(shape=[2**62, 2, 0], data_offsets=[0, 0])}), "2⁶³ entries"),
        (json.dumps({"a": _entry(shape="22")}), "a strange shape"),
        (json.dumps({"a": _entry(shape=[True])}), "a strange shape"),
        (json.dumps({"\ud800": _entry()}), "half a character"),
        ('{"a": ' + "[" * 100_000, "nested more than 64 levels deep"),
        ('{"a": ' + "9" * 5000 + "}", "a number has more than 300 digits"),
        (json.dumps({"x" * 1001: _entry()}), "longer than 1000 bytes"),
        (json.dumps({f"layers.{'9' * 23}.w": _entry()}), "a layer's number of 23 digits"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_headers(world: World, header: bytes | str, words: str) -> None:
    data = header if isinstance(header, bytes) else header.encode()
    write_safetensors(world.base / "model.safetensors", data, bytes(8))
    _refuses(world.merge, rf"(?s)model\.safetensors.*{words}")


def test_a_header_of_a_million_tensors_is_refused_before_it_takes_memory(world: World) -> None:
    entry = json.dumps(_entry(shape=[0], data_offsets=[0, 0]))
    header = "{" + ",".join(f'"{n}":{entry}' for n in range(10**6)) + "}"
    write_safetensors(world.base / "model.safetensors", header.encode(), b"")
    _refuses(world.merge, r"model\.safetensors.*more than 2,000,000 entries")


def test_the_bound_on_tensors_is_stated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starmerge_models.checkpoints.opening._MOST_TENSORS", 4)
    _refuses(world.merge, r"model\.safetensors .* has 5 tensors, and 4 are read at most")


# Indices.


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("..", "points out of its folder"),
        (".", "points out of its folder"),
        ("a\\b", "points out of its folder"),
        ("", "which is no file"),
        (None, "which is no file"),
        (3, "which is no file"),
        ("x" * 300, "cannot be opened: File name too long"),
        ("folder", "is a folder"),
        ("pipe", "is a pipe or a device"),
        ("loop", "symbolic links"),
    ],
)
def test_shards(world: World, shard: object, words: str) -> None:
    index = world.shard()
    (world.base / "folder").mkdir()
    os.mkfifo(world.base / "pipe")
    (world.base / "loop").symlink_to("loop")
    content = json.loads(index.read_text())
    content["weight_map"]["model.embed.weight"] = shard
    index.write_text(json.dumps(content))
    _refuses(world.merge, words)


def test_a_tensor_in_two_shards(world: World) -> None:
    world.shard()
    one, two = (load_file(world.base / f"part-{n}.safetensors") for n in range(2))
    save_file(one | two, world.base / "part-1.safetensors")
    _refuses(world.merge, r"is in part-0\.safetensors and in part-1\.safetensors")


# .bin files.


def test_bin_files_of_any_kind_are_read_to_the_same_tensors(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    model = torch.nn.Linear(3, 2)
    tensors = {
        "plain": base.view(4, 6),
        "part": base[3:9],
        "transposed": base.view(4, 6).T,
        "every other": base.view(4, 6)[::2, 1::3],
        "scalar": torch.tensor(3, dtype=torch.int16),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "quarter": torch.ones(5).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        **model.state_dict(),
        "parameter": torch.nn.Parameter(base.view(2, 12)),
    }
    file = tmp_path / "pytorch_model.bin"
    for write in (
        lambda: torch.save(tensors, file),
        lambda: torch.save(OrderedDict(tensors), file, pickle_protocol=4),
        lambda: rezip(file, compression=zipfile.ZIP_DEFLATED),
        # Torch cannot read what it wrote of float8 then.
        lambda: file.write_bytes(legacy_bytes({**tensors, "quarter": torch.ones(2)})),
    ):
        write()
        expected = torch.load(file, weights_only=False)
        checkpoint = open_checkpoint(tmp_path)
        assert list(checkpoint) == list(expected)
        for name, tensor in expected.items():
            read = checkpoint.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(read, tensor.detach()), name
            target = LocalFile(tmp_path / "copy", tensor.nbytes)
            checkpoint.copy(name, target, 0)
            target.close()
            raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            assert (tmp_path / "copy").read_bytes() == raw, name


def test_a_deflated_bin_file_merges_to_the_same_weights(world: World) -> None:
    file = world.to_bin()
    expected = load_file(world.merge() / "model.safetensors")
    rezip(file, compression=zipfile.ZIP_DEFLATED)
    found = load_file(world.merge(overwrite=True) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class _Call:
    """Pickles as a call of a function of torch or of Python."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.made_of = function, arguments

    def __reduce__(self) -> Any:
        return self.made_of


def _bin(content: object) -> Spoil:
    return lambda world: torch.save(content, world.to_bin())


def _records(change: Callable[[str, bytes], bytes]) -> Spoil:
    return lambda world: rezip(world.to_bin(), change)


def _bytes(change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(world: World) -> None:
        file = world.to_bin()
        file.write_bytes(change(file.read_bytes()))

    return spoil


def _pickled(content: bytes) -> Spoil:
    return _records(lambda name, old: content if name.endswith("data.pkl") else old)


_DEEP_KEY = b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"K\x01s."


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_bin({0: torch.ones(2)}), "calls a tensor 0, which is no text"),
        (_bin({"a\ud800": torch.ones(2)}), "half a character"),
        (_bin([torch.ones(2)]), "is not a dictionary of tensors"),
        (_bin({"a": {"b": torch.ones(2)}}), "is not a dictionary of tensors"),
        (_bin({"a": torch.ones(1).expand(10**12)}), "its storage of 4 bytes is too small"),
        (_bin({"a": torch.ones(2).to_sparse()}), "no plain tensor"),
        (_bin({"a": _Call(bytearray, 10**12)}), "would run code .*bytearray"),
        (_bin({"a": _Call(eval, "1")}), "would run code .*eval"),
        (_bytes(lambda old: old[: len(old) // 2]), "the archive is cut off"),
        (_bytes(lambda old: b"<html>"), "is no file of torch.save"),
        (_bytes(lambda old: b""), "is no file of torch.save"),
        (_bytes(lambda old: pickle.dumps({"a": 1}, 2) * 2), "none of torch.save"),
        (_bytes(lambda _: legacy_bytes({"a": torch.ones(99)})[:-9]), "is cut off"),
        (_records(lambda name, old: old[:-4] if "/data/" in name else old), "The file is damaged"),
        (_records(lambda name, old: b"big" if "order" in name else old), "big-endian"),
        (_pickled(b"\x80\x02X\xff\xff\xff\x7f."), "not a complete PyTorch file"),
        (_pickled(b"\x80\x02}r\xff\xff\xff\xff."), "the base .* has no tensor"),  # an empty one
        (_pickled(_DEEP_KEY), "a key is a tuple"),
        (_pickled(b"\x80\x02" + b")" * 2**23 + b"."), "are read at most"),
    ],
)
@pytest.mark.usefixtures("without_transformers")
def test_bin_files(world: World, spoil: Spoil, words: str) -> None:
    spoil(world)
    _refuses(world.merge, rf"(?s){words}")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(world: World) -> None:
    file = world.to_bin()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**26))
    _refuses(world.merge, "67,108,864 bytes, and 8,388,608 are read at most")


# Configs.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_rslora": "false"}, "use_rslora is 'false'. Write true or false"),
        ({"use_dora": 0}, "use_dora is 0. Write true or false"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out is 'no'. Write"),
        ({"inference_mode": []}, "inference_mode is .*Write"),
        ({"r": True}, "r is missing or is not a finite number"),
        ({"lora_alpha": "4"}, "lora_alpha is missing or is not"),
        ({"base_model_name_or_path": ["x/y"]}, "base_model_name_or_path is .* no text"),
        ({"rank_pattern": ["q"]}, "rank_pattern is no mapping"),
        ({"rank_pattern": {"q": "2"}}, "rank_pattern gives 'q' the value '2'"),
        ({"rank_pattern": {"(q": 2}}, "rank_pattern has '\\(q', which is no pattern"),
        ({"rank_pattern": {"q" * 1001: 2}}, "rank_pattern has a pattern of 1001 characters"),
        (
            {"alpha_pattern": {r"(a|aa|.)*s": 3}},
            r"alpha_pattern has patterns, such as .* names",
        ),
        ({"rank_pattern": {r"((.|..)*)*s": 3}}, "rank_pattern has patterns"),
        (
            {"target_modules": r"((.|..)*)*s", "target_parameters": ["q.weight"]},
            "target_modules has patterns",
        ),
    ],
    ids=str,
)
def test_adapter_configs(
    world: World, changes: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starmerge_models.checkpoints.lora.config._MATCHING", 0.2)
    # Long enough names that a pattern needs ages to see that it does not match.
    header, body = split_safetensors(world.adapter / "adapter_model.safetensors")
    longer = {
        name.replace("model.layers", f"{'a' * 40}.model.layers"): entry
        for name, entry in header.items()
    }
    write_safetensors(
        world.adapter / "adapter_model.safetensors", json.dumps(longer).encode(), body
    )
    edit_json(world.adapter / "adapter_config.json", **changes)
    _refuses(world.merge, rf"adapter_config\.json: {words}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": "x"}, "quantization_config is 'x', and must be an object"),
        ({"quantization_config": {"quant_method": "hqq"}}, "is quantised"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has no 'bits'"),
        ({"quantization_config": {"quant_method": ["gptq"]}}, "is quantised"),
        ({"text_config": {"quantization_config": 4}}, "quantization_config is 4"),
        ({"text_config": "x"}, "text_config is 'x'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', and must be true"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is .*must be a list"),
        ({"architectures": [3]}, "architectures has 3, which names no class"),
    ],
)
def test_configs_of_models(world: World, changes: dict[str, object], words: str) -> None:
    edit_json(world.base / "config.json", **changes)
    _refuses(world.merge, words)


_STRANGE_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda file: None, "is missing|does not exist|no config|neither"),
    ("folder", Path.mkdir, "is a folder|no config|neither"),
    ("pipe", os.mkfifo, "is a pipe or a device|neither"),
    ("device", lambda file: file.symlink_to("/dev/zero"), "is a pipe or a device|neither"),
    ("loop", lambda file: file.symlink_to(file.name), "symbolic links|no config|neither"),
    ("utf-16", lambda f: f.write_bytes('{"a": 1}'.encode("utf-16")), "utf-8|UTF-8"),
    ("deep", lambda file: file.write_text("[" * 100_000), "levels deep"),
    ("number", lambda f: f.write_text('{"a": ' + "9" * 5000 + "}"), "300 digits"),
    ("twice", lambda file: file.write_text('{"a": 1, "a": 2}'), "occurs twice"),
    ("half", lambda file: file.write_text('{"a": "\\ud800"}'), "half a character"),
    ("list", lambda file: file.write_text("[1]"), "not a JSON object|holds no recipe"),
    ("empty", lambda file: file.write_text(""), "is not JSON|holds no recipe"),
]


@pytest.mark.parametrize(
    ("make", "words"),
    [case[1:] for case in _STRANGE_FILES],
    ids=[case[0] for case in _STRANGE_FILES],
)
@pytest.mark.parametrize(
    "which", ["base/config.json", "adapter/adapter_config.json", "recipe.yaml"]
)
def test_files_that_are_strange(
    world: World, which: str, make: Callable[[Path], object], words: str
) -> None:
    file = world.folder / which
    file.unlink(missing_ok=True)
    make(file)
    act = (lambda: merge_recipe(world, file)) if file.suffix == ".yaml" else world.merge
    _refuses(act, words)


@pytest.mark.parametrize(
    "which",
    ["base/model.safetensors", "adapter/adapter_model.safetensors", "base/pytorch_model.bin"],
)
@pytest.mark.parametrize(("kind", "make", "words"), _STRANGE_FILES[1:5])
def test_weights_that_are_no_files(
    world: World, which: str, kind: str, make: Callable[[Path], object], words: str
) -> None:
    (world.base / "model.safetensors").rename(world.base / "moved")
    if not which.startswith("base"):
        (world.base / "moved").rename(world.base / "model.safetensors")
    file = world.folder / which
    file.unlink(missing_ok=True)
    make(file)
    _refuses(world.merge, f"{words}|holds no weights")


# YAML.

_LAUGHS = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
"""A list of lists of lists: a billion members, and more."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a\nbase: b", "the key 'base' occurs twice"),
        ("yes: 1", "the key True is no text: quote it"),
        ("1.5: 1", "the key 1.5 is no text"),
        ("[a]: 1", "the key list is no text"),
        ("3: 1", "the unknown key 3"),
        ("base: {x: !!binary aGk=}", "it holds a bytes"),
        ("base: !!timestamp 2024-01-01", "it holds a date"),
        ("base: !!bool maybe", "not a readable YAML file"),
        ("base: !!python/name:os.system", "could not determine a constructor"),
        ("a: &a {b: 1}\nbase: {<<: *a}", "the merge key << is not read"),
        (_LAUGHS, "more than 4,000,000 values"),
        ("a: &a [*a]", "levels deep"),
        ("a: " + ":".join(["1"] * 10**5), "more than 300 digits"),
        ("a: 0x" + "f" * 5000, "more than 300 digits"),
        ("a" * 2**21, "longer than 1,048,576 bytes"),
        ('base: "\\ud800"', "half a character"),
        ("base: base\nmodels: [~nosuchuser/x]", "no user of this machine"),
        ("base: base\nmodels: [2024-01-01]", "2024-01-01 does not exist"),
        (f"base: base\nmodels: [{'x' * 5000}]", "does not exist"),
        ("base: base\nmodels: [no--such/name]", "is no Hub id"),
        ("base: base\nmodels: [\"a\\0b\"]", "does not exist"),
        ("base: base\nmodels: [" + "a, " * 3000 + "]", "two models are called 'a'"),
        ("base: base\nmodels: [adapter]\nmetric: adapter", "is no file"),
        (f"base: base\nmodels: [adapter]\nmetric: {'x' * 300}", "is no file"),
        ("base: base\nmodels: [adapter]\nparameters: {3: 4}", "parameters"),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_recipes(world: World, text: str, words: str) -> None:
    _refuses(lambda: merge_recipe(world, world.recipe(text)), words, UsageError)


def test_task_and_suite_files_are_read_as_strictly(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("prompt: a\nprompt: b")
    for load in (load_task, load_suite):
        _refuses(lambda load=load: load(file), "occurs twice", UsageError)  # type: ignore[misc]
    file.write_text("prompt: a\n---\nprompt: b")
    _refuses(lambda: load_task(file), "holds 2 documents", UsageError)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": 1, "a": 2}', "occurs twice"),
        ("[" * 10**5, "levels deep"),
        ("9" * 5000, "300 digits"),
    ],
)
def test_rows(tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{{}}\n{line}\n")
    _refuses(lambda: read_file(file), f"line 2: .*{words}", UsageError)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    _refuses(lambda: read_file(pipe), "a pipe or a device", UsageError)
    _refuses(lambda: open_metric(pipe), "a pipe or a device")


def test_a_parameter_of_the_command_line() -> None:
    _refuses(
        lambda: read_parameters(["a=" + "[" * 10**5], where="-p "),
        "-p a: .*levels deep",
        UsageError,
    )
    _refuses(
        lambda: read_parameters(['a={"b": 1, "b": 2}'], where="-p "), "occurs twice", UsageError
    )
    assert read_parameters(["a=Infinity", "b=x", "c=[1, 2]"], where="-p ")["b"] == "x"


def test_numbers_that_configs_really_have_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(f'{{"time_step_limit": [0.0, Infinity], "model_max_length": {10**30}}}')
    assert read_json(file)["time_step_limit"][1] == float("inf")
    (tmp_path / "a.yaml").write_text("labels: {0: a, 1: b}\nwhen: 2024-01-01")
    assert read_yaml(tmp_path / "a.yaml") == [{"labels": {0: "a", 1: "b"}, "when": "2024-01-01"}]


# Asking transformers.


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 2_000_000},
        {"architectures": ["pipeline"]},
        {"architectures": ["LlamaConfig"]},
        {"architectures": []},
        {"model_type": "no such model"},
        {"num_hidden_layers": "many"},
        {"hidden_size": -1},
    ],
    ids=str,
)
def test_a_config_that_transformers_cannot_use_ends_soon(
    tiny_base: Path, tmp_path: Path, config: dict[str, object]
) -> None:
    settings = json.loads((tiny_base / "config.json").read_text()) | config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with time_limit(60), pytest.raises(Exception):  # noqa: B017
        naming(str(tmp_path), ["model.embed_tokens.weight"])


def test_a_process_of_its_own_answers_what_the_function_does(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "call_isolated", isolated.call_isolated)  # as it is for users
    folder = shutil.copytree(tiny_base, tmp_path / "base")  # of which nobody has asked before
    found = naming_of(open_base(resolve(folder)))
    expected = naming(str(folder), list(load_file(folder / "model.safetensors")))
    assert found.sources == {name: tuple(stored) for name, stored in expected["sources"].items()}
    assert found.ties == expected["ties"]
    assert found.idle == frozenset(expected["idle"])
    config = json.loads((folder / "config.json").read_text())
    configs = [[config, {"model_type": "no such model"}]]
    assert isolated.call_isolated(filling, configs) == filling.filled(*configs)
    assert isolated.call_isolated(filling, []) is None


def test_a_config_without_an_architecture_starts_no_process(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(names, "call_isolated", lambda *asked: started.append(asked))
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    for architectures, number in ((None, 0), ([], 0), (["LlamaForCausalLM"], 1)):
        edit_json(folder / "config.json", architectures=architectures)
        found = naming_of(open_base(resolve(folder)))
        assert (found.sources, found.ties, len(started)) == ({}, {}, number)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert naming_of(open_base(resolve(folder))).sources == {}
    assert len(started) == 1


def test_a_config_that_transformers_refuses_does_not_hide_the_message(world: World) -> None:
    edit_json(world.base / "config.json", architectures=["NoSuchModel"], num_hidden_layers="x")
    header, body = split_safetensors(world.adapter / "adapter_model.safetensors")
    renamed = {name.replace(".q.", ".z."): entry for name, entry in header.items()}
    write_safetensors(
        world.adapter / "adapter_model.safetensors", json.dumps(renamed).encode(), body
    )
    with time_limit(120), pytest.raises(StarmergeError, match=r"adapts model\.layers\.0\.z, but"):
        world.merge()


# Files beside the weights, and the card.


def test_a_side_file_that_points_out_of_the_base_is_refused(world: World) -> None:
    secret = world.folder / "secret"
    secret.write_text("mine")
    (world.base / "notes.txt").symlink_to(secret)
    _refuses(world.merge, r"notes\.txt is a link to .*secret, outside of the model's folder")
    # As in the Hub's cache, and within the folder itself.
    blob = world.folder / "models--org--name" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    secret.rename(blob)
    (world.base / "notes.txt").unlink()
    (world.base / "notes.txt").symlink_to(blob)
    (world.base / "more.txt").symlink_to("generation_config.json")
    merged = world.merge()
    assert (merged / "notes.txt").read_text() == "mine"
    assert (merged / "more.txt").read_text() == "{}"


def test_a_side_file_whose_name_is_not_utf8_is_refused(world: World) -> None:
    (world.base / os.fsdecode(b"tokenizer\xfa.json")).write_text("{}")
    _refuses(world.merge, r"tokenizer\\udcfa\.json' has a name that is not UTF-8")


def test_names_reach_the_card_as_text(world: World) -> None:
    bad = "x\n\n# Free | <b onclick=1> [go](http://evil.example) ` ``` www.evil.example"
    merged = world.folder / "merged"
    models = {bad: world.adapter, "other": world.other}
    starmerge_models.merge(world.base, models, "average", output=merged, threads=1)
    card = (merged / "README.md").read_text()
    before, _, after = card.partition("Recipe (")
    assert "\n# Free" not in before
    row = next(line for line in before.splitlines() if "LoRA" in line and "Free" in line)
    assert re.fullmatch(r"\| (`+)x\\n\\n# Free \\\| <b.*\1 \| LoRA adapter \| `[^`]*` \|", row)
    fence = re.search(r"\n(`{4,})yaml\n", after)
    assert fence is not None
    assert after.count(f"\n{fence[1]}") == 2


def test_a_folder_whose_name_is_not_utf_8_is_refused(world: World) -> None:
    strange = world.folder / os.fsdecode(b"adapter\xff")
    world.adapter.rename(strange)
    _refuses(lambda: world.merge(strange, world.other), "UTF-8|unicode", UsageError)


def test_an_untouched_nan_is_copied(world: World) -> None:
    """Bytes that no model changes are not looked at, as the manual says."""
    file = world.base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    merged = load_file(world.merge() / "model.safetensors")
    assert torch.isnan(merged["model.embed.weight"][0, 0])


def test_the_command_line_says_it_in_a_line(
    world: World, starmerge: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    os.mkfifo(world.folder / "recipe.yaml")
    finished = starmerge("merge", world.folder / "recipe.yaml", "-o", "x")
    assert finished.returncode == 2
    assert finished.stderr.startswith("Error: ")
    assert "is a pipe or a device, which may never end. Save its content" in finished.stderr


def test_experts_beyond_what_can_be_handled_are_refused(tmp_path: Path) -> None:
    shape = [4096, 1, 1]
    header = {
        f"model.layers.{layer}.mlp.experts.w": {
            "dtype": "U8",
            "shape": shape,
            "data_offsets": [4096 * layer, 4096 * (layer + 1)],
        }
        for layer in range(62)
    }
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4096 * len(header)))
    with pytest.raises(StarmergeError, match="more than 250,000 experts"):
        open_safetensors(file)
