from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from starmerge_models.errors import StarmergeError, UsageError
from starmerge_models.evaluation.cache import Record
from starmerge_models.evaluation.models.loading import AdapterSwitch
from starmerge_models.evaluation.models.scorers import LocalModel
from starmerge_models.evaluation.prepared_tasks import PreparedTask, prepare
from starmerge_models.evaluation.scoring.metrics import Score
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks.lm_eval import HarnessTask, load_tasks
from tests.conftest import edit_json

KINDS = ["an animal", "a colour", "a number"]
QUESTIONS = [
    ("A dog is", KINDS, 0),
    ("Blue is", KINDS, 1),
    ("Seven is", KINDS, 2),
    ("A horse is", ["a country", "an animal", "a day"], 1),
    ("Monday is", ["a fruit", "a river", "a day"], 2),
    ("France, as all know, is", ["a country", "a tree", "a month"], 0),
]
SUMS = [
    ("1 + 2 = 3\n2 + 3 = 5\n1 + 1 =", "2"),
    ("1 + 2 = 3\n2 + 3 = 5\n3 + 4 =", "7"),
    ("2 + 2 =", "4"),
    ("Once upon a time there was", "10"),
]
MEAN = {"aggregation": "mean", "higher_is_better": True}
MARKS = """
def half_marks(doc, results):
    return {"marks": 1.0 if doc["answer"] in results[0] else 0.5}

def many_marks(doc, results):
    return {"marks": 7}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the harness's task files, and the data that they name."""
    folder = tmp_path_factory.mktemp("harness")
    choices = [{"question": q, "options": o, "answer": a} for q, o, a in QUESTIONS]
    sums = [{"question": q, "answer": a} for q, a in SUMS]
    for name, rows in {"choices": choices, "sums": sums}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "marks.py").write_text(MARKS)

    def write(name: str, data: str, **keys: Any) -> None:
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(folder / data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "tag": "of_ours",
        }
        text = yaml.safe_dump(task | keys)
        (folder / f"{name}.yaml").write_text(text.replace("'!function", "!function '"))

    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{options}}"}
    both = [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}]
    write("choices", "choices.jsonl", metric_list=both, **choice)
    places = {"doc_to_text": "{{answer}}", "doc_to_target": "right."}
    write("contexts", "choices.jsonl", **places, **choice)
    write("shots", "choices.jsonl", fewshot_split="test", num_fewshot=2, **choice)
    written = {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
    }
    first = {"function": "take_first"}
    number = {"function": "regex", "regex_pattern": "(\\d+)", "group_select": 0}
    filters = [{"name": "number", "filter": [number, first]}, {"name": "all", "filter": [first]}]
    exact = [{"metric": "exact_match", **MEAN}]
    write("sums", "sums.jsonl", metric_list=exact, filter_list=filters, **written)
    write("likely", "sums.jsonl", output_type="loglikelihood")
    marks = {"metric_list": [{"metric": "marks", **MEAN}], **written, "tag": "marked"}
    write("half", "sums.jsonl", process_results="!functionmarks.half_marks", **marks)
    write("many", "sums.jsonl", process_results="!functionmarks.many_marks", **marks)
    unusable = {"tag": "unusable"}
    write("blurry", "sums.jsonl", metric_list=[{"metric": "bleu"}], **written | unusable)
    write("unsafe", "sums.jsonl", unsafe_code=True, **written | unusable)
    write("missing", "nowhere.jsonl", **choice | unusable)
    return folder


