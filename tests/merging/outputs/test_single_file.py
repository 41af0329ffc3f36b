"""Adapters of diffusion models as single files: diffusers loads what files of kohya become."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from starmerge_models.checkpoints.lora.unet_names import makers_name
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.engine import merge
from tests.conftest import MakeAdapter
from tests.oracles import formats as oracle
from tests.oracles.deltas import exact

Updates = dict[str, NDArray[np.float64]]
"""By the names of weights, those of text encoders behind ``text_encoder.``."""


def _unet(layers: int = 1, *, attends: bool = False) -> UNet2DConditionModel:
    """Return a U-Net of two blocks each way, both or one of which have attentions."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", f"{'CrossAttn' * attends}DownBlock2D"),
        up_block_types=(f"{'CrossAttn' * attends}UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    ).eval()


def _text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=32,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def _flux() -> FluxTransformer2DModel:
    torch.manual_seed(2)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def _wanted(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of layers of attention, and of some convolutions, as trainers choose."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name or "ff" in name))
        or (isinstance(module, nn.Conv2d) and name.endswith(("proj_in", "conv1")))
    }


def _factors(shape: tuple[int, ...], r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    up = torch.randn(shape[0], r, *(1 for _ in shape[2:]), generator=generator) / 4
    return up, torch.randn(r, *shape[1:], generator=generator) / 4


def _style(
    file: Path,
    layers: dict[str, tuple[int, ...]],
    seed: int,
    r: int,
    alpha: float | None,
    spelling: str,
) -> Updates:
    """Write a file of a trainer, and return what it adds to the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    updates: Updates = {}
    for name, shape in layers.items():
        up, down = _factors(shape, r, generator)
        part, _, path = name.partition(".")
        if spelling == "kohya":
            head = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
            stem = f"{head}_{path.replace('.', '_')}"
            tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
            if alpha is not None:
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        else:
            tensors |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
            if alpha is not None:
                tensors[f"{name}.alpha"] = torch.tensor(alpha)
        updates[name] = oracle.lora(up, down, 1.0 if alpha is None else alpha / r)
    save_file(tensors, file, metadata={"ss_base_model_version": "sd_v1", "seed": str(seed)})
    return updates


def _average(all_updates: list[Updates]) -> Updates:
    return {
        name: sum(own.get(name, np.float64(0)) for own in all_updates) / len(all_updates)
        for name in dict.fromkeys(name for own in all_updates for name in own)
    }


def _assert_adds(model: nn.Module, before: dict[str, Tensor], updates: Updates, part: str) -> None:
    """The layers' weights are those before and the updates, in float32's precision."""
    seen = set()
    for key, tensor in model.state_dict().items():
        name = key.replace(".base_layer", "")
        if name not in before:
            continue
        update = updates.get(f"{part}.{name.removesuffix('.weight')}")
        expected = exact(before[name])
        if update is not None and name.endswith(".weight"):
            seen.add(name)
            assert np.abs(update).max() > 0.01
            expected = expected + update.reshape(expected.shape)
        np.testing.assert_allclose(exact(tensor), expected, rtol=0, atol=2e-6, err_msg=name)
    assert len(seen) == sum(name.startswith(f"{part}.") for name in updates)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("output", ["style.safetensors", "folder"])
def test_three_styles_of_kohya_in_one_file(tmp_path: Path, output: str) -> None:
    unet, encoder = _unet(), _text_encoder()
    layers = {f"unet.{n}": s for n, s in _wanted(unet).items()}
    layers |= {f"text_encoder.{n}": s for n, s in _wanted(encoder).items()}
    assert any(len(shape) == 4 and shape[2] == 3 for shape in layers.values())
    files, updates = [], []
    for n, (r, alpha) in enumerate([(2, None), (3, 1.0), (2, 4.0)]):
        files.append(tmp_path / f"{n}.safetensors")
        updates.append(_style(files[-1], layers, n, r, alpha, "kohya"))
    made = merge(None, files, "average", output=tmp_path / output, output_kind="adapter")
    file = made.path if made.path.is_file() else made.path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert "seed" not in metadata and "path:" in metadata["starmerge_recipe"]
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    before = [
        {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for model in (unet, encoder)
    ]
    pipeline.load_lora_weights(
        made.path.parent if made.path.is_file() else made.path, weight_name=file.name
    )
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    with torch.no_grad():
        beside = unet(sample, 3, text).sample
    pipeline.fuse_lora()
    with torch.no_grad():
        fused = unet(sample, 3, text).sample
    expected = _average(updates)
    _assert_adds(unet, before[0], expected, "unet")
    _assert_adds(encoder, before[1], expected, "text_encoder")
    torch.testing.assert_close(beside, fused, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_three_styles_of_flux(tmp_path: Path) -> None:
    flux = _flux()
    layers = {f"transformer.{n}": s for n, s in _wanted(flux).items()}
    files, updates = [], []
    for n, (r, alpha) in enumerate([(2, None), (3, 1.0), (2, 4.0)]):
        files.append(tmp_path / f"{n}.safetensors")
        updates.append(_style(files[-1], layers, n, r, alpha, "diffusers"))
    merge(None, files, "average", output=tmp_path / "style.safetensors", output_kind="adapter")
    before = {name: tensor.clone() for name, tensor in flux.state_dict().items()}
    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux,
    )
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    inputs = {
        "hidden_states": torch.randn(1, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 12),
        "pooled_projections": torch.randn(1, 10),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
        "guidance": None,
    }
    with torch.no_grad():
        beside = flux(**inputs).sample
    pipeline.fuse_lora()
    with torch.no_grad():
        fused = flux(**inputs).sample
    _assert_adds(flux, before, _average(updates), "transformer")
    torch.testing.assert_close(beside, fused, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [1, 2])
def test_names_of_the_makers_of_stable_diffusion_xl(tmp_path: Path, layers: int) -> None:
    """What kohya trains for XL is found in diffusers' U-Net where diffusers itself puts it."""
    unet = _unet(layers, attends=True)
    unet.save_pretrained(tmp_path / "unet")
    tensors, found = {}, set()
    generator = torch.Generator().manual_seed(0)
    for name, weight in unet.state_dict().items():
        stored = makers_name(name.removesuffix(".weight"), list(unet.state_dict()), layers)
        # diffusers' loader does not take factors of time embeddings by these names, nor of "ff".
        if stored is None or weight.ndim < 2 or "blocks" not in name or ".ff." in name:
            continue
        found.add(stored)
        up, down = _factors(tuple(weight.shape), 2, generator)
        stem = f"lora_unet_{stored.replace('.', '_')}"
        tensors |= {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    assert {key.split("_")[2] for key in tensors} == {"input", "middle", "output"}
    assert all(any(part in key for key in tensors) for part in ("_op.", "skip", "_2_conv.", "emb"))
    save_file(tensors, tmp_path / "xl.safetensors")
    dotted = {
        f"diffusion_model.{stored}.{end}": tensors[f"lora_unet_{stored.replace('.', '_')}.{end}"]
        for stored in sorted(found)
        for end in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    save_file(dotted, tmp_path / "comfy.safetensors")
    files = [tmp_path / "xl.safetensors", tmp_path / "comfy.safetensors"]
    made = merge(tmp_path / "unet", files, "average", output=tmp_path / "m")
    merged = UNet2DConditionModel.from_pretrained(made.path).state_dict()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        tmp_path, weight_name="xl.safetensors", unet_config=unet.config
    )
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
    unet.fuse_lora()
    fused = {name.replace(".base_layer", ""): t for name, t in unet.state_dict().items()}
    changed = sum(not torch.equal(merged[name], before[name]) for name in merged)
    assert changed == len(tensors) // 3
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, fused[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("conv_out", "out.2"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.2.attentions.0.proj_in", "input_blocks.7.1.proj_in"),
        ("down_blocks.3.resnets.1.conv_shortcut", "input_blocks.11.0.skip_connection"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.attentions.2.proj_in", "output_blocks.11.1.proj_in"),
        ("up_blocks.3.resnets.2.norm2", "output_blocks.11.0.out_layers.0"),
    ],
)
def test_names_in_the_published_files_of_stable_diffusion(ours: str, theirs: str) -> None:
    """Of version 1.5, whose first block on the way up has no attentions."""
    names = [f"up_blocks.{block}.attentions.0.norm.weight" for block in (1, 2, 3)]
    assert makers_name(ours, names, 2) == theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved_by", ["model", "pipeline"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"proj_in": 3}, "alpha_pattern": {"proj_in": 5}},
    ],
    ids=str,
)
def test_reads_what_diffusers_saves(tmp_path: Path, saved_by: str, options: dict[str, Any]) -> None:
    unet = _unet()
    unet.save_pretrained(tmp_path / "unet")
    targets = ["to_q", "to_out.0", "proj_in", "conv1"]
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options
    )
    unet.add_adapter(config)
    if saved_by == "model":
        unet.save_lora_adapter(tmp_path / "style")
    else:
        StableDiffusionPipeline.save_lora_weights(
            tmp_path / "style",
            unet_lora_layers=get_peft_model_state_dict(unet),
            unet_lora_adapter_metadata=config.to_dict(),
        )
    before = _unet().state_dict()
    unet.fuse_lora()
    fused = {name.replace(".base_layer", ""): t for name, t in unet.state_dict().items()}
    made = merge(tmp_path / "unet", [tmp_path / "style"], "average", output=tmp_path / "merged")
    merged = UNet2DConditionModel.from_pretrained(made.path).state_dict()
    changed = 0
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, fused[name], rtol=0, atol=2e-6)
        changed += not torch.equal(tensor, before[name])
    assert changed > 10


