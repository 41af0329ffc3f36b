"""Writing models: what safetensors reads back, and folders that appear whole or not at all."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starmerge.checkpoints.tensors import open_checkpoint, open_safetensors
from starmerge.checkpoints.writer import (
    OutputTensor,
    ShardWriter,
    check_output,
    check_space,
    output_folder,
)
from starmerge.errors import StarmergeError, UsageError


def _planned(name: str, tensor: torch.Tensor) -> OutputTensor:
    return OutputTensor(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes)


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    limit=st.integers(1, 200),
)
def test_shards_read_back_the_same_whatever_their_size(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate(sizes)}
    plan = [_planned(name, tensor) for name, tensor in tensors.items()]
    with ShardWriter(folder, plan, shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint) == set(tensors)
    for file in checkpoint.files:
        members = load_file(file)
        total = sum(tensor.nbytes for tensor in members.values())
        assert total <= limit or sum(tensor.nbytes > 0 for tensor in members.values()) == 1
        for name, tensor in members.items():
            assert torch.equal(tensor, tensors[name])


def test_copied_tensors_have_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 7).bfloat16(), "b": torch.tensor([float("nan"), 1.0])}
    save_file(tensors, tmp_path / "source.safetensors")
    source = open_safetensors(tmp_path / "source.safetensors")
    with ShardWriter(tmp_path, [_planned(name, tensors[name]) for name in source]) as writer:
        for name in source:
            writer.copy(name, source)
    copied = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(copied[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(data=st.data(), sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_pieces_may_be_written_in_any_order_by_several_threads(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{number}": torch.randn(size).half() for number, size in enumerate(sizes)}
    pieces = []
    for name, tensor in tensors.items():
        cuts = sorted({0, len(tensor), *data.draw(st.sets(st.integers(0, len(tensor))))})
        pieces += [(name, tensor[a:b], a) for a, b in itertools.pairwise(cuts)]
    order = data.draw(st.permutations(pieces))
    plan = [_planned(name, tensor) for name, tensor in tensors.items()]
    with ShardWriter(folder, plan, shard_bytes=64) as writer, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda piece: writer.write(*piece), order))
    checkpoint = open_checkpoint(folder)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_refuses_what_was_not_planned(tmp_path: Path) -> None:
    plan = [_planned("a", torch.ones(2)), _planned("b", torch.ones(2))]
    with pytest.raises(KeyError), ShardWriter(tmp_path, plan) as writer:
        writer.write("c", torch.ones(2))
    for wrong, start in ((torch.ones(3), 0), (torch.ones(2), 1), (torch.ones(2).double(), 0)):
        with pytest.raises(RuntimeError, match="fit"), ShardWriter(tmp_path, plan) as writer:
            writer.write("a", wrong, start)
    with pytest.raises(RuntimeError, match="b is missing"), ShardWriter(tmp_path, plan) as writer:
        writer.write("a", torch.ones(2))


def test_a_disk_that_takes_no_header_leaves_no_file_open(tmp_path: Path) -> None:
    plan = [_planned(f"t{number}", torch.ones(8)) for number in range(3)]
    (tmp_path / "model-00002-of-00003.safetensors").mkdir()
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError), ShardWriter(tmp_path, plan, shard_bytes=32):
        pass
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with output_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "merge_report.json").write_text("kept")
    with pytest.raises(ZeroDivisionError), output_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "merge_report.json").read_text() == "kept"


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "merge_report.json").write_text("gone")
    with output_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_appears_during_a_merge_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(UsageError, match="not empty"), output_folder(target) as folder:
        (folder / "new").write_text("x")
        target.mkdir()
        (target / "other").write_text("kept")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (target / "other").read_text() == "kept"


def test_an_output_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="--overwrite"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(UsageError, match="no merged model and is not overwritten"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="symbolic link"):
        check_output(tmp_path / "link", overwrite=True)
    (tmp_path / "merge_report.json").write_text("{}")
    check_output(tmp_path, overwrite=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", overwrite=False)


def test_a_disk_that_is_too_small_is_refused_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(
        StarmergeError, match=r"needs 1000000000\.00 GB, and its disk has [\d.]+ GB"
    ):
        check_space(tmp_path / "not" / "there", 10**18)
    check_space(tmp_path, 1)
