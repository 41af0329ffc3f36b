"""Files of every kind that starmerge reads, spoilt at random by their structure, and read.

The weights, configs and recipes of :mod:`tests.checkpoints.bad_files` are among the kinds. Of each
a :class:`Kind` makes the files once, and tries one spoilt copy after the other.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import starmerge_models as sm
from starmerge_models.checkpoints.base import open_base
from starmerge_models.checkpoints.hashing import blake3_of
from starmerge_models.checkpoints.metric import MetricWriter, open_metric
from starmerge_models.checkpoints.source import resolve
from starmerge_models.errors import StarmergeError
from starmerge_models.evaluation.results import SCHEMA, load_results
from starmerge_models.evaluation.tasks.bare_rows import task_of_rows
from starmerge_models.evaluation.tasks.files import load_task
from starmerge_models.evaluation.tasks.suites import load_suite
from starmerge_models.evaluation.tasks.task import Task
from starmerge_models.merging import journal as journals
from starmerge_models.merging.engine import run
from starmerge_models.merging.executors.threads import Threads
from starmerge_models.merging.journal import JOURNAL, fingerprint
from starmerge_models.merging.plan import Plan, make_plan
from starmerge_models.merging.verify import verify
from starmerge_models.recipe import make_recipe
from starmerge_models.study.runs import runs_of
from starmerge_models.study.store import load_store
from starmerge_models.study.study_file import load_study, pool_of
from tests.checkpoints import bad_files
from tests.checkpoints.bad_files import (
    World,
    as_json,
    garble,
    mutate,
    split_safetensors,
    time_limit,
    write_safetensors,
)
from tests.forks import tree
from tests.study.studies import written_store

Spoil = Callable[[Path, random.Random], None]


class Kind:
    """A kind of files; subclasses say how they are made, spoilt and used.

    Args:
        folder: Where the files are made; each attempt has a copy of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "whole"
        self._copy = folder / "copy"
        self.folder.mkdir(parents=True)
        self.make(self.folder)

    def make(self, folder: Path) -> None:
        """Make the files."""

    def spoil(self, folder: Path, rng: random.Random) -> None:
        """Spoil one of them."""
        raise NotImplementedError

    def use(self, folder: Path) -> None:
        """Do what a command would do with them."""
        raise NotImplementedError

    def attempt(self, seed: str) -> str | None:
        """Spoil a copy and use it; return why it was refused, None if it was not.

        Anything but an error of ours that is raised is a fault.
        """
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self.folder, self._copy, symlinks=True)
        self.spoil(self._copy, random.Random(seed))
        try:
            with time_limit():
                self.use(self._copy)
        except StarmergeError as error:
            assert len(str(error)) > 20
            return str(error)
        return None


def _spoil_json(file: Path, rng: random.Random) -> None:
    content = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = mutate(content, rng)
    file.write_bytes(as_json(content, rng))


def _spoil_yaml(file: Path, rng: random.Random) -> None:
    if rng.random() < 0.3:
        file.write_bytes(garble(file.read_bytes(), rng))
        return
    content = yaml.safe_load(file.read_text())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = mutate(content, rng)
    text = yaml.dump(content, allow_unicode=True)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def _spoil_lines(file: Path, rng: random.Random) -> None:
    """Spoil a line of a JSONL file."""
    lines = file.read_text().splitlines()
    place = rng.randrange(len(lines))
    whole = mutate(json.loads(lines[place]), rng)
    data = [line.encode() for line in lines]
    data[place] = as_json(whole, rng)
    if rng.random() < 0.2:
        data.insert(rng.randrange(len(data)), rng.choice(data))
    content = b"\n".join(data) + b"\n"
    file.write_bytes(garble(content, rng) if rng.random() < 0.2 else content)


def _spoil_safetensors(file: Path, rng: random.Random) -> None:
    header, body = split_safetensors(file)
    content: Any = mutate(header, rng)
    if rng.random() < 0.2:
        body = garble(body, rng)
    write_safetensors(file, as_json(content, rng), body)


class _Weights(Kind):
    """Weights, configs and recipes, as tests/checkpoints/test_fuzz.py spoils them."""

    kind: str

    def make(self, folder: Path) -> None:
        self._world = World(folder / "world")

    def attempt(self, seed: str) -> str | None:
        shutil.rmtree(self._copy, ignore_errors=True)
        world = self._world.copy(self._copy)
        outcome = bad_files.spoil_and_merge(world, self.kind, random.Random(seed))
        is_there = (self._copy / "merged").exists()
        assert is_there == (outcome == "merged"), "an output of a merge that was refused"
        return None if outcome == "merged" else outcome


