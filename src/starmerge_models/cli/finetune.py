"""``starmerge finetune``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from starmerge_models.cli import asking
from starmerge_models.cli.importing import importing
from starmerge_models.cli.printing import AsJson, Printer


def finetune(
    base: Annotated[str, typer.Argument(help="The model to fine-tune: a folder or a Hub id.")],
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="A name of [b]starmerge tasks[/b], a task file (.yaml), rows with input and label "
            "(.jsonl, .csv, .parquet), or a folder with train.jsonl and test.jsonl.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to create for adapter or model.")
    ],
    columns: asking.Columns = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights and save a whole model, no adapter.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Rank of the adapter.")] = 16,
    alpha: Annotated[float, typer.Option(help="Scale: the update is alpha/rank · B·A.")] = 32,
    targets: Annotated[
        str, typer.Option(help="Modules to adapt, separated by commas.")
    ] = "q_proj,v_proj",
    lr: Annotated[
        float | None,
        typer.Option(help="Highest learning rate.", show_default="1e-3; with --full 5e-5"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training rows.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    rows: Annotated[int, typer.Option(min=1, help="Training rows at most.")] = 1000,
    test_rows: Annotated[int, typer.Option(min=1, help="Held-out rows to score.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the initial A and of the row order.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Dtype to store what is trained in: float32, bfloat16 or float16.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Train a LoRA adapter, or all weights, on a task and score the result on held-out rows.

    The adapter trains in float32 on the base's own dtype, with the loss on the answer alone. It is
    saved in PEFT's layout, with a card that says how it was made and what it scores. --full trains
    the whole model in float32, for which memory must hold its weights four times.

    Example: starmerge finetune HuggingFaceTB/SmolLM2-135M-Instruct -t digits -o adapters/digits
    """
    with importing():
        from starmerge_models.checkpoints.source import check_named, resolve_local
        from starmerge_models.errors import UsageError
        from starmerge_models.evaluation.results import without_nan
        from starmerge_models.evaluation.tasks.task import Task
        from starmerge_models.storage.publishing import check_output
        from starmerge_models.training.finetuning import StoredDtype, TrainingRecipe
        from starmerge_models.training.finetuning import finetune as train

    known = StoredDtype.__args__  # type: ignore[attr-defined]
    if dtype not in known:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(known)}.")
    check_output(output, overwrite=False)
    check_named(base)
    names = asking.names_of(task)
    if len(names) != 1:
        raise UsageError(
            f"--task names {len(names)} tasks, and a model is trained on one. Run the command once "
            "for each."
        )
    (chosen,) = asking.tasks_of(names, None, None, columns)
    if not isinstance(chosen, Task):
        raise UsageError(
            f"{names[0]} is a task of images or of a harness: starmerge trains language models on "
            "tasks of text."
        )
    source = resolve_local(base)
    adapter = TrainingRecipe()
    if full and (rank, alpha, targets) != (adapter.rank, adapter.alpha, ",".join(adapter.targets)):
        raise UsageError(
            "--rank, --alpha and --targets are an adapter's, and with --full there is none. Leave "
            "them out."
        )
    recipe = TrainingRecipe(
        full=full,
        rank=rank,
        alpha=alpha,
        targets=tuple(targets.split(",")),
        learning_rate=lr,
        epochs=epochs,
        batch_size=batch_size,
        rows=rows,
        test_rows=test_rows,
        seed=seed,
        dtype=dtype,  # type: ignore[arg-type]
    )
    result = train(
        source.path,
        chosen,
        output,
        recipe,
        base_name=source.name or str(source),
        command=shlex.join(["starmerge", *sys.argv[1:]]),
        progress=True,
    )
    tail = result.losses[-20:]
    printer = Printer(as_json)
    score = {name: getattr(result.score, name) for name in ("metric", "value", "low", "high", "n")}
    printer.result(
        without_nan(
            {"output": output, "task": chosen.name, "score": score, "losses": result.losses}
        )
    )
    printer.text(
        f"{chosen.name}: training loss {sum(tail) / len(tail):.3f} over the last {len(tail)} "
        f"steps, held-out {result.score.metric} {result.score.value:.3f} "
        f"[{result.score.low:.3f}, {result.score.high:.3f}], n = {result.score.n}",
        f"{'Model' if full else 'Adapter'}: {output}",
    )
