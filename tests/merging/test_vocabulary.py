"""Models with tokens of their own: notes, unions, rows, templates, with real tokenizers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import starmerge_models as sm
from starmerge_models.demo_names import prepared_base
from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.plan import make_plan
from starmerge_models.recipe import make_recipe
from starmerge_models.recipe_file import load_recipe, write_recipe
from tests.conftest import MakeMetric, edit_json

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
TEXT = "w3 <|im_start|> w1 <tool> w7 <|im_end|>"

Make = Callable[..., Path]


def _tokenizer(words: int = 60, **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {f"w{i}": i for i in range(words)} | {"<unk>": words}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **options)


def _save_tokenizer(
    folder: Path, special: Sequence[str] = (), template: str | None = None, **options: Any
) -> None:
    made = _tokenizer(**options)
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = template
    made.save_pretrained(folder)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a Llama with 64 rows, 61 of them for tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    _save_tokenizer(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def tune(base: Path) -> Make:
    """Return a function that makes a full fine-tune with tokens of its own."""

    def make(
        name: str, special: Sequence[str] = (), *, seed: int = 1, rows: int = 64, **options: Any
    ) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(rows)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        folder = base.parent / name
        model.save_pretrained(folder)
        _save_tokenizer(folder, special, **options)
        return folder

    return make


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _ids(folder: Path) -> Mapping[str, int]:
    vocabulary: Mapping[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return vocabulary


def _logits(folder: Path, text: str, tokens: Sequence[str], model: Any = None) -> torch.Tensor:
    """Return the logits of some tokens after each token of a text."""
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found: torch.Tensor = model.eval()(ids).logits
    return found[0][:, [_ids(folder)[token] for token in tokens]]


def _notes(result: sm.MergeResult) -> str:
    return "\n".join(result.report.content["notes"])


def test_notes_name_the_tokens_and_templates_that_the_output_lacks(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    a = tune("a", ["<|im_start|>", "<|im_end|>"], template="{{ messages }}!")
    b = tune("b", ["<|im_start|>", "<|im_end|>"], template="{{ messages }}!", seed=2)
    c = tune("c", seed=3)
    d = tune("d", ["<x>"], seed=4)
    result = sm.merge(base, [a, b, c, d], "average", output=tmp_path / "out")
    assert result.report.content["notes"] == [
        "The base's tokenizer lacks 2 tokens of a and b (<|im_start|>, <|im_end|>), a token of d "
        "(<x>). The output has the base's tokenizer; --tokenizer union (tokenizer: union in a "
        "recipe) adds what is missing.",
        "a and b have a chat template. The output has none, as the base; --chat-template a "
        "(chat_template: a in a recipe) takes it.",
    ]
    assert sm.merge(base, [c], "average", output=tmp_path / "c_alone").report.content["notes"] == []
    plan = make_plan(make_recipe({"base": str(base), "models": [str(a)]}), tmp_path / "other")
    assert len(plan.notes) == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"vocab": {"a": -1}}, "added_tokens": 3}'),
        ("tokenizer.json", '{"model": 3, "added_tokens": [3, {"id": "x", "content": "<x>"}]}'),
        ("tokenizer.json", '{"added_tokens": [{"id": 100000000000, "content": "<x>"}]}'),
        ("added_tokens.json", '{"<x>": "seven"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": []}}, "a": 1}'),
        ("tokenizer_config.json", '{"chat_template": 3, "eos_token": []}'),
        ("tokenizer_config.json", f'{{"added_tokens_decoder": {{"{"9" * 5000}": {{}}}}}}'),
        ("chat_template.jinja", b"\xff"),
        ("special_tokens_map.json", "null"),
    ],
)
def test_a_strange_tokenizer_beside_a_model_stops_no_merge(
    base: Path, tune: Make, tmp_path: Path, file: str, content: str | bytes
) -> None:
    a = tune("a", ["<|im_start|>"])
    (a / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    result = sm.merge(base, [a], "average", output=out)
    assert torch.equal(_weights(out)[TABLES[0]], _weights(a)[TABLES[0]])
    assert result.report.content["files"] == sorted(p.name for p in out.iterdir())


def test_a_union_gives_every_token_its_row(base: Path, tune: Make, tmp_path: Path) -> None:
    """By the rules of mergekit's union, token by token."""
    a = tune("a", ["<|im_start|>", "<|im_end|>"], seed=1)
    b = tune("b", ["<tool>", "<|im_end|>", "<x>", "<y>", "<z>"], seed=2, rows=70)
    out = tmp_path / "out"
    result = sm.merge(base, [a, b], "average", output=out, tokenizer="union")
    ids, theirs = _ids(out), {folder: _ids(folder) for folder in (a, b)}
    assert set(ids) == set(_ids(base)).union(theirs[a], theirs[b])
    assert sorted(ids.values()) == list(range(67))
    assert {token: ids[token] for token in _ids(base)} == _ids(base)
    assert ids["<|im_start|>"] == 61  # as in a, which comes first
    made, tables = _weights(out), {folder: _weights(folder) for folder in (base, a, b)}
    for name in TABLES:
        assert made[name].shape == (67, 32)
        for token, number in ids.items():
            having = [f for f in (a, b) if token in theirs[f]]
            rows = torch.stack([tables[f][name][theirs[f][token]].double() for f in having])
            torch.testing.assert_close(made[name][number].double(), rows.mean(0), atol=1e-6, rtol=0)
    for name, weight in made.items():
        if name not in TABLES:
            mean = (tables[a][name].double() + tables[b][name].double()) / 2
            torch.testing.assert_close(weight.double(), mean, atol=1e-6, rtol=0)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 67
    notes = _notes(result)
    assert "6 tokens more than" in notes
    assert "<tool> (61 there, 62 here)" in notes
    assert "different rows for new tokens of the same name (<|im_end|>)" in notes
    tokenizer, own = (AutoTokenizer.from_pretrained(folder) for folder in (out, b))
    text = "w1 <tool>w2<|im_end|> <z> nothing"
    assert tokenizer.tokenize(text) == own.tokenize(text)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == own.decode(
        own(text).input_ids, skip_special_tokens=True
    )
    assert sm.verify(out, repeat="all").is_right


