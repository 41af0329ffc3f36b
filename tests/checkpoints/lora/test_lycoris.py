"""LyCORIS' own modules compute what is read from their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file
from torch import nn

from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.lora.opening import open_adapter
from starmerge_models.checkpoints.source import resolve

_LAYERS = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 5)),
    "point": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 5, 5)),
}

_ALGORITHMS: dict[str, tuple[type, dict[str, Any]]] = {
    "locon": (LoConModule, {}),
    "locon with a core": (LoConModule, {"use_tucker": True}),
    "loha": (LohaModule, {}),
    "loha with cores": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {"factor": 2}),
    "lokr with a core": (LokrModule, {"factor": 2, "use_tucker": True}),
    "lokr, both split": (LokrModule, {"factor": 4, "decompose_both": True, "lora_dim": 1}),
    "lokr, whole": (LokrModule, {"factor": 4, "full_matrix": True}),
    "full": (FullModule, {}),
    "dora": (LoConModule, {"weight_decompose": True}),
    "dora of inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "doha": (LohaModule, {"weight_decompose": True}),
    "dokr of inputs": (LokrModule, {"factor": 2, "weight_decompose": True, "wd_on_out": False}),
}


@pytest.mark.parametrize("layer", _LAYERS)
@pytest.mark.parametrize("algorithm", _ALGORITHMS)
def test_gives_the_layer_that_lycoris_computes(tmp_path: Path, layer: str, algorithm: str) -> None:
    torch.manual_seed(0)
    make, shape = _LAYERS[layer]
    module = make()
    before = {f"block.{layer}.{name}": t.clone() for name, t in module.state_dict().items()}
    kind, options = _ALGORITHMS[algorithm]
    adapter = kind(f"lora_unet_block_{layer}", module, **{"lora_dim": 2, "alpha": 3.0} | options)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
        if options.get("weight_decompose") and parameter.numel() in parameter.shape:
            nn.init.uniform_(parameter, 0.5, 1.5)
    stored = {f"{adapter.lora_name}.{k}": t.contiguous() for k, t in adapter.state_dict().items()}
    base = tmp_path / "unet"
    base.mkdir()
    save_file(before, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    if kind is FullModule:  # it keeps the changed weights themselves, and stores the difference
        stored = {
            f"{adapter.lora_name}.diff": adapter.weight.detach().clone(),
            f"{adapter.lora_name}.diff_b": adapter.bias.detach().clone(),
        }
    save_file(stored, tmp_path / "a.safetensors")

    opened = open_base(resolve(base))
    ours = open_adapter("a", resolve(tmp_path / "a.safetensors", may_be_file=True), opened)
    state = dict(before)
    for name in ours.tensors:
        delta = ours.delta(name, before[name]).to_dense().reshape(before[name].shape)
        state[name] = before[name] + delta
    folded = make()
    folded.load_state_dict({name.rpartition(".")[2]: t for name, t in state.items()})
    adapter.apply_to()
    inputs = torch.randn(*shape)
    with torch.no_grad():
        theirs, plain = module(inputs), folded(inputs)
    assert (theirs - make()(inputs)).abs().max() > 0.05
    torch.testing.assert_close(plain, theirs, rtol=1e-5, atol=1e-5)
