"""How many rows a second an evaluation asks, beside two plain ways of asking with transformers.

Generation. The *plain loop* is what one writes first: batches of 16 rows, all padded to the longest
prompt of the task, up to 10 new tokens; a batch ends when all its rows have ended. The *library's
path* is the best that ``model.generate`` offers: prompts sorted by length, each batch padded on the
left to its own longest, and a stopping criterion that ends a row as soon as its answer can be read.
starmerge reads what all prompts begin with once, reads rows of like length together, and drops a
row from its batch when it is finished.

Ranking. The library's path is a forward pass over every prompt with every answer behind it, sorted
and padded likewise, and logits for the answers alone. starmerge reads each prompt once.

All get the same prompts as tokens, and ask the demo's base, and each task's adapter on it by PEFT,
in the dtype they are stored in. The model of the plain loop is loaded by ``transformers`` as it is;
the others share one of ``load_model``. With ``--t5``, a T5 of random weights in the size of
T5-small is asked instead: its texts end at random.

The ways take turns. Whether they give the same answers is shown beside: in 16 bits, a near tie may
fall the other way in another batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from starmerge_models.evaluation.models.batching import PASS_TOKENS, by_length, padded
from starmerge_models.evaluation.models.generation import generate
from starmerge_models.evaluation.models.loading import AdapterSwitch, load_model
from starmerge_models.evaluation.models.prompts import Prompter
from starmerge_models.evaluation.models.ranking import log_likelihoods
from starmerge_models.evaluation.scoring.matching import is_final, read
from starmerge_models.evaluation.tasks import find_task
from starmerge_models.evaluation.tasks.task import Example, Task

PLAIN = "plain loop"
LIBRARY = "library's path"
OURS = "starmerge"
BATCH = 16
LARGER_BATCH = 48
SMALL = ("digits", "sentiment")
TARGET = 3.0
WORTH_IT = 1.5
"""The least ratio to the library's path for which a loop of our own is kept."""


@dataclass(frozen=True)
class Case:
    """Rows that a model is asked.

    Args:
        prompts: Token ids.
        options: For each prompt, the token ids of its answers.
        new: Most tokens of a response.
        is_final: Tells of a response whether the rest of it may be left out.
        same: Tells of a row's number and two responses whether the same answer is read.
    """

    prompts: list[list[int]]
    options: list[list[list[int]]]
    new: int
    is_final: Callable[[str], bool]
    same: Callable[[int, str, str], bool]


Say = Callable[[Any, Any, Case], Sequence[Any]]
"""Asks a model, with its tokenizer, the rows of a case: responses, or numbers of answers."""


# --------------------------------------------------------------------------------------- Generation


@torch.inference_mode()
def plain_loop(model: Any, tokenizer: Any, case: Case) -> list[str]:
    """Generate in the way that one writes first."""
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
            max_new_tokens=case.new,
            pad_token_id=tokenizer.pad_token_id,
        )
        responses += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return responses


def library_generates(batch: int) -> Say:
    """Return what generates by ``model.generate`` with all that the library offers."""

    @torch.inference_mode()
    def say(model: Any, tokenizer: Any, case: Case) -> list[str]:
        responses = [""] * len(case.prompts)
        order = by_length(case.prompts)
        first = 1 if model.config.is_encoder_decoder else None
        named = model.generation_config.eos_token_id
        ends = {named} if isinstance(named, int) else set(named)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids, real = padded(
                [case.prompts[row] for row in rows],
                tokenizer.pad_token_id,
                model.device,
                left=first is None,
            )
            behind = first or ids.shape[1]

            def ended(tokens: torch.Tensor, _: object, behind: int = behind) -> torch.Tensor:
                texts = tokenizer.batch_decode(tokens[:, behind:], skip_special_tokens=True)
                return torch.tensor([case.is_final(text) for text in texts], device=tokens.device)

            output = model.generate(
                input_ids=ids,
                attention_mask=real.long(),
                do_sample=False,
                max_new_tokens=case.new,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[ended],
            )
            for row, tokens in zip(rows, output[:, behind:].tolist(), strict=True):
                written = list(takewhile(lambda token: token not in ends, tokens))
                responses[row] = tokenizer.decode(written, skip_special_tokens=True)
        return responses

    return say


def starmerge_generates(model: Any, tokenizer: Any, case: Case) -> list[str]:
    """Generate as ``starmerge evaluate`` does."""
    return generate(
        model,
        tokenizer,
        case.prompts,
        max_new_tokens=case.new,
        is_final=case.is_final,
        batch_size=None,
        advance=lambda _: None,
    )


# ------------------------------------------------------------------------------------------ Ranking


def best(likelihoods: Sequence[Sequence[float]]) -> list[int]:
    """Return the number of the likeliest answer of each row."""
    return [max(range(len(own)), key=own.__getitem__) for own in likelihoods]


