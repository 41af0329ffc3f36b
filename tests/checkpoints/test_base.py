"""Bases and full fine-tunes: what is taken for which, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.models import open_model
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import StarmergeError, UsageError
from tests.conftest import MakeAdapter, MakeFinetune, edit_json


def test_refuses_an_adapter_and_a_model_quantised_in_an_unknown_way_as_base(
    make_adapter: MakeAdapter, make_finetune: MakeFinetune
) -> None:
    with pytest.raises(UsageError, match="is an adapter"):
        open_base(resolve(make_adapter("adapter")))
    quantised = make_finetune("quantised")
    settings = {"quant_method": "hqq"}
    edit_json(quantised / "config.json", quantization_config=settings, _name_or_path="org/plain")
    with pytest.raises(UsageError, match=r"quantised \(hqq.*unquantised model; .* org/plain"):
        open_base(resolve(quantised))


def test_tells_embeddings_by_vocabulary_and_by_name(tiny_base: Path) -> None:
    base = open_base(resolve(tiny_base))
    assert {name for name in base.checkpoint if base.is_embedding(name)} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.norm.weight", None, r"lacks model\.norm\.weight of the base .*--common"),
        ("model.norm.weight", torch.ones(33), r"norm\.weight has the shape \[33\], .* \[32\]"),
        ("model.extra", torch.ones(1), r"has model\.extra, which the base .*--common"),
    ],
)
def test_refuses_a_fine_tune_of_another_model(
    tiny_base: Path,
    make_finetune: MakeFinetune,
    name: str,
    tensor: torch.Tensor | None,
    message: str,
) -> None:
    path = make_finetune("tuned")
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(StarmergeError, match=message):
        open_model("tuned", resolve(path), open_base(resolve(tiny_base)))


def test_finds_out_what_a_model_is(
    tiny_base: Path, make_adapter: MakeAdapter, make_finetune: MakeFinetune, tmp_path: Path
) -> None:
    base = open_base(resolve(tiny_base))
    assert open_model("a", resolve(make_adapter("a")), base).kind == "LoRA adapter"
    assert open_model("b", resolve(make_finetune("b")), base).kind == "full fine-tune"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="neither an adapter"):
        open_model("c", resolve(tmp_path / "nothing"), base)


@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, True),
        ({"text_config": {"vocab_size": 96}}, True),
        ({"text_config": {"vocab_size": 96, "tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": False, "text_config": {"vocab_size": 96}}, False),
        (
            {
                "tie_word_embeddings": False,
                "text_config": {"vocab_size": 96, "tie_word_embeddings": True},
            },
            True,
        ),
    ],
    ids=str,
)
def test_weights_are_tied_unless_the_config_says_no(
    make_finetune: MakeFinetune, changes: dict[str, Any], tied: bool
) -> None:
    path = make_finetune("base", scale=0.0)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config | changes))
    ends = ["lm_head.weight", "model.embed_tokens.weight"]
    assert sorted(open_base(resolve(path)).tied) == (ends if tied else [])
