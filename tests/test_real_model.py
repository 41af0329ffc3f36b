"""The real model, merged, in the hands of transformers and PEFT.

Its first layers are enough where each is treated alike; one test takes all of them.
"""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.source import resolve
from starmerge_models_demo import ADAPTERS

_TEXT = "Write the past tense of this verb.\nswim"


def _logits(model: torch.nn.Module, tokenizer: object) -> torch.Tensor:
    ids = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        [{"role": "user", "content": _TEXT}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits.double()
    return logits


def _relative(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def test_adapter_through_peft_gives_the_logits_of_our_delta_folded_in(
    smollm2: Path, tmp_path: Path
) -> None:
    merged = sm.merge(
        smollm2, [ADAPTERS / "past"], "average", output=tmp_path / "merged", dtype="float32"
    )
    ours = AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    base = _logits(plain, tokenizer)
    peft = _logits(PeftModel.from_pretrained(plain, ADAPTERS / "past").eval(), tokenizer)
    assert _relative(_logits(ours, tokenizer), peft) < 1e-5
    assert _relative(base, peft) > 0.05


# Star ends with an average, which the test above has of one adapter.
@pytest.mark.parametrize("method", [sm.Star(), sm.TaskArithmetic(alpha=0.3)])
def test_merged_folder_gives_the_logits_of_the_deltas_added_by_hand(
    shallow: Path, shallow_adapters: dict[str, Path], tmp_path: Path, method: sm.Method
) -> None:
    names = ("past", "digits", "language")
    adapters = [shallow_adapters[name] for name in names]
    merged = sm.merge(shallow, adapters, method, output=tmp_path / "out")
    by_hand = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.bfloat16)
    weights = dict(by_hand.named_parameters())
    factors = [load_file(adapter / "adapter_model.safetensors") for adapter in adapters]
    for key in factors[0]:
        if ".lora_A." not in key:
            continue
        deltas = [
            2.0 * part[key.replace("lora_A", "lora_B")].double() @ part[key].double()
            for part in factors
        ]
        if isinstance(method, sm.Star):
            deltas = [_star(delta) for delta in deltas]
        scale = 0.3 if isinstance(method, sm.TaskArithmetic) else 1 / 3
        weight = weights[key.removeprefix("base_model.model.").replace(".lora_A", "")]
        weight.data = (weight.data.double() + scale * sum(deltas)).to(weight.dtype)
    ours = AutoModelForCausalLM.from_pretrained(merged.path, dtype="auto")
    assert ours.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(shallow).chat_template
    # Both round once to bfloat16: they differ where float32 and float64 round apart.
    differing = sum(
        int((parameter != weights[name]).sum()) for name, parameter in ours.named_parameters()
    )
    assert differing < len(factors[0]) / 2 * 576 * 576 * 1e-4
    assert _relative(_logits(ours.float(), tokenizer), _logits(by_hand.float(), tokenizer)) < 1e-3


def _star(delta: torch.Tensor) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = int((S.cumsum(0) < 0.4 * S.sum()).sum()) + 1
    kept: torch.Tensor = U[:, :r] * (S[:r] * S.sum() / S[:r].sum()) @ Vh[:r]
    return kept


def test_a_metric_has_the_moments_of_what_the_model_reads(shallow: Path, tmp_path: Path) -> None:
    texts = ["Paris is the capital of France.", "def f(x): return x + 1", _TEXT.replace("\n", " ")]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    file = tmp_path / "metric.safetensors"
    result = sm.calibrate(
        shallow, file, texts=tmp_path / "texts.txt", prompts={"past": "past"}, rows=2
    )
    metric = sm.open_metric(file)
    metric.check_base(open_base(resolve(shallow)))
    assert result.tensors == 2 * 7
    assert metric.tasks == ("past",)
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(shallow)
    names = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp")]
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] in names and isinstance(module, torch.nn.Linear):
            seen[name] = []
            module.register_forward_pre_hook(
                lambda _, given, inputs=seen[name]: inputs.append(given[0][0].double())
            )
    with torch.inference_mode():
        for text in texts:
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]]))
    assert len(seen) == 2 * 7
    for name, inputs in seen.items():
        rows = torch.cat(inputs)
        moment = metric.moment(f"{name}.weight")
        assert (
            moment.tokens == len(rows) == sum(len(tokenizer(text)["input_ids"]) for text in texts)
        )
        expected, ours = rows.T @ rows / len(rows), moment.root.double().T @ moment.root.double()
        # In bfloat16 a batch of one and another may round apart, layer by layer.
        assert _relative(ours, expected) < 0.02, name