@torch.inference_mode()
def library_ranks(model: Any, tokenizer: Any, case: Case) -> list[int]:
    """Rank by passes over every prompt with every answer."""
    texts = [
        (row, number, prompt, answer)
        for row, (prompt, own) in enumerate(zip(case.prompts, case.options, strict=True))
        for number, answer in enumerate(own)
    ]
    texts.sort(key=lambda text: len(text[2]) + len(text[3]), reverse=True)
    found = [[0.0] * len(own) for own in case.options]
    while texts:
        longest = len(texts[0][2]) + len(texts[0][3])
        some, texts = texts[: PASS_TOKENS // longest], texts[PASS_TOKENS // longest :]
        columns = max(len(answer) for *_, answer in some)
        logits = answer_logits(model, some, columns).log_softmax(-1, dtype=torch.float32)
        for (row, number, _, answer), steps in zip(some, logits, strict=True):
            own = steps[: len(answer)] if model.config.is_encoder_decoder else steps[-len(answer) :]
            found[row][number] = float(own[range(len(answer)), answer].sum())
    return best(found)


def answer_logits(model: Any, texts: Sequence[Any], columns: int) -> torch.Tensor:
    """Return the logits of answers, (texts, columns, vocabulary)."""
    prompts = [prompt for _, _, prompt, _ in texts]
    answers = [answer for *_, answer in texts]
    arguments: dict[str, Any] = {"use_cache": False}
    if model.config.is_encoder_decoder:
        ids, real = padded(prompts, 0, model.device)
        start = model.generation_config.decoder_start_token_id
        decoder_rows = [[start, *answer[:-1]] for answer in answers]
        arguments["decoder_input_ids"], _ = padded(decoder_rows, 0, model.device)
    else:
        wholes = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        ids, real = padded(wholes, 0, model.device, left=True)
        arguments["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
        arguments["logits_to_keep"] = columns
    output = model(input_ids=ids, attention_mask=real.long(), **arguments)
    logits: torch.Tensor = output.logits
    return logits


def starmerge_ranks(model: Any, tokenizer: Any, case: Case) -> list[int]:
    """Rank as ``starmerge evaluate`` does."""
    return best(
        log_likelihoods(
            model, tokenizer, case.prompts, case.options, batch_size=None, advance=lambda _: None
        )
    )


# -------------------------------------------------------------------------------------------- Cases


def make_case(name: str, tokenizer: Any, rows: int) -> Case:
    """Return the first rows of a task and their prompts."""
    task = find_task(name)
    assert isinstance(task, Task)
    examples: Sequence[Example] = task.examples("test", rows)
    prompter = Prompter(tokenizer)
    return Case(
        [list(prompter.prompt(task, example).ids) for example in examples],
        [[prompter.answer(choice) for choice in example.choices] for example in examples],
        task.max_new_tokens,
        lambda text: is_final(task, text),
        lambda row, one, other: (
            read(task, one, examples[row].label) == read(task, other, examples[row].label)
        ),
    )


VOCABULARY = 32128


def random_t5() -> Any:
    """Return a T5 of random weights, of the size of T5-small; a seventh of its tokens are ends."""
    torch.manual_seed(0)
    sizes = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)).eval()
    with torch.no_grad():
        # Of order one, as those of a trained model are in effect: responses depend on the prompt.
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 / parameter.shape[1] ** 0.5)
        model.decoder.final_layer_norm.weight.fill_(512**0.5)
    model.generation_config = GenerationConfig(
        eos_token_id=[1, *range(5, VOCABULARY, 7)], pad_token_id=0, decoder_start_token_id=0
    )
    return model


def random_case(rows: int, shortest: int, longest: int) -> Case:
    """Return random prompts of some lengths, with four answers of 2 to 5 tokens each."""
    generator = torch.Generator().manual_seed(0)

    def some(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most + 1, (1,), generator=generator))
        ids: list[int] = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        return ids

    prompts = [some(shortest, longest) for _ in range(rows)]
    options = [[some(2, 5) for _ in range(4)] for _ in range(rows)]
    return Case(prompts, options, 10, lambda _: False, lambda row, one, other: one == other)


# --------------------------------------------------------------------------------------- Comparison


