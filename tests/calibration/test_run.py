"""Calibration, from a base to a metric file, against hooks of our own and float64 NumPy."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from starmerge_models import Calibrated, Metric, StarmergeError, UsageError, calibrate, open_metric
from starmerge_models.calibration import moments, text
from starmerge_models.calibration.text import Reading, TextGenerator
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.source import resolve
from starmerge_models.evaluation.models.loading import load_text_model
from tests.calibration.tiny import START, store, texts
from tests.conftest import edit_json
from tests.oracles import moments as oracle

_LENGTHS = [9, 4, 30, 7, 12, 1, 22]
"""Of texts: all different, so that no two are read at once."""


def _inputs(model: Any, readings: Sequence[Reading]) -> dict[str, NDArray[np.float64]]:
    """Have a model read sequences one by one; return what each linear module was given."""
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen[f"{name}.weight"].append(given[0].detach().clone())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    with torch.no_grad():
        for reading in readings:
            given = {"input_ids": torch.tensor([reading.ids])}
            if reading.decoder:
                given["decoder_input_ids"] = torch.tensor([reading.decoder])
            model(**given)
    for hook in hooks:
        hook.remove()
    return {
        name: np.concatenate([x.reshape(-1, x.shape[-1]).double().numpy() for x in inputs])
        for name, inputs in seen.items()
    }


def _readings(folder: Path, *, seed: int = 0, length: int = 80) -> tuple[Any, TextGenerator]:
    model, tokenizer = load_text_model(folder, device="cpu")
    return model, TextGenerator(model, tokenizer, seed=seed, length=length)


def _write(file: Path, lines: list[str]) -> Path:
    file.write_text("\n".join(lines) + "\n")
    return file


def _nothing(_: int) -> None:
    pass


def _content(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        content: dict[str, Any] = json.loads(opened.metadata()["starmerge_metric"])
    return content


def _assert_moments(
    metric: Metric, inputs: dict[str, NDArray[np.float64]], tied: set[str], task: str | None = None
) -> None:
    """All modules but the tied ones have the moments of what they were given."""
    for name, rows in inputs.items():
        assert metric.has(name, task) == (name not in tied), name
        if name in tied:
            continue
        moment = metric.moment(name, task)
        assert moment.tokens == len(rows), name
        assert moment.root.dtype == torch.float32
        root = moment.root.double().numpy()
        assert root.shape[0] <= min(rows.shape)
        expected = oracle.second_moment(rows)
        assert (np.abs(root.T @ root - expected) <= oracle.rounding(expected)).all(), name


@pytest.mark.parametrize(
    ("kind", "tied", "shared"),
    [
        ("llama", set(), ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("llama", set(), ["mlp.gate_proj", "mlp.up_proj"]),
        ("gpt2", {"lm_head.weight"}, []),
        ("untied gpt2", set(), []),
        ("t5", {"lm_head.weight"}, ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v"]),
        ("bart", set(), []),
        ("bert", {"cls.predictions.decoder.weight"}, ["self.query", "self.key", "self.value"]),
        ("bert classifier", set(), ["self.query", "self.key", "self.value"]),
        ("albert", {"predictions.decoder.weight"}, []),
        ("mamba", {"lm_head.weight"}, []),
    ],
)
def test_moments_are_those_of_what_each_module_was_given(
    kind: str, tied: set[str], shared: list[str], tmp_path: Path
) -> None:
    folder = store(kind, tmp_path / "base")
    lines = texts(_LENGTHS)
    file = tmp_path / "m.safetensors"
    result = calibrate(folder, file, texts=_write(tmp_path / "t.txt", lines), length=40)
    model, writer = _readings(folder, length=40)
    readings = writer.answered(writer.texts(lines, 40), _nothing)
    inputs = _inputs(model, readings)
    assert bool(readings[0].decoder) == (kind in ("t5", "bart"))
    metric = open_metric(file)
    _assert_moments(metric, inputs, tied)
    assert result.tensors == len(inputs) - len(tied)
    assert {metric.side(name) for name in inputs if name not in tied} == (
        {"rows", "columns"}
        if kind == "untied gpt2"
        else {"rows"}
        if kind == "gpt2"
        else {"columns"}
    )
    groups = [entry["tensors"] for entry in _content(file)["entries"]]
    assert not shared or any(
        len(group) == len(shared)
        and all(f".{end}.weight" in name for end, name in zip(shared, group, strict=True))
        for group in groups
    )
    if kind == "t5":  # what the encoder gives is read by every layer of the decoder
        assert sum(".EncDecAttention.k." in name for name in max(groups, key=len)) == 2
    metric.check_base(open_base(resolve(folder)))


def test_of_few_tokens_the_inputs_themselves_are_kept(tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    lines = texts([9, 4])
    calibrate(folder, tmp_path / "m.safetensors", texts=_write(tmp_path / "t.txt", lines))
    model, writer = _readings(folder)
    metric = open_metric(tmp_path / "m.safetensors")
    for name, rows in _inputs(model, writer.texts(lines, None)).items():
        root = metric.moment(name).root
        assert root.shape == rows.shape
        assert np.abs(root.numpy() - rows / 13**0.5).max() <= 2.0**-22 * np.abs(rows).max()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert", "mixtral"])
def test_how_much_is_read_at_once_changes_nothing_but_rounding(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the same, token by token, and the moments up to float32's rounding."""
    folder = store(kind, tmp_path / "base")
    files = []
    for at_once in (1, 60, 10_000):
        monkeypatch.setattr(moments, "READ_BATCH_TOKENS", at_once)
        monkeypatch.setattr(text, "READ_BATCH_TOKENS", at_once)
        monkeypatch.setattr(text, "GENERATE_BATCH_TOKENS", at_once)
        files.append(tmp_path / f"{at_once}.safetensors")
        calibrate(folder, files[-1], sequences=7, length=12, seed=5)
    contents = [_content(file) for file in files]
    assert contents[0]["entries"] == contents[1]["entries"] == contents[2]["entries"]
    metrics = [open_metric(file) for file in files]
    for entry in contents[0]["entries"]:
        first, *others = (metric.moment(entry["tensors"][0]).root.double() for metric in metrics)
        diagonal = first.square().sum(0).sqrt()
        for other in others:
            apart = (other.T @ other - first.T @ first).abs()
            # A hundred roundings of a float32 forward pass.
            assert (apart <= 200 * 2.0**-24 * torch.outer(diagonal, diagonal)).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "bert", "mamba"])