_ROWS = [{"input": f"how is {n}", "label": "ab"[n % 2], "choices": ["a", "b"]} for n in range(12)]

_TASK = {
    "name": "quiz",
    "description": "A quiz.",
    "source": {"file": "rows.jsonl", "held_out": 0.5},
    "sample": {"kind": "random", "n": 4, "seed": 1},
    "prompt": "Say: {input}",
    "labels": {"a": ["a", "A"], "b": ["b"]},
    "match": "whole-word",
    "metric": "accuracy",
    "max_new_tokens": 5,
    "case_sensitive": True,
}


class _TaskFile(Kind):
    def make(self, folder: Path) -> None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
        (folder / "quiz.yaml").write_text(yaml.safe_dump(_TASK, sort_keys=False))

    def spoil(self, folder: Path, rng: random.Random) -> None:
        _spoil_yaml(folder / "quiz.yaml", rng)

    def use(self, folder: Path) -> None:
        task = load_task(folder / "quiz.yaml")
        if isinstance(task, Task):
            task.examples("test", 3)
            task.examples("train", 3)
            assert task.where


class _Rows(Kind):
    def make(self, folder: Path) -> None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
        lines = ["input,label", *(f'"{row["input"]}",{row["label"]}' for row in _ROWS)]
        (folder / "rows.csv").write_text("\n".join(lines))

    def spoil(self, folder: Path, rng: random.Random) -> None:
        keep = folder / rng.choice(["rows.jsonl", "rows.csv"])
        if keep.suffix == ".jsonl":
            _spoil_lines(keep, rng)
        else:
            for _ in range(rng.choice([1, 2, 4])):
                keep.write_bytes(garble(keep.read_bytes(), rng))
        keep.rename(folder / f"chosen{keep.suffix}")

    def use(self, folder: Path) -> None:
        (file,) = folder.glob("chosen.*")
        task = task_of_rows(file)
        task.examples("test")
        task.unlabelled_examples("train", 5)


