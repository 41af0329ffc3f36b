"""What PEFT's ``add_weighted_adapter`` makes of the average of two adapters, beside starmerge.

For each kind of adapter and combination, the relative error ‖Δ − ½(Δ_1 + Δ_2)‖ / ‖½(Δ_1 + Δ_2)‖
over all adapted weights, Δ being what the combined adapter changes when PEFT folds it into the
base, and Δ_1, Δ_2 the same of each adapter alone. docs/comparison.md has what came out.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import starmerge_models as sm

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
COMBINATIONS = ("linear", "cat", "svd")


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )
    print(f"PEFT {peft.__version__}, torch {torch.__version__}\n")
    print(f"| adapters | {' | '.join(COMBINATIONS)} | starmerge |")
    print(f"|---|{'---:|' * (len(COMBINATIONS) + 1)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base.save_pretrained(folder / "base")
        for kind, options in KINDS.items():
            adapters = [_adapter(base, folder / f"{kind}-{n}", options) for n in (1, 2)]
            wanted = _mean([_change(base, _loaded(base, [path]), "1") for path in adapters])
            cells = []
            for combination in COMBINATIONS:
                model = _loaded(base, adapters)
                try:
                    model.add_weighted_adapter(
                        ["1", "2"], [0.5, 0.5], "both", combination_type=combination
                    )
                except (ValueError, NotImplementedError) as error:
                    cells.append(f"refused: {error}")
                    continue
                cells.append(_error(_change(base, model, "both"), wanted))
            sm.merge(folder / "base", adapters, "average", output=folder / f"{kind}-merged")
            merged = LlamaForCausalLM.from_pretrained(folder / f"{kind}-merged").state_dict()
            own = {key: merged[key].double() - base.state_dict()[key].double() for key in wanted}
            print(f"| {kind} | {' | '.join([*cells, _error(own, wanted)])} |")


def _adapter(base: LlamaForCausalLM, folder: Path, options: dict[str, Any]) -> Path:
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        **options,
    )
    get_peft_model(copy.deepcopy(base), settings).save_pretrained(folder)
    return folder


def _loaded(base: LlamaForCausalLM, adapters: list[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(copy.deepcopy(base), adapters[0], adapter_name="1")
    for number, path in enumerate(adapters[1:], 2):
        model.load_adapter(path, str(number))
    return model


def _change(base: LlamaForCausalLM, model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    """Return what an adapter changes, by PEFT's own folding in."""
    model.set_adapter(adapter)
    folded = model.merge_and_unload(adapter_names=[adapter]).state_dict()
    before = base.state_dict()
    changes = {key: folded[key].double() - before[key].double() for key in before}
    return {key: change for key, change in changes.items() if change.any()}


def _mean(changes: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: sum(one[key] for one in changes) / len(changes) for key in changes[0]}


def _error(changes: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> str:
    wrong = sum(((changes[key] - wanted[key]) ** 2).sum() for key in wanted)
    return f"{float(wrong / sum((one**2).sum() for one in wanted.values())) ** 0.5:.1e}"


if __name__ == "__main__":
    main()
