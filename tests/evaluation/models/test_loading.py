"""Loading models: their kind, device and dtype, how they generate, adapters on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.models.generation import generate
from starmerge_models.evaluation.models.loading import (
    AdapterSwitch,
    context_length,
    device_kind,
    dtype_name,
    load_model,
    load_text_model,
)
from starmerge_models_demo import ADAPTERS
from tests.conftest import MakeAdapter, edit_json
from tests.evaluation.models import tiny_models
from tests.evaluation.models.tiny_models import make, prompts


def store(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **tokens: str) -> Path:
    """Write a tiny model and its tokenizer; return the folder."""
    make(kind).to(dtype).save_pretrained(folder)
    tiny_models.tokenizer(**tokens).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", transformers.LlamaForCausalLM),
        ("mamba", transformers.MambaForCausalLM),
        ("t5", transformers.T5ForConditionalGeneration),
        ("bart", transformers.BartForConditionalGeneration),
    ],
)
def test_a_model_of_any_kind_is_loaded_and_answers(
    kind: str, expected: type, tmp_path: Path
) -> None:
    model, tokenizer = load_model(store(kind, tmp_path), device="cpu")
    assert isinstance(model, expected)
    assert not model.training
    texts = [
        generate(
            each,
            tokenizer,
            prompts(8),
            max_new_tokens=4,
            is_final=lambda _: False,
            batch_size=None,
            advance=lambda _: None,
        )
        for each in (model, make(kind))
    ]
    assert texts[0] == texts[1]


def test_a_model_of_text_that_does_not_write_is_loaded_as_its_config_says(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for name, kind in {
        "masked": transformers.BertForMaskedLM,
        "classifier": transformers.BertForSequenceClassification,
        "bare": transformers.BertModel,
    }.items():
        kind(config).save_pretrained(tmp_path / name)
        tiny_models.tokenizer().save_pretrained(tmp_path / name)
        model, _ = load_text_model(tmp_path / name, device="cpu")
        assert type(model) is kind
        assert not model.training
    model, _ = load_text_model(store("t5", tmp_path / "t5"), device="cpu")
    assert isinstance(model, transformers.T5ForConditionalGeneration)
    assert model.generation_config.decoder_start_token_id == tiny_models.PAD


def test_greedy_is_greedy_whatever_the_model_asks_for(tmp_path: Path) -> None:
    folder = store("llama", tmp_path)
    options = {"do_sample": True, "temperature": 2.0, "num_beams": 3, "repetition_penalty": 1.8}
    edit_json(folder / "generation_config.json", **options)
    model, _ = load_model(folder)
    plain = make("llama")
    for prompt in prompts(8):
        texts = [
            each.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6).tolist()
            for each in (model, plain)
        ]
        assert texts[0] == texts[1]


def test_the_end_is_the_tokenizers_if_the_model_does_not_say(tmp_path: Path) -> None:
    folder = store("llama", tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=None)
    model, tokenizer = load_model(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1


def test_the_end_serves_as_padding_where_there_is_none(tmp_path: Path) -> None:
    _, tokenizer = load_model(store("llama", tmp_path / "end", eos_token="</s>"))
    assert tokenizer.pad_token == "</s>"
    _, tokenizer = load_model(store("llama", tmp_path / "neither", bos_token="w5"))
    assert tokenizer.pad_token is None


def test_a_decoder_needs_a_token_to_start_with(tmp_path: Path) -> None:
    folder = store("t5", tmp_path)
    edit_json(folder / "generation_config.json", decoder_start_token_id=None)
    model, _ = load_model(folder)
    assert model.generation_config.decoder_start_token_id == 0  # of the config
    edit_json(folder / "config.json", decoder_start_token_id=None)
    with pytest.raises(UsageError, match="does not say which token its decoder starts with"):
        load_model(folder)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_computes_in_the_dtype_that_is_told(stored: torch.dtype, tmp_path: Path) -> None:
    folder = store("llama", tmp_path, stored)
    for dtype in ("auto", "float32", "bfloat16", "float16"):
        model, _ = load_model(folder, device="cpu", dtype=dtype)
        assert str(model.dtype) == f"torch.{dtype_name(folder, dtype, 'cpu')}"
        if dtype != "auto":
            assert dtype_name(folder, dtype, "cpu") == dtype


def test_16_bits_stay_only_where_the_processor_computes_in_them(tmp_path: Path) -> None:
    """The flags are those that the kernel of Linux names."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
    folder = store("llama", tmp_path, torch.bfloat16)
    if "avx512_bf16" in flags:
        assert dtype_name(folder, "auto", "cpu") == "bfloat16"
    if "avx2" in flags and "avx512f" not in flags and "avx_ne_convert" not in flags:
        assert dtype_name(folder, "auto", "cpu") == "float32"
    edit_json(folder / "config.json", dtype="float16")
    if "avx2" in flags and not {"avx512_fp16", "amx_fp16", "avx_ne_convert"} & set(flags):
        assert dtype_name(folder, "auto", "cpu") == "float32"


