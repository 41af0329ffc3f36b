"""A tiny model with adapters, and tasks that these answer: evaluations that take no time."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM

from starmerge_models.evaluation.runner import evaluate
from starmerge_models.evaluation.settings import Settings
from starmerge_models.evaluation.tasks.sources import FileSource, Sample
from starmerge_models.evaluation.tasks.task import Task
from tests.evaluation.models.tiny_models import make, tokenizer

LABELS = ("w10", "w11", "w13")
ALL = Sample()


@dataclass(frozen=True)
class World:
    """A base, its adapters, and for each a task that it answers without a fault."""

    base: Path
    adapters: dict[str, Path]
    tasks: list[Task]


def make_world(folder: Path) -> World:
    """Make a world in a folder; its tasks have 200 rows, half of them held out, 30 scored."""
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    for part in (make("llama"), words):
        part.save_pretrained(folder / "base")
    adapters, tasks = {}, []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model.name_or_path = "tests/tiny"
        config = LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        adapters[name] = folder / name
        get_peft_model(model, config).save_pretrained(adapters[name], save_embedding_layers=False)
        # Rows that say w10, asked of the adapter, tell its own answers.
        rows = [f"w{20 + a} w{20 + b} w{seed + 2}" for a in range(20) for b in range(10)]
        file = folder / f"{name}.jsonl"
        _write(file, rows, ["w10"] * len(rows))
        task = Task(
            name=name,
            source=FileSource(file=file, held_out=0.5),
            sample=Sample(kind="random", n=30),
            prompt="{input}",
            labels={label: (label,) for label in LABELS},
        )
        whole = task.model_copy(update={"source": FileSource(file=file), "sample": ALL})
        answered = evaluate(folder / "base", {name: adapters[name]}, [whole], Settings("rank"))
        predictions = {p.id: p.response for p in answered.tuned[name].predictions}
        _write(file, rows, [predictions[f"{file.name}/{n}"] for n in range(1, len(rows) + 1)])
        tasks.append(task)
    return World(folder / "base", adapters, tasks)


def _write(file: Path, rows: list[str], labels: list[str]) -> None:
    pairs = zip(rows, labels, strict=True)
    file.write_text("".join(json.dumps({"input": r, "label": a}) + "\n" for r, a in pairs))