@pytest.mark.filterwarnings("ignore")
def test_a_style_is_folded_into_a_unet(tmp_path: Path) -> None:
    """The merged folder is a model of diffusers, with the weights that its loader would fuse."""
    unet = _unet()
    unet.save_pretrained(tmp_path / "unet")
    layers = {f"unet.{n}": s for n, s in _wanted(unet).items()}
    updates = _style(tmp_path / "a.safetensors", layers, 0, 2, 1.0, "kohya")
    other = _style(tmp_path / "b.safetensors", layers, 1, 2, 1.0, "diffusers")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merge(tmp_path / "unet", files, "average", output=tmp_path / "merged")
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    _assert_adds(merged, unet.state_dict(), _average([updates, other]), "unet")


def test_one_layout_comes_out_of_two(tmp_path: Path) -> None:
    """kohya's, as dots cannot be put back; a module is one under both names."""
    layers = {"unet.mid_block.attn.to_q": (12, 10), "unet.mid_block.attn.to_k": (12, 10)}
    first = _style(tmp_path / "a.safetensors", layers, 0, 2, 1.0, "diffusers")
    del layers["unet.mid_block.attn.to_k"]
    second = _style(tmp_path / "b.safetensors", layers, 1, 2, 1.0, "kohya")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for order in (files, files[::-1]):
        made = merge(
            None,
            order,
            "average",
            output=tmp_path / "c.safetensors",
            output_kind="adapter",
            overwrite=True,
        )
        tensors = load_file(made.path)
        for name, update in _average([first, second]).items():
            stem = "lora_" + name.replace(".", "_")
            up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
            scale = float(tensors[f"{stem}.alpha"]) / len(down)
            np.testing.assert_allclose(oracle.lora(up, down, scale), update, rtol=0, atol=1e-7)
        assert len(tensors) == 6


