"""Hashes of updates in memory and of tensors in files: of their content, and of nothing else."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from starmerge_models.checkpoints.hashing import (
    blake3_of_update,
    cached_blake3_of_tensor,
    read_and_hash,
)
from starmerge_models.checkpoints.opening import open_safetensors
from starmerge_models.deltas import Delta, Dense, LowRank, Stored
from starmerge_models.storage import local

B, A = torch.randn(6, 2), torch.randn(2, 5)
W, BASE = torch.randn(6, 5), torch.randn(6, 5)
MATRIX = torch.arange(30.0).reshape(6, 5)

MAKE: dict[str, Callable[[], dict[str, Delta]]] = {
    "factors": lambda: {"w": LowRank(B, A)},
    "scaled": lambda: {"w": LowRank(B, A, 0.5)},
    "another name": lambda: {"v": LowRank(B, A)},
    "other factors": lambda: {"w": LowRank(B, -A)},
    "dense": lambda: {"w": Dense(MATRIX)},
    "another shape": lambda: {"w": Dense(MATRIX.reshape(5, 6))},
    "more dimensions": lambda: {"w": Dense(MATRIX.reshape(6, 5, 1))},
    "transposed": lambda: {"w": Dense(MATRIX.T)},
    "narrower": lambda: {"w": Dense(MATRIX.bfloat16())},
    "half": lambda: {"w": Dense(MATRIX.half())},
    "a difference": lambda: {"w": Stored([(1.0, W)], BASE)},
    "a part of it": lambda: {"w": Stored([(1.0, W)], BASE, 0.5)},
    "other weights": lambda: {"w": Stored([(0.5, W)], BASE)},
    "another base": lambda: {"w": Stored([(1.0, W)], W)},
    "two models": lambda: {"w": Stored([(1.0, W), (1.0, BASE)], BASE)},
    "two tensors": lambda: {"v": Dense(MATRIX[:3]), "w": Dense(MATRIX[3:])},
    "cut elsewhere": lambda: {"v": Dense(MATRIX[:2]), "w": Dense(MATRIX[2:])},
    "a number": lambda: {"w": Dense(torch.tensor(1.0))},
    "no entries": lambda: {"w": Dense(torch.empty(0, 5))},
    "nothing": lambda: {},
}


def test_equal_content_has_one_hash_and_other_content_another() -> None:
    hashes = {name: blake3_of_update(make()) for name, make in MAKE.items()}
    assert {name: blake3_of_update(make()) for name, make in MAKE.items()} == hashes
    for first, second in combinations(hashes, 2):
        assert hashes[first] != hashes[second], (first, second)


def test_strides_and_the_order_of_tensors_do_not_count() -> None:
    spread = torch.empty(6, 10)[:, ::2].copy_(MATRIX)
    assert not spread.is_contiguous()
    assert blake3_of_update({"w": Dense(spread)}) == blake3_of_update({"w": Dense(MATRIX)})
    both = {"v": Dense(MATRIX), "w": Dense(W)}
    assert blake3_of_update(dict(reversed(both.items()))) == blake3_of_update(both)


def test_long_rows_that_must_be_copied_are_hashed_whole() -> None:
    wide = torch.randn(600_000, 3).T  # 2.4 MB a row, none of them contiguous
    assert blake3_of_update({"w": Dense(wide)}) == blake3_of_update({"w": Dense(wide.contiguous())})


@given(
    place=st.integers(0, 29),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_last_bit_of_every_entry_counts(place: int, dtype: torch.dtype) -> None:
    matrix = MATRIX.to(dtype)
    changed = matrix.clone()
    changed.view(-1).view(torch.uint8)[place * dtype.itemsize] ^= 1
    assert blake3_of_update({"w": Dense(changed)}) != blake3_of_update({"w": Dense(matrix)})


@pytest.mark.parametrize("kind", ["B", "A"])
def test_each_factor_counts(kind: str) -> None:
    factors = {"B": B, "A": A}
    before = blake3_of_update({"w": LowRank(**factors)})
    factors[kind] = factors[kind].clone()
    factors[kind][-1, -1] += 1
    assert blake3_of_update({"w": LowRank(**factors)}) != before


def test_a_single_column_with_an_odd_stride_is_hashed_as_its_copy() -> None:
    odd = torch.empty_strided((4, 1), (1, 576), dtype=torch.float64).copy_(torch.ones(4, 1))
    plain = torch.ones(4, 1, dtype=torch.float64)
    assert odd.is_contiguous()
    row = torch.ones(1, 3)
    assert blake3_of_update({"w": LowRank(odd, row)}) == blake3_of_update(
        {"w": LowRank(plain, row)}
    )


def test_the_hash_of_a_file_that_takes_the_name_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_SETTLED", -(10**12))  # what was just written counts as settled
    file = tmp_path / "model.safetensors"
    old, new = torch.zeros(50_000), torch.ones(50_000)
    save_file({"x": old}, file)
    info = open_safetensors(file)["x"]
    tensor, digest = read_and_hash(info)
    assert digest == blake3(old.numpy().tobytes()).hexdigest()
    with monkeypatch.context() as patched:
        patched.setattr("starmerge_models.checkpoints.hashing.read_tensor", lambda info: None)
        assert cached_blake3_of_tensor(info) == digest, "it is not read again"
    save_file({"x": new}, tmp_path / "other")
    (tmp_path / "other").replace(file)
    assert torch.equal(tensor, old), "it is a window of the file that was opened"
    assert cached_blake3_of_tensor(info) == blake3(new.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("first", ["renamed", "part", "stored"])
def test_a_tensor_under_the_name_of_another_of_its_file_has_its_own_hash(
    tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_SETTLED", -(10**12))  # what was just written counts as settled
    file = tmp_path / "model.safetensors"
    tensors = {"a": torch.arange(6.0).reshape(3, 2), "b": torch.ones(3, 2)}
    save_file(tensors, file)
    stored = open_safetensors(file)
    infos = {
        "renamed": (stored["a"].renamed("b"), tensors["a"]),
        "part": (stored["a"].rows("b", 1, 3), tensors["a"][1:]),
        "stored": (stored["b"], tensors["b"]),
    }
    for name in (first, *infos):
        info, tensor = infos[name]
        expected = blake3(tensor.numpy().tobytes()).hexdigest()
        assert cached_blake3_of_tensor(info) == expected, name
        assert read_and_hash(info)[1] == expected, name