def test_a_base_writes_text_for_its_own_metric(shallow: Path, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        sm.calibrate(shallow, tmp_path / name, sequences=2, length=6, seed=1)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]
    # The template's head has 24 tokens.
    name = "model.layers.1.mlp.down_proj.weight"
    assert sm.open_metric(tmp_path / "a").moment(name).root.shape == (2 * 30, 1536)


def test_an_adapter_folded_into_a_stored_model_is_truncated_as_it_was(
    shallow: Path, shallow_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = shallow_adapters["digits"]
    full = sm.merge(shallow, [adapter], "average", output=tmp_path / "full").path
    ranks: dict[str, list[int]] = {}
    nuclear: dict[str, list[float]] = {}
    sources = {"truth": (adapter, sm.Star()), "auto": (full, sm.Star())}
    sources["off"] = (full, sm.Star(noise_floor="off"))
    merged = {}
    for name, (path, method) in sources.items():
        result = sm.merge(shallow, [path], method, output=tmp_path / name)
        tasks = [
            record["tasks"][0]
            for record in result.report.tensors
            if record["tasks"] and record["tasks"][0]["nuclear_before"]
        ]
        ranks[name] = [task["rank"] for task in tasks]
        nuclear[name] = [task["nuclear_before"] for task in tasks]
        merged[name] = load_file(result.path / "model.safetensors")
        assert all((task["noise"] is not None) == (name == "auto") for task in tasks)
    base = load_file(shallow / "model.safetensors")
    assert len(ranks["truth"]) == len(ranks["auto"]) == len(ranks["off"]) == 4
    assert ranks["auto"] == ranks["truth"]
    assert sum(ranks["off"]) > 3 * sum(ranks["truth"])
    assert sum(nuclear["auto"]) == pytest.approx(sum(nuclear["truth"]), rel=0.03)
    assert sum(nuclear["off"]) > 1.5 * sum(nuclear["truth"])

    def error(name: str) -> float:
        """Return how far the update lies from that of the adapter, relative to it."""
        apart = wanted = 0.0
        for key, weight in merged["truth"].items():
            if torch.equal(weight, base[key]):
                assert torch.equal(merged[name][key], weight)
                continue
            apart += float((merged[name][key].double() - weight.double()).square().sum())
            wanted += float((weight.double() - base[key].double()).square().sum())
        return (apart / wanted) ** 0.5

    assert error("auto") < 0.1
    assert error("off") > 0.3


def test_eight_adapters_become_one_that_peft_loads_with_the_logits_of_the_merged_model(
    shallow: Path, shallow_adapters: dict[str, Path], tmp_path: Path
) -> None:
    models = list(shallow_adapters.values())
    assert len(models) == 8
    full = sm.merge(shallow, models, "auto", output=tmp_path / "full", dtype="float32")
    exact = sm.merge(None, models, "auto", output=tmp_path / "exact", output_kind="adapter")
    low = sm.merge(None, models, "auto", output=tmp_path / "low", output_kind="adapter", rank=64)
    assert exact.report.content["output"]["error"] == 0
    assert 0 < low.report.content["output"]["error"] < 0.3
    tokenizer = AutoTokenizer.from_pretrained(full.path)
    wanted = _logits(AutoModelForCausalLM.from_pretrained(full.path), tokenizer)

    def through_peft(adapter: Path) -> torch.Tensor:
        plain = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
        return _logits(PeftModel.from_pretrained(plain, adapter).eval(), tokenizer)

    base = _logits(AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32), tokenizer)
    moved = _relative(base, wanted)
    assert _relative(through_peft(exact.path), wanted) < 1e-5
    assert _relative(through_peft(low.path), wanted) < 0.5 * moved
    back = sm.merge(shallow, [exact.path], "average", output=tmp_path / "back", dtype="float32")
    assert (full.path / "model.safetensors").read_bytes() == (
        back.path / "model.safetensors"
    ).read_bytes()