@pytest.fixture(scope="module")
def smollm2_on_cpu(smollm2: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def shallow_on_cpu(shallow: Path) -> tuple[Any, Any]:
    """Return the first layers of the real model, in float32, so that batches round alike."""
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(shallow)


def ask_the_harness(folder: Path, tasks: list[str], **model: str) -> dict[str, Any]:
    """Return what the harness reports when it does everything itself, row by row."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        model="hf",
        model_args={"dtype": "float32", "device": "cpu", **model},
        tasks=tasks,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        batch_size=8,
        bootstrap_iters=0,
    )
    assert results is not None
    return dict(results["results"])


@pytest.fixture(scope="module")
def reported(folder: Path, smollm2: Path) -> dict[str, Any]:
    return ask_the_harness(folder, ["of_ours", "half"], pretrained=str(smollm2))


def scored(task: HarnessTask, model: Any, tokenizer: Any, **options: Any) -> Score:
    """Ask a model a task, and score what it answers."""
    return task.score(task.run(model, tokenizer, **options))


def load(folder: Path, name: str) -> HarnessTask:
    (task,) = load_tasks([f"lm-eval:{name}"], folder)
    return task


@pytest.mark.parametrize("name", ["choices", "contexts", "shots"])
def test_a_score_of_choices_is_the_accuracy_that_the_harness_reports(
    name: str, folder: Path, smollm2_on_cpu: tuple[Any, Any], reported: dict[str, Any]
) -> None:
    score = scored(load(folder, name), *smollm2_on_cpu)
    assert (score.metric, score.n, score.unparsed) == ("accuracy", len(QUESTIONS), 0)
    assert score.value == reported[name]["acc,none"]
    assert 0 < score.low < score.value < score.high < 1
    for row, (_, options, answer) in zip(score.predictions, QUESTIONS, strict=True):
        assert row.gold == options[answer]
        assert row.response in options
        assert row.credit == (row.response == row.gold)
    assert [row.id for row in score.predictions] == [f"test/{i}" for i in range(len(QUESTIONS))]


def test_what_is_written_is_read_by_the_first_filter(
    folder: Path, smollm2_on_cpu: tuple[Any, Any], reported: dict[str, Any]
) -> None:
    score = scored(load(folder, "sums"), *smollm2_on_cpu)
    assert score.metric == "accuracy"
    assert score.value == reported["sums"]["exact_match,number"] == 0.5
    assert score.unparsed == 0.25
    assert [row.gold for row in score.predictions] == [answer for _, answer in SUMS]
    for row in score.predictions:
        digits = "".join(c if c.isdigit() else " " for c in row.response).split()
        assert row.value == (digits[0] if digits else None)
        assert row.credit == (row.value == row.gold)


def test_a_task_that_begins_with_a_perplexity_is_scored_by_its_accuracy(
    folder: Path, smollm2_on_cpu: tuple[Any, Any], reported: dict[str, Any]
) -> None:
    score = scored(load(folder, "likely"), *smollm2_on_cpu)
    assert score.value == reported["likely"]["acc,none"]
    for row in score.predictions:
        assert row.credit == (row.response.strip() == row.gold)


def test_a_measure_of_its_own_keeps_its_name_and_is_the_mean_of_its_rows(
    folder: Path, smollm2_on_cpu: tuple[Any, Any], reported: dict[str, Any]
) -> None:
    score = scored(load(folder, "half"), *smollm2_on_cpu)
    assert score.metric == "marks"
    assert score.value == reported["half"]["marks,none"]
    assert {row.credit for row in score.predictions} == {0.5, 1.0}


def test_the_adapter_that_is_switched_on_is_asked(
    folder: Path, shallow: Path, shallow_adapters: dict[str, Path], tmp_path: Path
) -> None:
    task = load(folder, "choices")
    adapter = shutil.copytree(shallow_adapters["sentiment"], tmp_path / "sentiment")
    edit_json(adapter / "adapter_config.json", lora_alpha=5000)  # so that the answers change
    model = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
    switch = AdapterSwitch(model, {"sentiment": adapter})
    values = []
    for name in (None, "sentiment"):
        with switch.active(name) as active:
            score = scored(task, active, AutoTokenizer.from_pretrained(shallow))
            values.append(score.value)
    asked = [
        ask_the_harness(folder, ["choices"], pretrained=str(shallow), **options)
        for options in ({}, {"peft": str(adapter)})
    ]
    assert values == [answered["choices"]["acc,none"] for answered in asked]
    assert values[0] != values[1]


def test_few_shots_are_the_same_for_each_model_that_is_asked(
    folder: Path, shallow_on_cpu: tuple[Any, Any]
) -> None:
    task = load(folder, "shots")
    fingerprint = task.fingerprint(None)
    prompts = [request.args[0] for request in task.task.instances]
    assert all(prompt.count(" is") == 3 for prompt in prompts)
    scored(task, *shallow_on_cpu)
    assert [request.args[0] for request in task.task.instances] == prompts
    assert task.fingerprint(None) == load(folder, "shots").fingerprint(None) == fingerprint
    assert load(folder, "half").fingerprint(None) == load(folder, "half").fingerprint(None)
    assert len({fingerprint, task.fingerprint(3), load(folder, "choices").fingerprint(None)}) == 3


@pytest.mark.parametrize("name", ["choices", "sums"])
def test_scores_do_not_depend_on_the_batch_size(
    name: str, folder: Path, shallow_on_cpu: tuple[Any, Any]
) -> None:
    task = load(folder, name)
    assert scored(task, *shallow_on_cpu, batch_size=1) == scored(
        task, *shallow_on_cpu, batch_size=3
    )


def test_rows_are_the_first_ones(folder: Path, shallow_on_cpu: tuple[Any, Any]) -> None:
    task = load(folder, "likely")
    few = scored(task, *shallow_on_cpu, rows=2).predictions
    assert few == scored(task, *shallow_on_cpu).predictions[:2]


@pytest.mark.parametrize("name", ["likely", "choices"])
def test_rows_may_be_asked_part_by_part(
    name: str, folder: Path, shallow_on_cpu: tuple[Any, Any]
) -> None:
    whole = prepare(load(folder, name), Settings())
    model = LocalModel(*shallow_on_cpu)
    parts = [whole.part(0, 1), whole.part(1, 3), whole.part(3, 99)]
    assert [part.size for part in parts] == [1, 2, whole.size - 3]
    assert len({json.dumps(part.key_fields) for part in (whole, *parts)}) == 4

    def ask(task: PreparedTask) -> list[Record]:
        return task.run(model, None, lambda rows: None)

    assert [record for part in parts for record in ask(part)] == ask(whole)


@pytest.mark.parametrize(
    ("name", "contexts"),
    [("likely", {6: 3, 7: 2, 20: 2, 21: 0}), ("sums", {9: 4, 10: 3, 11: 2, 25: 2, 26: 0})],
)
def test_prompts_that_are_too_long_are_counted(
    name: str,
    contexts: dict[int, int],
    folder: Path,
    smollm2: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = LlamaForCausalLM(tiny(LlamaConfig, len(tokenizer))).eval()
    task = load(folder, name)
    for longest, too_long in contexts.items():
        model.config.max_position_embeddings = longest
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lm_eval"):
            assert scored(task, model, tokenizer, batch_size=1).shortened == too_long
        warned = [record for record in caplog.records if "runcat" in record.getMessage()]
        assert len(warned) == too_long


def test_a_model_with_an_encoder_is_asked(folder: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    sizes = {"d_kv": 8, "num_decoder_layers": 1, "n_positions": 6, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(tiny(T5Config, len(tokenizer), **sizes)).eval()
    choices = load(folder, "choices")
    assert scored(choices, model, tokenizer, batch_size=1) == scored(choices, model, tokenizer)
    for task, asked in ((choices, QUESTIONS), (load(folder, "sums"), SUMS)):
        score = scored(task, model, tokenizer)
        assert [row.shortened for row in score.predictions] == [
            len(tokenizer(row[0])["input_ids"]) > 6 for row in asked
        ]
        assert 0 < score.shortened < score.n


def test_a_model_of_nan_is_an_error(folder: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = LlamaForCausalLM(tiny(LlamaConfig, len(tokenizer)))
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(StarmergeError, match="row test/0: the model gives NaN"):
        scored(load(folder, "choices"), model.eval(), tokenizer)


def test_a_tag_stands_for_its_tasks_each_once(folder: Path) -> None:
    tasks = load_tasks(["lm-eval:sums", "lm-eval:of_ours"], folder)
    names = [task.name for task in tasks]
    assert names[0] == "lm-eval:sums"
    ours = ("choices", "contexts", "likely", "shots", "sums")
    assert sorted(names) == [f"lm-eval:{name}" for name in ours]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "lm-eval:missing cannot be loaded: .*nowhere.jsonl.* a folder of your own"),
        ("blurry", "lm-eval:blurry has no metric that is a mean .*it has bleu"),
        ("unsafe", "lm-eval:unsafe runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_be_scored_says_why(name: str, message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load(folder, name)


def test_a_row_that_earns_more_than_one_is_an_error(folder: Path, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = LlamaForCausalLM(tiny(LlamaConfig, len(tokenizer)))
    with pytest.raises(UsageError, match="lm-eval:many, row test/0: .* gives 7 as its marks"):
        scored(load(folder, "many"), model.eval(), tokenizer)


def test_an_unknown_task_names_the_nearest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks.manager

    few = Path(lm_eval.tasks.__file__).parent / "arc"  # of its 13,000 files, which take seconds
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(few / "manager.py"))
    with pytest.raises(UsageError, match="no task 'arc_easyy'. Did you mean 'lm-eval:arc_easy'"):
        load(folder, "arc_easyy")


def test_without_the_harness_its_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UsageError, match=r"pip install 'starmerge-models\[lm-eval\]'"):
        load(folder, "choices")


def tiny(kind: type, vocabulary: int, **options: Any) -> Any:
    """Return the configuration of a random model with the words of another."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind is LlamaConfig:
        sizes["intermediate_size"] = 16
    return kind(vocab_size=vocabulary, **sizes, **options)