def test_a_token_that_a_model_lacks_is_unchanged_in_it(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    """The base has a token that b's tokenizer does not."""
    _save_tokenizer(base, ["<old>"])
    a, b = tune("a", ["<old>"], seed=1), tune("b", ["<new>"], seed=2)
    out = tmp_path / "out"
    sm.merge(base, [a, b], "average", output=out, tokenizer="union")
    assert _ids(out)["<new>"] == 62
    for name in TABLES:
        made, ours, first, second = (_weights(f)[name] for f in (out, base, a, b))
        torch.testing.assert_close(made[61], (first[61] + ours[61]) / 2)
        assert torch.equal(made[62], second[61])
        torch.testing.assert_close(made[63], (first[63] + second[63]) / 2)  # of no token


@pytest.mark.parametrize("rows", [64, 70])
@pytest.mark.parametrize("method", ["average", "ties"])
def test_a_union_of_one_model_is_that_model(
    base: Path, tune: Make, tmp_path: Path, rows: int, method: str
) -> None:
    special = ["<tool>", "<|im_start|>", "<|im_end|>"]
    a = tune("a", special, rows=rows)
    _save_tokenizer(base, ["<own>"])
    chain = method if method == "average" else sm.Ties(k=100)
    sm.merge(base, [a], chain, output=tmp_path / "out", tokenizer="union")
    tokens = [*special, "w0", "w59", "<unk>"]
    theirs, ours = (_logits(folder, TEXT, tokens) for folder in (a, tmp_path / "out"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


_BERT = BertConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
)
_T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
_GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
_SQUARE = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
)


@pytest.mark.parametrize(
    "made",
    [
        lambda: BertForMaskedLM(_BERT),  # with a bias for each token, and as many positions
        lambda: GPT2LMHeadModel(GPT2Config(**_GPT)),
        lambda: GPTJForCausalLM(GPTJConfig(**_GPT, rotary_dim=4)),  # with a head of its own
        lambda: T5ForConditionalGeneration(T5Config(**_T5)),
        lambda: T5ForConditionalGeneration(T5Config(**_T5, tie_word_embeddings=False)),
        lambda: LlamaForCausalLM(_SQUARE),  # all matrices have as many rows as there are tokens
    ],
    ids=["bert", "gpt2", "gptj", "t5", "untied t5", "square llama"],
)
def test_a_union_knows_the_tables_of_architectures(
    tmp_path: Path, made: Callable[[], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    model = made().eval()
    model.save_pretrained(tmp_path / "base")
    _save_tokenizer(tmp_path / "base", ["<own>"])
    model.resize_token_embeddings(70)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "a")
    special = ["<1>", "<2>", "<3>", "<4>"]
    _save_tokenizer(tmp_path / "a", special)
    out = tmp_path / "out"
    sm.merge(tmp_path / "base", [tmp_path / "a"], "average", output=out, tokenizer="union")

    def logits(folder: Path, of: PreTrainedModel) -> torch.Tensor:
        ids = _ids(folder)
        text = torch.tensor([[ids[token] for token in ("w1", "<2>", "w5", "<4>", "<1>")]])
        more = {"decoder_input_ids": text} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            found: torch.Tensor = of(input_ids=text, **more).logits[0]
        return found[:, [ids[token] for token in (*special, "w0", "w59")]]

    merged = type(model).from_pretrained(out).eval()
    assert merged.config.vocab_size == 66
    torch.testing.assert_close(
        logits(out, merged), logits(tmp_path / "a", model), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["embeddings", "both ends", "saved", "saved and grown"])
def test_a_union_with_an_adapter_is_its_model(base: Path, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind == "saved and grown":
        model.resize_token_embeddings(70)
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    if kind.startswith("saved"):
        options["modules_to_save"] = ["embed_tokens", "lm_head"]
    else:
        ends = ["embed_tokens"] if kind == "embeddings" else ["embed_tokens", "lm_head"]
        options["target_modules"] = ["q_proj", *ends]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    special = ["<tool>", "<|im_start|>", "<|im_end|>"]
    _save_tokenizer(adapter, special)
    _save_tokenizer(base, ["<own>"])
    sm.merge(base, [adapter], "average", output=tmp_path / "out", tokenizer="union")
    tokens = [*special, "w0", "w59"]
    theirs = _logits(adapter, TEXT, tokens, adapted)
    torch.testing.assert_close(_logits(tmp_path / "out", TEXT, tokens), theirs, atol=1e-5, rtol=0)


def test_an_adapter_without_tables_has_the_bases_rows_for_its_tokens(
    base: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    _save_tokenizer(tmp_path / "adapter", ["<a>", "<b>", "<c>", "<d>"])
    sm.merge(base, [tmp_path / "adapter"], "average", output=tmp_path / "out", tokenizer="union")
    for name in TABLES:
        made, ours = _weights(tmp_path / "out")[name], _weights(base)[name]
        assert torch.equal(made[:64], ours)
        torch.testing.assert_close(made[64], ours.mean(0))  # <d> has no row anywhere


def test_a_metric_of_the_base_serves_a_union_too(
    base: Path, tune: Make, make_metric: MakeMetric, tmp_path: Path
) -> None:
    a, b = tune("a", ["<x>"]), tune("b", ["<1>", "<2>", "<3>", "<4>"], seed=2, rows=66)
    out = tmp_path / "out"
    metric = make_metric(base=base)
    report = sm.merge(base, [a, b], "tsv_m", output=out, metric=metric, tokenizer="union").report
    assert report.content["metric"]["use"] == "whitened inputs"
    assert torch.equal(_weights(out)[TABLES[0]][_ids(out)["<4>"]], _weights(b)[TABLES[0]][64])
    assert sm.verify(out, repeat="all").is_right


def test_a_union_of_tied_tables_stays_tied(base: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(66)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    a = tmp_path / "a"
    model.save_pretrained(a)
    special = ["<tool>", "<|im_start|>", "<|im_end|>", "<x>", "<y>"]
    _save_tokenizer(a, special)
    out = tmp_path / "out"
    sm.merge(base, [a], "average", output=out, tokenizer="union")
    assert "lm_head.weight" not in _weights(out)
    theirs, ours = (_logits(folder, TEXT, special) for folder in (a, out))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_grown_adapter_of_a_tied_base_as_published_stays_tied(base: Path, tmp_path: Path) -> None:
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    torch.manual_seed(5)
    LlamaForCausalLM(config).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(67)
    settings = LoraConfig(
        r=3,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    peft = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    a = tmp_path / "a"
    peft.save_pretrained(a)
    special = ["<tool>", "<|im_start|>", "<|im_end|>", "<x>", "<y>"]
    _save_tokenizer(a, special)
    out = tmp_path / "out"
    sm.merge(base, [a], "average", output=out, tokenizer="union")
    assert "lm_head.weight" not in _weights(out)
    folded = peft.merge_and_unload()
    theirs, ours = _logits(a, TEXT, special, folded), _logits(out, TEXT, special)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [62, 80])
def test_rows_that_only_pad_a_table_are_left_out(
    base: Path, tune: Make, tmp_path: Path, rows: int
) -> None:
    a = tune("a", rows=rows)
    out = tmp_path / "out"
    result = sm.merge(base, [a], "average", output=out)
    for name in TABLES:
        made, ours, theirs = (_weights(folder)[name] for folder in (out, base, a))
        common = min(rows, 64)
        assert torch.equal(made[:common], theirs[:common])
        assert torch.equal(made[common:], ours[common:])
    assert f"a has {rows} rows of tokens, the base 64" in _notes(result)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 64


def test_rows_are_merged_by_token_where_a_tokenizer_has_other_ids(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    _save_tokenizer(base, ["<a>", "<b>"])
    a = tune("a", ["<b>", "<a>"])
    result = sm.merge(base, [a], "average", output=tmp_path / "out")
    made, theirs = _weights(tmp_path / "out"), _weights(a)
    for name in TABLES:
        torch.testing.assert_close(made[name][[61, 62]], theirs[name][[62, 61]])
    assert "gives other ids than the base's to 2 tokens: " in _notes(result)


def test_refuses_longer_tables_whose_tokens_are_lost_or_not_known(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    a = tune("a", ["<1>", "<2>", "<3>", "<4>"], rows=65)
    with pytest.raises(UsageError, match=r"65 rows of tokens.*adds <1>, .*--tokenizer union"):
        sm.merge(base, [a], "average", output=tmp_path / "out")
    (a / "tokenizer.json").unlink()
    (a / "tokenizer_config.json").unlink()
    for tokenizer in ("base", "union"):
        with pytest.raises(UsageError, match=r"65 rows of tokens.*tokenizer\.json"):
            sm.merge(base, [a], "average", output=tmp_path / "out", tokenizer=tokenizer)


def test_pieces_of_sentencepiece_that_differ_tell_no_rows(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    a = tune("a", rows=70)
    for folder in (base, a):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    sm.merge(base, [a], "average", output=tmp_path / "same")
    (a / "tokenizer.model").write_bytes(b"others")
    with pytest.raises(UsageError, match=r"cannot be told, as not both folders have"):
        sm.merge(base, [a], "average", output=tmp_path / "out")


def test_a_merge_of_the_common_part_leaves_tables_that_do_not_fit(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    a = tune("a", ["<1>", "<2>", "<3>", "<4>"], rows=65)
    sources = {"base": str(base), "models": [str(a)], "method": "average", "common": True}
    result = run(make_plan(make_recipe(sources), tmp_path / "out"), Threads())
    made, ours, theirs = (_weights(folder) for folder in (tmp_path / "out", base, a))
    assert "a: its tables of 65 rows of tokens are left out" in _notes(result)
    for name in TABLES:
        assert torch.equal(made[name], ours[name])
    torch.testing.assert_close(made["model.norm.weight"], theirs["model.norm.weight"])


def test_refuses_a_union_of_other_vocabularies(base: Path, tune: Make, tmp_path: Path) -> None:
    a = tune("a", words=62)
    with pytest.raises(UsageError, match=r"The tokenizer of a has another vocabulary.*w60"):
        sm.merge(base, [a], "average", output=tmp_path / "out", tokenizer="union")
    with pytest.raises(UsageError, match="another vocabulary"):
        sm.merge(base, [a], "average", output=tmp_path / "out", tokenizer="a")
    (a / "tokenizer.json").write_text("{")
    with pytest.raises(StarmergeError, match=r"tokenizer\.json is not JSON"):
        sm.merge(base, [a], "average", output=tmp_path / "out", tokenizer="union")
    (base / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"base has no tokenizer\.json"):
        sm.merge(base, [a], "average", output=tmp_path / "out", tokenizer="union")
    assert not (tmp_path / "out").exists()


def test_the_output_has_the_tokenizer_of_a_model_and_its_ids(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    _save_tokenizer(base, ["</s>", "<own>"])
    edit_json(base / "config.json", eos_token_id=61, pad_token_id=62, bos_token_id=1)
    generation = {"eos_token_id": [61, 2], "bos_token_id": 1, "suppress_tokens": [62, 3]}
    generation |= {"forced_token_ids": [[1, 62]]}  # pairs of a place and an id stay as they are
    (base / "generation_config.json").write_text(json.dumps(generation))
    (base / "merges.txt").write_text("of the base")
    a = tune("a", ["</s>"], rows=72, eos_token="<|im_end|>", template="{{ messages }}")
    b = tune("b", ["</s>", "<own>", "<x>"], seed=2)
    assert (_ids(a)["<|im_end|>"], _ids(a)["</s>"]) == (61, 62)
    out = tmp_path / "out"
    result = sm.merge(base, [a, b], "average", output=out, tokenizer="a")
    assert _ids(out) == _ids(a)
    config = json.loads((out / "config.json").read_text())
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 61, None]
    assert config["vocab_size"] == 72
    made_generation = json.loads((out / "generation_config.json").read_text())
    assert made_generation["eos_token_id"] == [61, 62, 2]  # <|im_end|> of the tokenizer, and </s>
    assert (made_generation["bos_token_id"], made_generation["suppress_tokens"]) == (1, [3])
    assert made_generation["forced_token_ids"] == [[1, 62]]
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }}"
    assert not (out / "merges.txt").exists()
    for name in TABLES:
        made, first, second = (_weights(f)[name] for f in (out, a, b))
        torch.testing.assert_close(made[62], (first[62] + second[61]) / 2)  # </s>
        assert torch.equal(made[61], first[61])  # <|im_end|>, new
    assert "lacks <own>, a token of the base's, whose rows" in _notes(result)
    assert "The tokenizer of b has tokens that the output's lacks: <x>" in _notes(result)


def test_a_tokenizer_of_a_folder_may_have_tokens_that_no_model_has(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    _save_tokenizer(tmp_path / "mine", ["<|im_start|>", "<1>", "<2>", "<3>"])
    a = tune("a", ["<|im_start|>"])
    out = tmp_path / "out"
    result = sm.merge(base, [a], "average", output=out, tokenizer=tmp_path / "mine")
    assert "No model has the tokenizer's tokens <1>, <2>, <3>" in _notes(result)
    for name in TABLES:
        made, ours, theirs = (_weights(f)[name] for f in (out, base, a))
        assert torch.equal(made[61], theirs[61])
        assert torch.equal(made[:61], theirs[:61])
        torch.testing.assert_close(made[62:], ours.mean(0).expand(3, -1))
    assert _ids(out) == _ids(tmp_path / "mine")
    assert sm.verify(out, repeat="all").is_right
    (tmp_path / "mine/tokenizer.json").write_text("{}")
    assert "changed" in sm.verify(out).inputs.values()


@pytest.mark.parametrize("where", ["model", "file", "folder", "text"])
def test_the_output_has_the_chat_template_that_is_chosen(
    base: Path, tune: Make, tmp_path: Path, where: str
) -> None:
    edit_json(base / "tokenizer_config.json", chat_template="old")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/rag.jinja").write_text("old rag")
    a = tune("a", template="{{ messages }} of a")
    (tmp_path / "mine.jinja").write_text("{{ messages }} of a")
    chosen = {
        "model": "a",
        "file": str(tmp_path / "mine.jinja"),
        "folder": str(a),
        "text": "{{ messages }} of a",
    }[where]
    out = tmp_path / "out"
    result = sm.merge(base, [a], "average", output=out, chat_template=chosen)
    assert AutoTokenizer.from_pretrained(out).chat_template == "{{ messages }} of a"
    assert result.report.content["notes"] == []
    assert not (out / "additional_chat_templates").exists()
    assert sm.verify(out).is_right


def test_several_chat_templates_are_taken_together(base: Path, tune: Make, tmp_path: Path) -> None:
    a = tune("a", template="default of a")
    (a / "additional_chat_templates").mkdir()
    (a / "additional_chat_templates/rag.jinja").write_text("rag of a")
    out = tmp_path / "out"
    sm.merge(base, [a], "average", output=out, tokenizer="union", chat_template="a")
    wanted = {"default": "default of a", "rag": "rag of a"}
    assert AutoTokenizer.from_pretrained(out).chat_template == wanted
    sm.merge(base, [a], "average", output=tmp_path / "b", tokenizer="a")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == wanted


def test_refuses_a_chat_template_whose_name_leaves_the_folder(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    a = tune("a")
    templates = [{"name": "../../x", "template": "{{ messages }}"}]
    edit_json(a / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(StarmergeError, match=r"'\.\./\.\./x', which cannot be the name"):
        sm.merge(base, [a], "average", output=tmp_path / "out", chat_template="a")


def test_files_of_slow_tokenizers_are_compared_as_far_as_they_tell(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    """A SentencePiece model is no JSON; added tokens stand beside it."""
    a = tune("a")
    for folder in (base, a):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    b = tune("b", seed=2)
    (a / "added_tokens.json").write_text('{"<x>": 61}')
    assert sm.merge(base, [a, b], "average", output=tmp_path / "1").report.content["notes"] == []
    (base / "added_tokens.json").write_text('{"<own>": 61}')
    notes = _notes(sm.merge(base, [a, b], "average", output=tmp_path / "2"))
    assert "The base's tokenizer lacks a token of a (<x>)." in notes


@pytest.mark.parametrize(
    ("file", "content"), [("vocab.json", '{"w0": 0, "w1": 1}'), ("vocab.txt", "w0\nw1\n")]
)
def test_a_slow_tokenizer_that_lists_its_tokens_lacks_others(
    base: Path, tune: Make, tmp_path: Path, file: str, content: str
) -> None:
    a = tune("a")
    for folder in (base, a):
        (folder / "tokenizer.json").unlink()
        (folder / file).write_text(content)
    assert sm.merge(base, [a], "average", output=tmp_path / "1").report.content["notes"] == []
    (a / "added_tokens.json").write_text('{"w1": 1, "<x>": 61}')
    notes = _notes(sm.merge(base, [a], "average", output=tmp_path / "2"))
    assert "The base's tokenizer lacks a token of a (<x>)." in notes


def test_the_bases_chat_template_stays_with_a_models_tokenizer(
    base: Path, tune: Make, tmp_path: Path
) -> None:
    _save_tokenizer(base, template="of the base")
    a = tune("a", ["<x>"], template="of a")
    sm.merge(base, [a], "average", output=tmp_path / "o", tokenizer="a", chat_template="base")
    assert AutoTokenizer.from_pretrained(tmp_path / "o").chat_template == "of the base"


def test_refuses_choices_that_are_not_there(base: Path, tune: Make, tmp_path: Path) -> None:
    a = tune("a")
    for options, message in (
        ({"chat_template": "a"}, "has no chat template"),
        (
            {"chat_template": "nobody"},
            r"chat_template 'nobody' is neither base nor a model .*\(a\)",
        ),
        ({"tokenizer": "nobody"}, r"tokenizer 'nobody' is neither base nor a model .*\(a\)"),
        ({"tokenizer": "union", "output_kind": "adapter", "rank": 2}, "has neither"),
    ):
        with pytest.raises(UsageError, match=message):
            sm.merge(base, [a], "average", output=tmp_path / "out", **options)


def test_a_recipe_holds_the_choices(base: Path, tune: Make, tmp_path: Path) -> None:
    tune("a", ["<x>"])
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    content = {
        "base": "base",
        "models": ["a"],
        "method": "average",
        "tokenizer": "union",
        "chat_template": "mine.jinja",
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.tokenizer, recipe.chat_template) == ("union", str(tmp_path / "mine.jinja"))
    write_recipe(recipe, tmp_path / "again.yaml")
    assert "chat_template: mine.jinja" in (tmp_path / "again.yaml").read_text()
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_union_of_real_tokenizers_encodes_as_each(tmp_path: Path) -> None:
    """SmolLM2's byte-level BPE, with tokens that transformers adds."""
    base, real = tmp_path / "base", prepared_base()
    tokenizer = AutoTokenizer.from_pretrained(real)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    folders, grown = [], []
    for name, tokens in (("a", ["<tool>", "naïveté"]), ("b", ["<|end of turn|>", "<tool>"])):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer) + 16, mean_resizing=False)
        own = AutoTokenizer.from_pretrained(real)
        own.add_tokens(tokens, special_tokens=name == "b")
        model.save_pretrained(tmp_path / name)
        own.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
        grown.append(own)
    sm.merge(base, folders, "average", output=tmp_path / "out", tokenizer="union")
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(made) == len(tokenizer) + 3
    for text in ("Hello, naïveté!  <tool>\n<|im_start|>", "x<|end of turn|>y <tool>"):
        for own in grown:
            shared = [t for t in own.tokenize(text) if t not in ("naïveté", "<|end of turn|>")]
            assert set(shared) - set(made.get_vocab()) == set()
    assert made.tokenize("x<|end of turn|>y <tool> naïveté") == [
        *("x", "<|end of turn|>", "y", "Ġ", "<tool>", "Ġ", "naïveté"),
    ]
    text = "What is 2 + 2?\n\n\tnaïve café 東京 <|im_end|>"
    assert made(text).input_ids == tokenizer(text).input_ids
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