@dataclass
class Contest:
    """Ways of asking that take turns, and the seconds and ratios so far.

    Args:
        ways: How a model is asked and the model with its adapters, by the ways' names.
        turns: How often each asks.
    """

    ways: dict[str, tuple[Say, AdapterSwitch]]
    turns: int

    def __post_init__(self) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in self.ways}
        self.medians: dict[str, list[float]] = {name: [] for name in self.ways}

    def head(self) -> None:
        """Print the head of the table."""
        others = [name for name in self.ways if name != OURS]
        cells = [f"{name}, rows/s" for name in self.ways]
        for name in others:
            cells += [f"to the {name} (min – max)", "same answers"]
        print(f"\n| rows | model | {' | '.join(cells)} |\n|---|---|{'---:|' * len(cells)}")

    def run(self, label: str, tokenizer: Any, case: Case, adapter: str | None) -> None:
        """Have all ways ask one model, and print a line."""
        said: dict[str, Sequence[Any]] = {}

        def asking(name: str, say: Say, switch: AdapterSwitch) -> Callable[[], None]:
            def ask() -> None:
                with switch.active(adapter) as active:
                    said[name] = say(active, tokenizer, case)

            return ask

        costs = take_turns(
            {name: asking(name, *way) for name, way in self.ways.items()}, self.turns
        )
        cells = []
        for name, mine in costs.items():
            self.seconds[name].append(median(cost.wall for cost in mine))
            cells.append(f"{len(case.prompts) / self.seconds[name][-1]:.1f}")
        for name in self.ways:
            if name != OURS:
                faster = ratios(costs[name], costs[OURS], "wall")
                self.medians[name].append(median(faster))
                pairs = enumerate(zip(said[name], said[OURS], strict=True))
                same = [
                    case.same(row, one, other) if isinstance(one, str) else one == other
                    for row, (one, other) in pairs
                ]
                cells += [span(faster), f"{sum(same) / len(same):.1%}"]
        print(f"| {label} | {adapter or 'base'} | {' | '.join(cells)} |", flush=True)

    def verdict(self, name: str) -> str:
        """Return the ratio to a way, over all rows and where it is least."""
        overall = sum(self.seconds[name]) / sum(self.seconds[OURS])
        return f"{overall:.2f} over all rows, {min(self.medians[name]):.2f} where it is least"


def ask_demo(options: Any, rows: int) -> None:
    """Ask the base and the adapters their tasks in every way; print what it cost."""
    base, folders = find_models(options)
    adapters = {path.name: path for path in folders if options.full or path.name in SMALL}
    model, tokenizer = load_model(base)
    loaded = AdapterSwitch(model, adapters)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()
    plain = plain.to("cuda" if torch.cuda.is_available() else "cpu")
    generation = Contest(
        {
            PLAIN: (plain_loop, AdapterSwitch(plain, adapters)),
            LIBRARY: (library_generates(BATCH), loaded),
            OURS: (starmerge_generates, loaded),
        },
        options.turns,
    )
    ranking = Contest(
        {LIBRARY: (library_ranks, loaded), OURS: (starmerge_ranks, loaded)}, options.turns
    )
    print(f"\n{rows} rows a task, {model.dtype}")
    for contest, title in ((generation, "Generation"), (ranking, "Ranking")):
        print(f"\n{title}")
        contest.head()
        for name in adapters:
            case = make_case(name, tokenizer, rows)
            if contest is ranking and not all(case.options):
                continue
            for adapter in (name, None):
                contest.run(name, tokenizer, case, adapter)
    print_targets(
        [
            f"Target, {TARGET:g} times the rows a second of the plain loop: "
            f"{generation.verdict(PLAIN)}.",
            f"To keep a loop of our own, {WORTH_IT:g} times the library's path: generation "
            f"{generation.verdict(LIBRARY)}; ranking {ranking.verdict(LIBRARY)}.",
        ],
        full=options.full,
    )


def ask_t5(options: Any, rows: int) -> None:
    """Ask a random T5 short and long prompts."""
    tokenizer = AutoTokenizer.from_pretrained(find_models(options)[0])
    tokenizer.pad_token_id = 0
    model = AdapterSwitch(random_t5(), {})
    generation = Contest(
        {LIBRARY: (library_generates(LARGER_BATCH), model), OURS: (starmerge_generates, model)},
        options.turns,
    )
    ranking = Contest(
        {LIBRARY: (library_ranks, model), OURS: (starmerge_ranks, model)}, options.turns
    )
    print(f"\n{rows} rows, T5 of random weights, float32")
    for contest, title in ((generation, "Generation"), (ranking, "Ranking")):
        print(f"\n{title}")
        contest.head()
        for shortest, longest in ((35, 50), (150, 300)):
            case = random_case(rows, shortest, longest)
            contest.run(f"{shortest}–{longest} tokens", tokenizer, case, None)


def main() -> None:
    """Compare the ways of asking."""
    parser = parser_of(__doc__)
    add_models(parser)
    parser.add_argument("--rows", type=int, metavar="N", help="default: 48, with --full 96")
    parser.add_argument("--t5", action="store_true", help="ask a random T5 instead")
    options = parse_run(parser, small=2, full=3, writes=False)
    rows = options.rows or (96 if options.full else 48)
    print_machine()
    print(f"Turns: {options.turns}, threads: {torch.get_num_threads()}")
    if options.t5:
        ask_t5(options, rows)
    else:
        ask_demo(options, rows)


if __name__ == "__main__":
    main()
