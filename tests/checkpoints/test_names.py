"""Names of adapters and of bases: one prefix may lie between them, and nothing is guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.base import Base, open_base
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.names import match_names
from starmerge_models.checkpoints.opening import open_safetensors
from starmerge_models.checkpoints.source import Source, resolve
from starmerge_models.errors import StarmergeError
from tests.conftest import MakeAdapter

_SOURCE = Source("adapter", Path("adapter"), None, None)


def _base(folder: Path, names: list[str]) -> Base:
    file = folder / "model.safetensors"
    save_file({name: torch.zeros(1) for name in names}, file)
    return Base(Source("base", folder, None, None), open_safetensors(file), {})


def _renamed(path: Path, old: str, new: str) -> None:
    tensors = load_file(path)
    save_file({key.replace(old, new, 1): tensor for key, tensor in tensors.items()}, path)


def _deltas(path: Path, base: Base) -> dict[str, torch.Tensor]:
    adapter = open_adapter("a", resolve(path), base)
    read = base.checkpoint.read
    return {name: adapter.delta(name, read(name)).to_dense() for name in adapter.tensors}


@pytest.mark.parametrize(
    "prefix",
    ["base_model.model.model.", "model.", "", "transformer.model.", "base_model.model.unet.model."],
)
def test_finds_the_same_tensors_under_any_prefix_of_the_adapter(
    make_adapter: MakeAdapter, tiny_base: Path, prefix: str
) -> None:
    path = make_adapter("adapter")
    base = open_base(resolve(tiny_base))
    expected = _deltas(path, base)
    assert len(expected) == 4
    _renamed(path / "adapter_model.safetensors", "base_model.model.model.", prefix)
    found = _deltas(path, base)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("prefix", ["", "language_model.model."])
def test_finds_the_tensors_of_a_base_that_is_a_part_or_has_parts(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path, prefix: str
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((tiny_base / "config.json").read_text())
    tensors = load_file(tiny_base / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, base / "model.safetensors")
    _renamed(base / "model.safetensors", "model.", prefix)
    adapter = open_adapter("a", resolve(make_adapter("a")), open_base(resolve(base)))
    assert f"{prefix}layers.1.self_attn.q_proj.weight" in adapter.tensors
    assert len(adapter.tensors) == 4
    head = make_adapter("head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(StarmergeError, match="adapts lm_head, but the base .* has no tensor"):
        open_adapter("a", resolve(head), open_base(resolve(base)))


@pytest.mark.parametrize(
    ("stored", "names", "found"),
    [
        (["a.x", "x"], ["x"], ["x"]),
        (["a.x", "x"], ["a.x"], ["a.x"]),
        (["a.x", "b.y"], ["p.a.x", "p.b.y"], ["a.x", "b.y"]),
        (["p.q.a.x", "p.q.b.y"], ["a.x", "b.y"], ["p.q.a.x", "p.q.b.y"]),
        (["a.0.x", "b.0.x", "b.0.y"], ["0.x", "0.y"], ["b.0.x", "b.0.y"]),
        (["a.x"], ["b.y"], [None]),
        (["a.x", "b.y"], ["a.x", "p.b.y"], ["a.x", None]),
        (["a.x", "b.y", "c.z"], ["p.a.x", "p.b.y", "c.z"], ["a.x", "b.y", "c.z"]),
        (
            ["m.t.l.0.x", "m.t.l.1.x", "h.w"],
            ["m.l.0.x", "m.l.1.x", "h.w"],
            ["m.t.l.0.x", "m.t.l.1.x", "h.w"],
        ),
        (
            ["m.t.l.0.x", "m.v.l.0.x", "m.t.l.1.x"],
            ["m.l.0.x", "m.l.1.x"],
            ["m.t.l.0.x", "m.t.l.1.x"],
        ),
        (["t.m.l.0.x"], ["m.t.l.0.x"], ["t.m.l.0.x"]),
        (["e.l.0.x"], ["d.l.0.x"], [None]),
        (["e.s.l.0.x"], ["d.s.l.0.x"], [None]),
        (["a.x", "b.x"], ["x", "y"], ["a.x", None]),
        (["x"], ["layers.0.x"], [None]),
        (["layers.0.x"], ["x"], [None]),
        (["ax"], ["x"], [None]),
        (["x"], ["ax"], [None]),
    ],
)
def test_one_prefix_explains_all_names_or_some_are_missing(
    tmp_path: Path, stored: list[str], names: list[str], found: list[Any]
) -> None:
    matched = match_names(_SOURCE, _base(tmp_path, stored), names)
    assert [matched.get(name) for name in names] == found


def test_names_that_may_mean_two_tensors_are_an_error(tmp_path: Path) -> None:
    base = _base(tmp_path, ["encoder.layers.0.x", "decoder.layers.0.x", "encoder.layers.1.x"])
    with pytest.raises(StarmergeError, match=r"layers\.0\.x may mean (en|de)coder.*Rename"):
        match_names(_SOURCE, base, ["layers.0.x"])
    both = ["layers.0.x", "layers.1.x"]
    assert set(match_names(_SOURCE, base, both).values()) == {f"encoder.{name}" for name in both}


_PARTS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3)
_NAMES = st.lists(
    st.tuples(_PARTS, st.integers(0, 3), _PARTS).map(
        lambda t: ".".join([*t[0], str(t[1]), *t[2], "weight"])
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(_NAMES, st.data())
def test_a_foreign_prefix_on_either_side_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    # A name that ends with another is that name behind a prefix.
    assume(not any(a != b and a.endswith(f".{b}") for a in names for b in names))
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    folder = tmp_path_factory.getbasetemp()
    base = _base(folder, names)
    assert match_names(_SOURCE, base, chosen) == {name: name for name in chosen}
    longer = [f"outer.model.{name}" for name in chosen]
    assert [match_names(_SOURCE, base, longer)[name] for name in longer] == chosen
    inner = _base(folder, [f"outer.{name}" for name in names])
    assert match_names(_SOURCE, inner, chosen) == {name: f"outer.{name}" for name in chosen}