def test_the_base_writes_the_same_text_again_and_another_by_another_seed(
    kind: str, tmp_path: Path
) -> None:
    folder = store(kind, tmp_path / "base")
    made = {}
    for name, seed, memory in (("a", 3, None), ("b", 3, "20kB"), ("c", 4, None)):
        lines: list[str] = []
        result = calibrate(
            folder,
            tmp_path / name,
            sequences=6,
            length=16,
            seed=seed,
            memory=memory,
            announce=lines.append,
        )
        made[name] = (tmp_path / name).read_bytes()
        passes = re.search(r"passes over the text: (\d+)", lines[0])
        assert passes is not None
        assert (int(passes[1]) > 1) == (memory is not None)
        most = re.search(r"File: ([\d.]+) MB at most", lines[0])
        assert most is not None
        # The header is not counted.
        assert result.nbytes <= float(most[1]) * 1e6 + 5e4 + 20_000
    assert made["a"] == made["b"]
    assert made["a"] != made["c"]
    # And the moments are those of what it wrote.
    model, writer = _readings(folder, seed=3, length=16)
    readings = writer.own(6, _nothing)
    assert len({reading.ids for reading in readings}) > 1
    metric = open_metric(tmp_path / "a")
    inputs = _inputs(model, readings)
    name = next(name for name in inputs if metric.has(name))
    expected = oracle.second_moment(inputs[name])
    root = metric.moment(name).root.double().numpy()
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(root.T @ root - expected) <= 200 * 2.0**-24 * scale).all()
    assert metric.made_from["kind"] == "self-written"
    assert metric.made_from["seed"] == 3