class _Suite(Kind):
    def make(self, folder: Path) -> None:
        _TaskFile.make(self, folder)  # type: ignore[arg-type]
        content = {
            "description": "Two.", "base": "org/base", "tasks": ["quiz.yaml", "digits"],
            "models": {"quiz": "./quiz", "digits": "org/digits"}, "notes": "None.",
            "published": {"merge": {"average": 50.0}},
        }  # fmt: skip
        (folder / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        study = {"suite": "suite.yaml", "methods": ["average"], "rows": 5}
        (folder / "study.yaml").write_text(yaml.safe_dump(study))

    def spoil(self, folder: Path, rng: random.Random) -> None:
        _spoil_yaml(folder / "suite.yaml", rng)

    def use(self, folder: Path) -> None:
        load_suite(folder / "suite.yaml")
        study = load_study(folder / "study.yaml")
        runs_of(study, pool_of(study))


_STUDY = {
    "name": "curves",
    "base": "org/base",
    "models": {
        "one": {"path": "./one", "task": "quiz"},
        "two": {"path": "org/two", "task": "quiz"},
        "digits": "org/digits",
    },
    "tasks": ["quiz.yaml", "digits"],
    "methods": [
        "average",
        {"method": "star+ties", "parameters": {"k": 20}, "grid": {"eta": [20, 40]}},
        {"method": "dare+average", "grid": {"p": [0.5, 0.9]}},
    ],
    "numbers": [2, "all"],
    "combinations": 2,
    "seed": 1,
    "seeds": [0, 1],
    "scorer": "rank",
    "matching": "strict",
    "rows": 9,
    "dtype": "auto",
    "figures": [{"figure": "tasks"}, {"figure": "parameter", "parameter": "eta", "title": "η"}],
}


class _StudyFile(Kind):
    def make(self, folder: Path) -> None:
        _TaskFile.make(self, folder)  # type: ignore[arg-type]
        text = yaml.safe_dump(_STUDY, sort_keys=False)
        (folder / "study.yaml").write_text(text)

    def spoil(self, folder: Path, rng: random.Random) -> None:
        _spoil_yaml(folder / "study.yaml", rng)

    def use(self, folder: Path) -> None:
        study = load_study(folder / "study.yaml")
        study.settings()
        runs_of(study, pool_of(study))


class _Store(Kind):
    def make(self, folder: Path) -> None:
        written_store(folder / "store")

    def spoil(self, folder: Path, rng: random.Random) -> None:
        if rng.random() < 0.5:
            _spoil_json(folder / "store" / "study.json", rng)
        else:
            _spoil_lines(folder / "store" / "runs.jsonl", rng)

    def use(self, folder: Path) -> None:
        store = load_store(folder / "store")
        repr(store)
        store.to_frame()


class _MetricFile(Kind):
    def make(self, folder: Path) -> None:
        world = World(folder / "world")
        weights = world.base / "model.safetensors"
        generator = torch.Generator().manual_seed(0)
        names = [f"model.layers.{i}.{m}.weight" for i in range(2) for m in ("q", "v")]
        with MetricWriter(
            folder / "metric.safetensors",
            base=("base", {weights.name: blake3_of(weights)}),
            made_from={"kind": "texts", "along": None},
            tensors=names,
            tasks=("adapter",),
        ) as writer:
            for task in (None, "adapter"):
                for name in names:
                    root = torch.randn(3, 4, generator=generator)
                    writer.add(root, [name], side="columns", task=task, tokens=10)

    def spoil(self, folder: Path, rng: random.Random) -> None:
        file = folder / "metric.safetensors"
        header, body = split_safetensors(file)
        if rng.random() < 0.6:
            metadata = header["__metadata__"]
            said: Any = json.loads(metadata["starmerge_metric"])
            for _ in range(rng.choice([1, 1, 2])):
                said = mutate(said, rng)
            text = as_json(said, rng).decode(errors="replace")
            header["__metadata__"] = metadata | {"starmerge_metric": text}
            write_safetensors(file, json.dumps(header).encode(), body)
        else:
            _spoil_safetensors(file, rng)

    def use(self, folder: Path) -> None:
        world = bad_files._at(folder / "world")
        metric = open_metric(folder / "metric.safetensors")
        metric.check_base(open_base(resolve(world.base)))
        output = folder / "merged"
        models = [world.adapter, world.other]
        file = folder / "metric.safetensors"
        sm.merge(world.base, models, "tsv_m", output=output, metric=file, threads=1)


class _Results(Kind):
    def make(self, folder: Path) -> None:
        score = {"task": "t", "model": "m", "metric": "accuracy", "score": 0.5, "low": 0.1,
                 "high": None, "n": 2, "unparsed": 0.0}  # fmt: skip
        scores = [score, score | {"model": "n", "score": None}]
        content = {"schema_version": SCHEMA, "scores": scores, "averages": [], "differences": [],
                   "provenance": {"date": "today", "versions": {"starmerge": "0"}}}  # fmt: skip
        (folder / "scores.json").write_text(json.dumps(content))
        row = {"model": "m", "task": "t", "id": "1", "response": "a", "value": "a", "number": None,
               "gold": "a", "credit": 1.0, "shortened": False}  # fmt: skip
        lines = [json.dumps(row | {"id": str(n)}) for n in range(3)]
        (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")

    def spoil(self, folder: Path, rng: random.Random) -> None:
        if rng.random() < 0.6:
            _spoil_json(folder / "scores.json", rng)
        else:
            _spoil_lines(folder / "predictions.jsonl", rng)

    def use(self, folder: Path) -> None:
        results = load_results(folder)
        repr(results)
        assert results.table is not None


class _Report(Kind):
    def make(self, folder: Path) -> None:
        World(folder / "world").merge()

    def spoil(self, folder: Path, rng: random.Random) -> None:
        _spoil_json(folder / "world" / "merged" / "merge_report.json", rng)

    def use(self, folder: Path) -> None:
        verify(folder / "world" / "merged", repeat="all", threads=1)


class _Emr(Kind):
    def make(self, folder: Path) -> None:
        world = World(folder / "world")
        sm.merge(world.base, [world.adapter, world.other], "emr", output=folder / "emr", threads=1)

    def spoil(self, folder: Path, rng: random.Random) -> None:
        emr = folder / "emr"
        chosen = rng.random()
        if chosen < 0.5:
            _spoil_json(emr / "adapter" / "emr.json", rng)
        elif chosen < 0.8:
            _spoil_safetensors(emr / "adapter" / "mask.safetensors", rng)
        else:
            _spoil_safetensors(emr / "unified" / "model.safetensors", rng)

    def use(self, folder: Path) -> None:
        models = [folder / "emr" / "adapter", folder / "world" / "other"]
        base = folder / "world" / "base"
        sm.merge(base, models, "average", output=folder / "merged", threads=1)


class _TokenizerFiles(Kind):
    def make(self, folder: Path) -> None:
        world = World(folder / "world")
        for place, extra in ((world.base, ()), (world.tuned, ("<new>",))):
            tokens = ["<unk>", "</s>", *(f"w{n}" for n in range(6 - len(extra))), *extra]
            words = Tokenizer(WordLevel({t: n for n, t in enumerate(tokens)}, unk_token="<unk>"))
            words.pre_tokenizer = WhitespaceSplit()
            words.add_special_tokens(["</s>"])
            words.save(str(place / "tokenizer.json"))
            config = {
                "eos_token": "</s>",
                "unk_token": {"content": "<unk>", "special": True},
                "tokenizer_class": "PreTrainedTokenizerFast",
                "chat_template": "{{ x }}",
                "added_tokens_decoder": {"1": {"content": "</s>", "special": True}},
            }
            (place / "tokenizer_config.json").write_text(json.dumps(config))

    def spoil(self, folder: Path, rng: random.Random) -> None:
        place = folder / "world" / rng.choice(["base", "tuned"])
        _spoil_json(place / rng.choice(["tokenizer.json", "tokenizer_config.json"]), rng)

    def use(self, folder: Path) -> None:
        world = bad_files._at(folder / "world")
        world.merge(world.tuned, world.adapter, tokenizer="union")


class _Partial(Kind):
    """What a killed merge has left: whatever lies there, the bytes must be the same."""

    def make(self, folder: Path) -> None:
        world = World(folder / "world")
        models = [str(world.adapter), str(world.tuned)]
        content = {"base": str(world.base), "models": models, "method": "star"}
        self._recipe = make_recipe(content)
        self._output = folder / "out"
        run(self._plan(), Threads(1))
        self._wanted = tree(self._output)
        shutil.rmtree(self._output)
        self._left = self._interrupted()

    def _plan(self) -> Plan:
        return make_plan(self._recipe, self._output)

    def _interrupted(self) -> dict[str, bytes]:
        """Return what a merge leaves that is killed before its last tensor."""
        left: dict[str, bytes] = {}
        add, end = journals.Journal.add, journals.Journal.end

        def adding(self: Any, *arguments: Any) -> None:
            add(self, *arguments)
            self._flush()

        def ending(self: Any) -> None:
            left.update(tree(self._folder.path))
            end(self)

        journals.Journal.add, journals.Journal.end = adding, ending  # type: ignore[method-assign]
        try:
            run(self._plan(), Threads(1))
        finally:
            journals.Journal.add, journals.Journal.end = add, end  # type: ignore[method-assign]
        return left

    def attempt(self, seed: str) -> str | None:
        rng = random.Random(seed)
        shutil.rmtree(self._output, ignore_errors=True)
        plan = self._plan()
        partial = self._output.with_name(f".{self._output.name}.partial-{fingerprint(plan)}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in self._left.items():
            (partial / name).write_bytes(content)
        for _ in range(rng.choice([1, 2, 3])):
            name = JOURNAL if rng.random() < 0.5 else rng.choice(list(self._left))
            file = partial / name
            if name == JOURNAL and rng.random() < 0.7:
                _spoil_journal(file, rng)
            else:
                file.write_bytes(garble(file.read_bytes(), rng))
        with time_limit():
            run(plan, Threads(1))
        assert tree(self._output) == self._wanted, "the merge that was gone on with has other bytes"
        return None


def _spoil_journal(file: Path, rng: random.Random) -> None:
    lines = file.read_bytes().splitlines()
    place = rng.randrange(len(lines))
    try:
        content: Any = json.loads(lines[place])
    except ValueError:
        content = {}
    lines[place] = as_json(mutate(content, rng), rng).replace(b"\n", b" ")
    file.write_bytes(b"\n".join(lines) + b"\n")


KINDS: dict[str, type[Kind]] = {
    **{kind: type("_Weights", (_Weights,), {"kind": kind}) for kind in bad_files.KINDS},
    "task file": _TaskFile,
    "rows": _Rows,
    "suite file": _Suite,
    "study file": _StudyFile,
    "study store": _Store,
    "metric file": _MetricFile,
    "results": _Results,
    "merge report": _Report,
    "EMR folder": _Emr,
    "tokenizer": _TokenizerFiles,
    "partial output": _Partial,
}
"""Every kind, by its name."""
