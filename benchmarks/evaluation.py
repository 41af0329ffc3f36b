"""How many rows a second an evaluation asks, beside a plain loop over ``model.generate``.

The plain loop is what one writes first: batches of 16 rows, all padded to the longest prompt of the
task, up to 10 new tokens; a batch ends when all its rows have ended. starmerge reads what all
prompts begin with once, reads rows of like length together, and drops a row as soon as its answer
can be read. Both get the same prompts as tokens, and both ask the demo's base, and each task's
adapter on it by PEFT, in the dtype they are stored in. The model of the plain loop is loaded by
``transformers`` as it is; that of starmerge by ``load_model``.

The two take turns. Whether they read the same answers is shown beside: in 16 bits, a near tie may
fall the other way in another batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# Must stand before torch is loaded: idle threads would spin, and take time from their neighbours.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch
from common import (
    add_models,
    find_models,
    parse_run,
    parser_of,
    print_machine,
    print_targets,
    ratios,
    span,
    take_turns,
)
from transformers import AutoModelForCausalLM

from starmerge.evaluation.models.generation import generate
from starmerge.evaluation.models.loading import AdapterSwitch, load_model
from starmerge.evaluation.models.prompts import Prompter
from starmerge.evaluation.scoring.matching import is_final, read
from starmerge.evaluation.tasks import find_task
from starmerge.evaluation.tasks.task import Example, Task

PLAIN = "plain loop"
OURS = "starmerge"
BATCH = 16
SMALL = ("digits", "sentiment")
TARGET = 3.0


@dataclass(frozen=True)
class Case:
    """A task whose rows a model is asked."""

    task: Task
    examples: Sequence[Example]
    prompts: list[list[int]]


Way = tuple[Callable[[Any, Any, Case], list[str]], AdapterSwitch]
"""How a model is asked, and the model with its adapters."""


@torch.inference_mode()
def plain_loop(model: Any, tokenizer: Any, case: Case) -> list[str]:
    """Ask all rows of a task in the plain way."""
    width = max(map(len, case.prompts))
    responses: list[str] = []
    for start in range(0, len(case.prompts), BATCH):
        batch = tokenizer.pad(
            {"input_ids": case.prompts[start : start + BATCH]},
            padding="max_length",
            max_length=width,
            padding_side="left",
            return_tensors="pt",
        )
        output = model.generate(
            **batch.to(model.device),
            do_sample=False,
            max_new_tokens=case.task.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        responses += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return responses


def starmerge_way(model: Any, tokenizer: Any, case: Case) -> list[str]:
    """Ask all rows of a task as ``starmerge evaluate`` does."""
    return generate(
        model,
        tokenizer,
        case.prompts,
        max_new_tokens=case.task.max_new_tokens,
        is_final=lambda text: is_final(case.task, text),
        batch_size=None,
        advance=lambda _: None,
    )


def make_case(name: str, tokenizer: Any, rows: int) -> Case:
    """Return the first rows of a task and their prompts."""
    task = find_task(name)
    assert isinstance(task, Task)
    examples = task.examples("test", rows)
    prompter = Prompter(tokenizer)
    prompts = [list(prompter.prompt(task, example).ids) for example in examples]
    return Case(task, examples, prompts)


def agreement(case: Case, first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of rows in which the same answer is read."""
    pairs = zip(first, second, case.examples, strict=True)
    same = [
        read(case.task, one, row.label) == read(case.task, other, row.label)
        for one, other, row in pairs
    ]
    return sum(same) / len(same)


def plainly_loaded(base: Path) -> Any:
    """Load a model as one does, and put it where the other is."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def asking(
    way: Way, tokenizer: Any, case: Case, adapter: str | None, said: dict[str, list[str]]
) -> Callable[[], None]:
    """Return what asks a model in one way and keeps what it says."""
    ask, switch = way

    def run() -> None:
        with switch.active(adapter) as active:
            said[ask.__name__] = ask(active, tokenizer, case)

    return run


def main() -> None:
    """Ask the base and the adapters their tasks in both ways; print what it cost."""
    parser = parser_of(__doc__)
    add_models(parser)
    parser.add_argument("--rows", type=int, metavar="N", help="default: 48, with --full 96")
    options = parse_run(parser, small=2, full=3, writes=False)
    rows = options.rows or (96 if options.full else 48)
    base, folders = find_models(options)
    adapters = {path.name: path for path in folders if options.full or path.name in SMALL}
    print_machine()
    model, tokenizer = load_model(base)
    ways: dict[str, Way] = {
        PLAIN: (plain_loop, AdapterSwitch(plainly_loaded(base), adapters)),
        OURS: (starmerge_way, AdapterSwitch(model, adapters)),
    }
    threads = torch.get_num_threads()
    print(f"\n{rows} rows a task, turns: {options.turns}, threads: {threads}, {model.dtype}\n")
    print("| task | model | plain, rows/s | starmerge, rows/s | ratio (min – max) | same answers |")
    print("|---|---|---:|---:|---:|---:|")
    seconds: dict[str, list[float]] = {label: [] for label in ways}
    medians = []
    for name in adapters:
        case = make_case(name, tokenizer, rows)
        for adapter in (name, None):
            said: dict[str, list[str]] = {}
            costs = take_turns(
                {label: asking(way, tokenizer, case, adapter, said) for label, way in ways.items()},
                options.turns,
            )
            for label, mine in costs.items():
                seconds[label].append(median(cost.wall for cost in mine))
            speeds = " | ".join(f"{len(case.prompts) / seconds[label][-1]:.1f}" for label in ways)
            faster = ratios(costs[PLAIN], costs[OURS], "wall")
            medians.append(median(faster))
            same = agreement(case, *said.values())
            print(f"| {name} | {adapter or 'base'} | {speeds} | {span(faster)} | {same:.1%} |")
    overall = sum(seconds[PLAIN]) / sum(seconds[OURS])
    print_targets(
        [
            f"Target, {TARGET:g} times the rows a second: {overall:.2f} over all rows, "
            f"{min(medians):.2f} where it is least."
        ],
        full=options.full,
    )


if __name__ == "__main__":
    main()