def test_layers_under_the_names_of_their_maker_are_not_merged_with_those_of_diffusers(
    tmp_path: Path,
) -> None:
    for n, layer in enumerate(["input_blocks.1.1", "down_blocks.0.attentions.0"]):
        _style(tmp_path / f"{n}.safetensors", {f"unet.{layer}.to_q": (8, 6)}, n, 2, None, "kohya")
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    for order in (files, files[::-1]):
        with pytest.raises(UsageError, match="its maker.*save_lora_weights"):
            merge(None, order, "average", output=tmp_path / "o", output_kind="adapter")


def test_one_style_alone_keeps_its_update(tmp_path: Path) -> None:
    layers = {"unet.mid_block.attn.to_q": (12, 10), "unet.mid_block.conv": (6, 4, 3, 3)}
    for spelling in ("kohya", "diffusers"):
        updates = _style(tmp_path / "a.safetensors", layers, 0, 3, 2.0, spelling)
        made = merge(
            None,
            [tmp_path / "a.safetensors"],
            "average",
            output=tmp_path / f"{spelling}.safetensors",
            output_kind="adapter",
        )
        tensors = load_file(made.path)
        assert set(load_file(tmp_path / "a.safetensors")) >= set(tensors)
        for name, update in updates.items():
            stem, ends = name, ("lora_B", "lora_A")
            if spelling == "kohya":
                stem, ends = "lora_" + name.replace(".", "_"), ("lora_up", "lora_down")
            up, down = (tensors[f"{stem}.{end}.weight"] for end in ends)
            np.testing.assert_allclose(oracle.lora(up, down, 1.0), update, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["loha", "lokr", "locon"])