def test_moments_are_kept_for_each_task_beside_the_common_one(tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    words = texts([3] * 60, seed=9)
    rows = {
        "bare": [{"input": line} for line in words[:5]],
        "labelled": [{"input": line, "label": "w7"} for line in words],
    }
    files = {}
    for name, content in rows.items():
        lines = [json.dumps(row) for row in content]
        files[name] = _write(tmp_path / f"{name}.jsonl", lines)
    task = tmp_path / "own.yaml"
    train = _write(tmp_path / "train.jsonl", [json.dumps({"q": line}) for line in words[:4]])
    test = _write(tmp_path / "test.jsonl", [json.dumps({"q": "w9"})])
    task.write_text(
        f"source: {{file: {test.name}, train_file: {train.name}, key: q}}\nprompt: 'w5 {{q}}'\n"
    )
    file = tmp_path / "m.safetensors"
    prompts = {**files, "demo/past": files["bare"], "own": task}
    result = calibrate(
        folder,
        file,
        texts=_write(tmp_path / "t.txt", texts(_LENGTHS)),
        prompts=prompts,
        rows=50,
    )
    metric = open_metric(file)
    assert result.tasks == metric.tasks == ("bare", "labelled", "past", "own")
    model, writer = _readings(folder)
    _assert_moments(metric, _inputs(model, writer.texts(texts(_LENGTHS), None)), set())
    name = "model.layers.1.mlp.down_proj.weight"
    # A prompt ends with a line break, which is no token here.
    assert metric.moment(name, "bare").tokens == 5 * 3
    assert metric.moment(name, "own").tokens == 4 * 4
    # Of rows with labels, a fifth is for testing.
    assert 30 * 3 < metric.moment(name, "labelled").tokens < 60 * 3
    # The instruction of the registry's task stands before each.
    assert metric.moment(name, "past").tokens > 5 * 6
    bare = _inputs(model, writer.texts(words[:5], None))[name]
    expected = oracle.second_moment(bare)
    root = metric.moment(name, "bare").root.double().numpy()
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(root.T @ root - expected) <= 200 * 2.0**-24 * scale).all()
    recorded = metric.made_from["prompts"]
    assert recorded["bare"]["rows"] == 5
    assert recorded["bare"]["source"] == str(files["bare"])


def test_labels_change_nothing(tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    line = _write(tmp_path / "t.txt", ["w5 w6"])
    made = []
    for label in ("w7", "w8"):
        rows = [json.dumps({"input": words, "label": label}) for words in texts([3] * 20)]
        _write(tmp_path / "rows.jsonl", rows)
        file = tmp_path / f"{label}.safetensors"
        calibrate(folder, file, texts=line, prompts={"a": tmp_path / "rows.jsonl"}, rows=4)
        assert open_metric(file).moment("lm_head.weight", "a").tokens == 4 * 3
        made.append(file.read_bytes())
    assert made[0] == made[1]


_CHAT = (
    "{{ bos_token }} w10 w11 {% for m in messages %}w12 {{ m['content'] }} w13 {% endfor %}"
    "{% if add_generation_prompt %}w14{% endif %}"
)


def test_a_model_with_a_chat_template_begins_as_a_user_would(tmp_path: Path) -> None:
    _, writer = _readings(store("llama", tmp_path / "chat", chat=_CHAT), length=4)
    assert writer.beginning() == [2, 10, 11, 12]
    assert all(reading.ids[:4] == (2, 10, 11, 12) for reading in writer.own(3, _nothing))
    assert all(len(reading.ids) == 8 for reading in writer.own(3, _nothing))
    _, writer = _readings(store("llama", tmp_path / "plain"), length=4)
    assert writer.beginning() == [2]


def _drawn(logits: torch.Tensor, number: float) -> int:
    """Return a token of a distribution, by inversion, in float64 NumPy."""
    values = np.exp(logits.double().numpy() - logits.double().numpy().max())
    return int(np.flatnonzero(np.cumsum(values / values.sum()) > number)[0])


def test_tokens_are_drawn_from_the_models_own_distribution(tmp_path: Path) -> None:
    """Step by step, without a cache; the random numbers are those of the documented generator."""
    model, writer = _readings(store("llama", tmp_path), seed=11, length=10)
    generator = torch.Generator().manual_seed(11)
    numbers = torch.rand(1, 20, 10, generator=generator, dtype=torch.float64)[0]
    wrong = 0
    for row, reading in enumerate(writer.own(20, _nothing)):
        for step in range(10):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([reading.ids[: step + 1]])).logits[0, -1]
            wrong += _drawn(logits, float(numbers[row, step])) != reading.ids[step + 1]
    # A number within float32's rounding of a border may fall on its other side.
    assert wrong <= 1


