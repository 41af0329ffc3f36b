"""Writing models: what safetensors reads back."""

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.opening import open_checkpoint, open_safetensors
from starmerge_models.checkpoints.tensors import Derived
from starmerge_models.checkpoints.writer import OutputTensor, ShardWriter
from starmerge_models.storage.local_folder import LocalFolder


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
    with ShardWriter(LocalFolder(folder), plan, shard_bytes=limit) as writer:
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
    with ShardWriter(
        LocalFolder(tmp_path), [_planned(name, tensors[name]) for name in source]
    ) as writer:
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
    with (
        ShardWriter(LocalFolder(folder), plan, shard_bytes=64) as writer,
        ThreadPoolExecutor(3) as pool,
    ):
        list(pool.map(lambda piece: writer.write(*piece), order))
        digests = {name: writer.digest(name) for name in tensors}
    checkpoint = open_checkpoint(folder)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert digests[name] == blake3(tensor.numpy().tobytes()).hexdigest()


def test_refuses_what_was_not_planned(tmp_path: Path) -> None:
    plan = [_planned("a", torch.ones(2)), _planned("b", torch.ones(2))]
    with pytest.raises(KeyError), ShardWriter(LocalFolder(tmp_path), plan) as writer:
        writer.write("c", torch.ones(2))
    for wrong, start in ((torch.ones(3), 0), (torch.ones(2), 1), (torch.ones(2).double(), 0)):
        with (
            pytest.raises(RuntimeError, match="fit"),
            ShardWriter(LocalFolder(tmp_path), plan) as writer,
        ):
            writer.write("a", wrong, start)
    with ShardWriter(LocalFolder(tmp_path), plan) as writer:
        writer.write("a", torch.ones(2))
        writer.write("b", torch.ones(1))
        assert writer.digest("a") == blake3(torch.ones(2).numpy().tobytes()).hexdigest()
        with pytest.raises(RuntimeError, match="b was not written whole: 4 bytes are missing"):
            writer.digest("b")


def test_several_writers_fill_one_file(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.randn(9) for number in range(6)}
    plan = [_planned(name, tensor) for name, tensor in tensors.items()]
    first = ShardWriter(LocalFolder(tmp_path), plan, shard_bytes=80)
    first.lay_out()
    second = pickle.loads(pickle.dumps(first))
    for number, (name, tensor) in enumerate(tensors.items()):
        (first, second)[number % 2].write(name, tensor)
    for writer in (first, second):
        writer.close()
    checkpoint = open_checkpoint(tmp_path)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in tensors)


def test_a_disk_that_takes_no_header_leaves_no_file_open(tmp_path: Path) -> None:
    plan = [_planned(f"t{number}", torch.ones(8)) for number in range(3)]
    (tmp_path / "model-00002-of-00003.safetensors").mkdir()
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError), ShardWriter(LocalFolder(tmp_path), plan, shard_bytes=32):
        pass
    assert sorted(Path("/proc/self/fd").iterdir()) == before


@pytest.mark.parametrize("kept", [0, 100])
def test_a_file_that_cannot_have_its_size_is_closed(tmp_path: Path, kept: int) -> None:
    (tmp_path / "f").write_bytes(bytes(kept))
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError):
        LocalFolder(tmp_path).open("f", 2**63 - 1)
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert (tmp_path / "f").stat().st_size == kept


def test_a_tensor_that_is_computed_is_computed_once_to_be_copied(tmp_path: Path) -> None:
    parts = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.ones(2, 2)}
    save_file(parts, tmp_path / "parts.safetensors")
    stored = open_safetensors(tmp_path / "parts.safetensors")
    times = []

    def below(*tensors: torch.Tensor) -> torch.Tensor:
        times.append(len(tensors))
        return torch.cat(tensors)

    file, both = stored["a"].file, (stored["a"], stored["b"])
    info = Derived("c", torch.float32, (5, 2), file, both, below)
    layout = [OutputTensor("c", torch.float32, (5, 2), info.nbytes)]
    with ShardWriter(LocalFolder(tmp_path), layout) as writer:
        digest = writer.copy("c", stored.viewed([info]))
    written = load_file(tmp_path / "model.safetensors")["c"]
    assert torch.equal(written, torch.cat([parts["a"], parts["b"]]))
    assert digest == blake3(written.numpy().tobytes()).hexdigest()
    assert times == [2]