def test_factors_of_lycoris_become_those_of_kohya(tmp_path: Path, kind: str) -> None:
    """Three tools' structures, written as s·B·A: the same update to 1e-7 of its largest entry."""
    generator = torch.Generator().manual_seed(0)
    stem = "lora_unet_mid_block_attn_to_q"

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "loha":
        a = {f"hada_w{n}_a": random(12, 2) for n in (1, 2)}
        b = {f"hada_w{n}_b": random(2, 10) for n in (1, 2)}
        parts = {**a, **b}
        halves = [oracle.half(a[f"hada_w{n}_a"], b[f"hada_w{n}_b"]) for n in (1, 2)]
        update = oracle.loha(*halves, 1.5)
    elif kind == "lokr":
        parts = {"lokr_w1": random(3, 2), "lokr_w2_a": random(4, 2), "lokr_w2_b": random(2, 5)}
        second = oracle.half(parts["lokr_w2_a"], parts["lokr_w2_b"])
        update = oracle.lokr(exact(parts["lokr_w1"]), second, 1.5)
    else:
        shapes = {"up": (12, 2, 1, 1), "mid": (2, 2, 3, 3), "down": (2, 10, 1, 1)}
        parts = {f"lora_{part}.weight": random(*shape) for part, shape in shapes.items()}
        update = oracle.locon(*parts.values(), 1.5)
    tensors = {f"{stem}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors | {f"{stem}.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    made = merge(
        None,
        [tmp_path / "a.safetensors"],
        "average",
        output=tmp_path / "b.safetensors",
        output_kind="adapter",
    )
    written = load_file(made.path)
    up, down = written[f"{stem}.lora_up.weight"], written[f"{stem}.lora_down.weight"]
    ours = oracle.lora(up, down, float(written[f"{stem}.alpha"]) / len(down))
    np.testing.assert_allclose(ours, update, rtol=0, atol=1e-7 * abs(update).max() + 1e-7)


@pytest.mark.parametrize("order", [("flat", "kernel"), ("kernel", "flat")])
def test_flat_kernels_are_merged_with_others_without_a_base(
    tmp_path: Path, order: tuple[str, str]
) -> None:
    """LyCORIS stores the factors of kernels flat, kohya does not: the merge has the kernel."""
    generator = torch.Generator().manual_seed(0)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    down, up = (torch.randn(*s, generator=generator) for s in ((3, 4, 3, 3), (6, 3, 1, 1)))
    a = [torch.randn(6, 2, generator=generator) for _ in range(2)]
    b = [torch.randn(2, 36, generator=generator) for _ in range(2)]
    parts = {
        "kernel": {"lora_down.weight": down, "lora_up.weight": up},
        "flat": {f"hada_w{n + 1}_{s}": t[n] for s, t in (("a", a), ("b", b)) for n in (0, 1)},
    }
    for name, own in parts.items():
        save_file({f"{stem}.{p}": t for p, t in own.items()}, tmp_path / f"{name}.safetensors")
    flat = oracle.loha(oracle.half(a[0], b[0]), oracle.half(a[1], b[1]), 1.0)
    update = (oracle.lora(up, down, 1.0) + flat.reshape(6, 4, 3, 3)) / 2
    made = merge(
        None,
        [tmp_path / f"{name}.safetensors" for name in order],
        "average",
        output=tmp_path / "merged.safetensors",
        output_kind="adapter",
    )
    written = load_file(made.path)
    up, down = written[f"{stem}.lora_up.weight"], written[f"{stem}.lora_down.weight"]
    assert down.shape[1:] == (4, 3, 3)
    ours = oracle.lora(up, down, float(written[f"{stem}.alpha"]) / len(down))
    np.testing.assert_allclose(ours, update, rtol=0, atol=1e-6 * abs(update).max())


def test_refusals_of_single_files(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    layers = {"unet.mid_block.attn.to_q": (12, 10)}
    _style(tmp_path / "a.safetensors", layers, 0, 3, 2.0, "kohya")
    peft = make_adapter("peft")
    output = tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="PEFT's layout.*Give a folder"):
        merge(None, [peft], "average", output=output, output_kind="adapter")
    with pytest.raises(UsageError, match="Give the base before the models"):
        merge(
            None,
            [peft, tmp_path / "a.safetensors"],
            "average",
            output=tmp_path / "x",
            output_kind="adapter",
        )
    with pytest.raises(UsageError, match="name of a file"):
        merge(tmp_path, [tmp_path / "a.safetensors"], "average", output=output)
    output.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        merge(None, [tmp_path / "a.safetensors"], "average", output=output, output_kind="adapter")
    assert output.read_bytes() == b"mine"
    broken = load_file(tmp_path / "a.safetensors")
    key = next(key for key in broken if key.endswith("lora_up.weight"))
    broken[key][0, 0] = torch.nan
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(StarmergeError, match="NaN"):
        merge(
            None,
            [tmp_path / "nan.safetensors"],
            "average",
            output=output,
            output_kind="adapter",
            overwrite=True,
        )
    # Few numbers that stand for a matrix of terabytes.
    stem = "lora_unet_mid_block_attn_to_q.lokr"
    huge = {f"{stem}_w1": torch.eye(400), f"{stem}_w2": torch.eye(400)}
    save_file(huge, tmp_path / "huge.safetensors")
    with pytest.raises(StarmergeError, match=r"\[160000, 160000\], larger than any"):
        merge(
            None,
            [tmp_path / "huge.safetensors"],
            output=tmp_path / "x",
            output_kind="adapter",
            rank=2,
        )
    assert output.read_bytes() == b"mine"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