def test_a_config_without_dtype_leaves_it_to_the_weights(tmp_path: Path) -> None:
    folder = store("llama", tmp_path, torch.bfloat16)
    named = dtype_name(folder, "auto", "cpu")
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert dtype_name(folder, "auto", "cpu") == named
    assert str(load_model(folder, device="cpu")[0].dtype) == f"torch.{named}"
    (folder / "model.safetensors").unlink()
    with pytest.raises(StarmergeError, match="holds no weights"):
        dtype_name(folder, "auto", "cpu")


def test_a_device_is_named_or_found() -> None:
    assert device_kind(None) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert device_kind("cuda:1") == "cuda"
    assert device_kind("cpu") == "cpu"


@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"Device '{device}' cannot be used"):
        load_model(store("llama", tmp_path), device=device)


def test_a_context_is_as_long_as_model_and_tokenizer_say() -> None:
    tokenizer, llama, t5, mamba = tiny_models.tokenizer(), make("llama"), make("t5"), make("mamba")
    assert context_length(llama, tokenizer) == llama.config.max_position_embeddings == 2048
    assert context_length(t5, tokenizer) is None
    assert context_length(mamba, tokenizer) is None
    tokenizer.model_max_length = 512
    assert [context_length(model, tokenizer) for model in (llama, t5, mamba)] == [512] * 3


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a language model"):
        load_model(tmp_path)
    with pytest.raises(UsageError, match=r"is an adapter. The base must be a whole model"):
        load_model(ADAPTERS / "past")
    folder = store("llama", tmp_path / "vision")
    edit_json(folder / "config.json", model_type="vit")
    with pytest.raises(UsageError, match="is not a language model"):
        load_model(folder)


def test_adapters_come_and_go_and_leave_the_base_alone(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2)
    ids = tokenizer("The plural of mouse is", return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        switch = AdapterSwitch(model, {name: ADAPTERS / name for name in ("past", "digits")})
        outputs: dict[str | None, list[torch.Tensor]] = {}
        for name in ("past", "digits", None, "past"):
            with switch.active(name) as active:
                outputs.setdefault(name, []).append(active(input_ids=ids).logits)
    assert torch.equal(outputs[None][0], plain)
    assert torch.equal(outputs["past"][0], outputs["past"][1])
    assert not torch.equal(outputs["past"][0], outputs["digits"][0])
    assert not torch.equal(outputs["past"][0], plain)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, make_adapter: MakeAdapter) -> None:
    model, _ = load_model(store("gpt2", tmp_path / "base"))
    with pytest.raises(UsageError, match=r"PEFT cannot apply .*wrong to the base"):
        AdapterSwitch(model, {"a": make_adapter("wrong")})


def test_a_model_that_lacks_a_tensor_is_not_filled_at_random(tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"base lacks the tensor model\.norm\.weight"):
        load_model(folder)


def test_a_model_that_is_cut_off_or_brings_code_is_refused(tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match="base is not a language model, or is broken"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    (folder / "code.py").write_text("raise SystemExit('the code was run')")
    with pytest.raises(UsageError, match="base is not a language model, or is broken"):
        load_model(folder)


def test_adapters_that_put_tokens_before_a_prompt_are_refused(tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    model, _ = load_model(folder)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "tuned", save_embedding_layers=False)
    plain, _ = load_model(folder)
    with pytest.raises(UsageError, match="of the kind PROMPT_TUNING, which prepends"):
        AdapterSwitch(plain, {"tuned": tmp_path / "tuned"})
