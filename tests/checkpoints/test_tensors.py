"""Reading checkpoints: real files, and files broken in the ways files break."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.opening import open_checkpoint, open_safetensors
from starmerge_models.checkpoints.tensors import DTYPES, raw_bytes
from starmerge_models.errors import StarmergeError
from starmerge_models.storage.local_folder import LocalFile


def test_reads_every_dtype_and_shape_as_safetensors_does(tmp_path: Path) -> None:
    tensors = {
        f"{code}.{number}": (torch.arange(8).reshape(shape) % 2).to(dtype)
        for code, dtype in DTYPES.items()
        for number, shape in enumerate([(8,), (2, 4), (2, 2, 2)])
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape == torch.Size(checkpoint[name].shape)
        assert bytes(raw_bytes(read)) == bytes(raw_bytes(tensor)), name


def test_reads_shards_and_finds_each_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.full((2,), 2.0)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 1, 1]
    assert checkpoint.read("b").tolist() == [2, 2]
    assert [file.name for file in checkpoint.files] == ["one.safetensors", "two.safetensors"]


def test_names_the_shard_that_an_index_wrongly_points_to(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StarmergeError, match="tensor b into one.safetensors, which lacks it"):
        open_checkpoint(tmp_path)


def test_an_index_lists_all_tensors_and_stays_in_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(StarmergeError, match="lacks tensor b"):
        open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(StarmergeError, match="points out of its folder"):
        open_checkpoint(tmp_path)


def test_reads_bin_files_of_old_and_refuses_what_safetensors_cannot_hold(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert open_checkpoint(tmp_path).read("a").tolist() == [1, 1]
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, file)
    with pytest.raises(StarmergeError, match=r"tensor a \(torch\.complex64"):
        open_checkpoint(tmp_path)


def test_names_a_missing_shard(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "gone.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(StarmergeError, match="gone.safetensors is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, 200])
def test_refuses_a_truncated_file_when_it_is_opened(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"layer.weight": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StarmergeError, match=r"model\.safetensors is not a complete"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b"not json", "Expecting"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "tensor a has the wrong size"),
        (b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,8]}}', "tensor a has the dtype F4"),
        (b'{"a":{"shape":[2]}}', "data_offsets"),
        (b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "tensor a has a strange"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}', "tensor a has a strange"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', "a hole or an overlap"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "8 bytes follow"),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            "a hole or an overlap at tensor b",
        ),
        (
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
            b'"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            "the name 'a' occurs twice",
        ),
        (b"[]", "not a complete"),
    ],
)
def test_says_what_is_wrong_with_a_header(tmp_path: Path, header: bytes, what: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(StarmergeError, match=what):
        open_safetensors(file)


def test_reads_bin_files_and_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 2)}, tmp_path / "one.bin")
    torch.save({"b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "two.bin")
    index = {"weight_map": {"a": "one.bin", "b": "two.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), torch.ones(2, 2))
    target = LocalFile(tmp_path / "copy")
    checkpoint.copy("b", target, 2)
    target.close()
    assert (tmp_path / "copy").read_bytes() == b"\0\0" + b"\x80\x3f" * 3


class _Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def test_runs_no_code_from_a_bin_file(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"a": _Exploit(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(StarmergeError, match=r"pytorch_model\.bin would run code"):
        open_checkpoint(tmp_path)
    assert not marker.exists()


def test_says_that_a_folder_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(StarmergeError, match="holds no weights"):
        open_checkpoint(tmp_path)


def test_a_file_that_was_cut_off_since_it_was_opened_is_told(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(50_000), "b": torch.ones(50_000)}, file)
    model, adapter = open_checkpoint(tmp_path), open_safetensors(file)
    os.truncate(file, 300_000)
    for checkpoint in (model, adapter):
        with pytest.raises(StarmergeError, match="ends within tensor b"):
            checkpoint.read("b")
        target = LocalFile(tmp_path / "copy")
        with pytest.raises(StarmergeError, match="ends within tensor b"):
            checkpoint.copy("b", target, 0)
        target.close()


def test_tensors_that_begin_at_an_odd_byte_are_read(tmp_path: Path) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    ).encode()
    content = bytes([1, 2, 3]) + struct.pack("<2f", 1.5, -2.0)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 2, 3]
    assert checkpoint.read("b").tolist() == [1.5, -2.0]
    assert checkpoint.read("b").data_ptr() % 4 == 0


def test_a_bin_file_of_parameters_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2, 2))}, tmp_path / "pytorch_model.bin")
    read = open_checkpoint(tmp_path).read("a")
    assert not read.requires_grad
    assert torch.equal(read, torch.ones(2, 2))