def test_a_decoder_writes_up_to_its_end(tmp_path: Path) -> None:
    _, writer = _readings(store("t5", tmp_path), seed=2, length=30)
    readings = writer.own(20, _nothing)
    assert all(reading.decoder[0] == START for reading in readings)
    assert all(1 not in reading.decoder for reading in readings)
    assert len({len(reading.decoder) for reading in readings}) > 1
    assert all(reading.ids for reading in readings)


def test_an_encoder_fills_all_masks_and_no_special_token(tmp_path: Path) -> None:
    _, writer = _readings(store("bert", tmp_path), seed=2, length=25)
    for reading in writer.own(5, _nothing):
        assert (reading.ids[0], reading.ids[-1]) == (2, 1)
        assert len(reading.ids) == 27
        assert min(reading.ids[1:-1]) >= 5


class _Tangled(torch.nn.Module):
    """Two modules that read one tensor, but not if it is long; one on a tensor that is changed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(9, 4)
        self.a, self.b, self.c, self.d, self.never = (
            torch.nn.Linear(4, 4, bias=False) for _ in range(5)
        )

    device = torch.device("cpu")

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        y = self.a(x) + (self.b(2 * x) if input_ids.shape[1] > 3 else self.b(x))
        z = x.clone()
        first = self.c(z)
        z += 1
        return y + first + self.d(input=z)


def test_modules_that_do_not_always_read_the_same_are_told_apart() -> None:
    from starmerge_models.calibration.modules import Linear
    from starmerge_models.calibration.moments import collect, find_groups

    torch.manual_seed(0)
    model = _Tangled()
    linears = [
        Linear(module, name, "columns", 4)
        for name, module in model.named_children()
        if name != "embed"
    ]
    groups, calls = find_groups(model, linears, Reading((1, 2)))
    assert [group.tensors for group in groups] == [["a", "b"], ["c"], ["d"], ["never"]]
    assert calls == 1
    short = [Reading((1, 2)), Reading((3, 4))]
    done, again = collect(model, groups, short, _nothing)
    assert [group.tensors for group, _ in done] == [["a", "b"], ["c"], ["d"]]
    assert not again
    done, again = collect(model, groups, [*short, Reading((1, 2, 3, 4, 5))], _nothing)
    assert [group.tensors for group, _ in done] == [["c"], ["d"]]
    assert [group.tensors for group in again] == [["a"], ["b"]]
    parts, again = collect(model, again, [*short, Reading((1, 2, 3, 4, 5))], _nothing)
    assert not again
    x = model.embed.weight.detach().double().numpy()
    two, five = x[[1, 2, 3, 4]], x[[1, 2, 3, 4, 5]]
    expected = {
        "a": np.concatenate([two, five]),
        "b": np.concatenate([two, 2 * five]),
        "c": np.concatenate([two, five]),
        "d": np.concatenate([two, five]) + 1,
    }
    for group, moment in [*done, *parts]:
        (name,) = group.tensors
        root = moment.root().double().numpy()
        wanted = oracle.second_moment(expected[name])
        tolerance = oracle.rounding(wanted) + (1e-6 if name == "d" else 0)
        assert (np.abs(root.T @ root - wanted) <= tolerance).all(), name


def test_what_has_no_moment_is_named(tmp_path: Path) -> None:
    words = _write(tmp_path / "t.txt", texts([5]))
    notes = calibrate(store("mixtral", tmp_path / "a"), tmp_path / "a.st", texts=words).notes
    assert any(re.search(r"experts\.\S+ and 3 more: of several matrices in one", n) for n in notes)
    notes = calibrate(store("mamba", tmp_path / "b"), tmp_path / "b.st", texts=words).notes
    assert "backbone.layers.0.mixer.conv1d.weight and 1 more: convolutions" in " ".join(notes)
    assert "lm_head.weight: tied to another module's" in notes
    # Queries of tokens with global attention, of which there are none.
    result = calibrate(store("longformer bert", tmp_path / "c"), tmp_path / "c.st", texts=words)
    never = "longformer.encoder.layer.0.attention.self.query_global.weight and 5 more"
    assert f"{never}: never reached by the text" in result.notes
    metric = open_metric(tmp_path / "c.st")
    assert not metric.has("longformer.encoder.layer.0.attention.self.query_global.weight")
    assert metric.has("longformer.encoder.layer.0.attention.self.query.weight")


def test_names_are_those_of_the_files(tmp_path: Path) -> None:
    """Weights that were saved from the inner model have other names than transformers' modules."""
    folder = store("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    result = calibrate(
        folder, tmp_path / "m", texts=_write(tmp_path / "t.txt", texts([5])), device="cpu"
    )
    metric = open_metric(tmp_path / "m")
    assert metric.has("layers.0.self_attn.q_proj.weight")
    assert metric.has("lm_head.weight")
    assert result.tensors == 15
    metric.check_base(open_base(resolve(folder)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_not_finite_names_the_module(value: float, tmp_path: Path) -> None:
    folder = store("llama", tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = _write(tmp_path / "t.txt", texts([5]))
    with pytest.raises(
        StarmergeError, match=r"input of model\.layers\.1\.mlp\.down_proj has a NaN"
    ):
        calibrate(folder, tmp_path / "m.safetensors", texts=file)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "t.txt"}


def test_texts_are_lines_or_rows_and_are_cut(tmp_path: Path) -> None:
    folder = store("gpt2", tmp_path / "base")
    lines = texts([30, 5, 8])
    name = "transformer.h.0.attn.c_attn.weight"
    rows = [json.dumps({"text": line, "more": 1}) for line in lines]
    made = []
    for file in (
        _write(tmp_path / "a.txt", [lines[0], "", "  ", *lines[1:]]),
        _write(tmp_path / "a.jsonl", rows),
    ):
        output = tmp_path / f"{file.suffix}.safetensors"
        calibrate(folder, output, texts=file, sequences=2, length=10)
        metric = open_metric(output)
        assert metric.moment(name).tokens == 10 + 5
        assert metric.made_from["file"] == file.name
        made.append(metric.moment(name).root)
    assert torch.equal(*made)


def test_an_existing_file_is_replaced_only_if_asked_for_and_a_metric(tmp_path: Path) -> None:
    folder = store("gpt2", tmp_path / "base")
    options: dict[str, Any] = {"texts": _write(tmp_path / "t.txt", texts([5]))}
    output = tmp_path / "m.safetensors"
    calibrate(folder, output, **options)
    with pytest.raises(UsageError, match="m.safetensors exists. Choose another file, or replace"):
        calibrate(folder, output, **options)
    assert isinstance(calibrate(folder, output, **options, overwrite=True), Calibrated)
    with pytest.raises(UsageError, match="is not a metric file and is not overwritten"):
        calibrate(folder, folder / "model.safetensors", **options, overwrite=True)


def _refusals(tmp_path: Path) -> dict[str, Callable[[], object]]:
    base = store("llama", tmp_path / "llama")
    line = _write(tmp_path / "t.txt", ["w5 w6"])
    rows = _write(tmp_path / "rows.jsonl", ['{"input": "w5"}', '{"other": "w5"}'])
    vit = tmp_path / "vit"
    transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    ).save_pretrained(vit)
    no_start = store("llama", tmp_path / "no-start")
    edit_json(no_start / "tokenizer_config.json", bos_token=None, eos_token=None)
    broken = _write(tmp_path / "broken.jsonl", ["{"])
    content = ["kind: image-classification", "source: {folder: images}"]
    images = _write(tmp_path / "images.yaml", content)

    def run(*, folder: Path = base, **options: Any) -> Callable[[], object]:
        return lambda: calibrate(folder, tmp_path / "out", **({"texts": line} | options))

    return {
        "is a model of images": run(folder=vit),
        "writes no text .* --texts FILE": run(
            folder=store("bert classifier", tmp_path / "c"), texts=None
        ),
        "neither a chat template nor a token that begins a text, .* --texts FILE": run(
            folder=no_start, texts=None
        ),
        "takes 64 tokens: 2 at the beginning and 80 more are too many. Lower --length": run(
            folder=store("bert", tmp_path / "bert"), texts=None
        ),
        "a T5Model, cannot read a text by itself: You must specify": run(
            folder=store("bare t5", tmp_path / "t5")
        ),
        "gone does not exist": run(folder=tmp_path / "gone"),
        "t.csv is neither .txt .* nor .jsonl": run(texts=tmp_path / "t.csv"),
        "gone.txt does not exist": run(texts=tmp_path / "gone.txt"),
        "empty.txt has no text": run(texts=_write(tmp_path / "empty.txt", ["", " "])),
        "rows.jsonl, row 1: there is no text under 'text'": run(texts=rows),
        "half.jsonl, line 1: not JSON .*half a character": run(
            texts=_write(tmp_path / "half.jsonl", ['{"text": "\\ud800"}'])
        ),
        "broken.jsonl, line 1: not JSON": run(texts=broken),
        "sequences is 0. Give a whole number": run(sequences=0),
        "length is -1": run(length=-1),
        "rows is 0": run(rows=0),
        "The dtype 'int4' is unknown": run(dtype="int4"),
        "memory is 'much'": run(memory="much"),
        "Device 'tpu' cannot be used": run(device="tpu"),
        "No task is called 'digit', .* Did you mean 'digits'": run(prompts={"a": "digit"}),
        "Task a, row rows.jsonl/2: there is no field 'input'": run(prompts={"a": rows}),
        "names no rows to train on .* --prompts own=rows.jsonl": run(
            prompts={
                "own": _write(tmp_path / "own.yaml", [f"source: {{file: {rows}}}", "prompt: x"])
            }
        ),
        "Prompts demo/past=past: the moments are given twice": run(
            prompts={"past": "past", "demo/past": "past"}
        ),
        "Prompts demo/=past: the moments have no name": run(prompts={"demo/": "past"}),
        "is a task of images, which has no prompts": run(prompts={"a": images}),
        "'mrpc' is the name of several tasks": run(prompts={"mrpc": rows}),
    }


def test_refusals_say_what_is_wrong_and_write_nothing(tmp_path: Path) -> None:
    for message, request in _refusals(tmp_path).items():
        with pytest.raises(UsageError, match=message):
            request()
    assert not any(path.name.startswith((".out", "out")) for path in tmp_path.iterdir())
