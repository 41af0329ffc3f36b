"""Findings of an inspection as sentences, with advice.

The thresholds are defined here, each with its reason. They were not fitted to scores: they mark
notable values and do not predict the score of a merge, which ``starmerge choose`` measures.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from starmerge_models.study.inspection.totals import Record

LARGE = 2.0
"""A model whose norm is at least this many times the others' median, or the median this many times
its norm, is an outlier."""

SAME = 0.9
"""Task vectors with at least this cosine are nearly the same model."""

OPPOSED = -0.1
"""Task vectors with at most this cosine cancel each other in a sum."""

STRONG = 0.5
"""A task interferes with another if its response to the other's inputs is at least this share of
the other's own response."""

SHARED = 0.5
"""Input or output directions are shared if their overlap is at least this, and ten times the
overlap by chance."""

_BY_CHANCE = 10.0

SURVIVES = 0.9
"""Rounding matters if less than this share of an update's energy survives it."""

NOISY = 0.1
"""A stored fine-tune with at least this share of its energy below the noise floor is noisy."""

ONE_DIRECTION = 2.0
"""If STAR keeps fewer directions than this on average, it keeps little more than the first."""

APART = 0.5
"""A model is apart if at least this share of its energy is in tensors that at most half of the
models change."""

STANDS_OUT = 1.25
"""A layer or module stands out if its conflict is at least this many times the whole model's."""

FEW_TENSORS = 0.05
"""This share of a model's tensors counts as few."""

DOMINATED = 0.5
"""Few tensors dominate a model if they hold at least this share of its energy."""

WEAK = 0.25
"""A merge is weak if the median over tasks of ``own`` is less than this."""

BEHIND = 0.5
"""A task is behind the others if its ``own`` is less than this share of the median over tasks."""

OVERLAID = 0.75
"""Other tasks overlay a task if ``others`` is at least this, and larger than ``own``."""

_MOST_NAMED = 3

_BY_OUTPUTS = "-m covariance+own_response -p covariance.side=output"

Topic = Literal[
    "nothing", "size", "rounding", "noise", "pair", "layers", "rank", "apart", "tensors", "kept"
]


@dataclass(frozen=True)
class Finding:
    """A sentence on the models, with advice."""

    topic: Topic
    text: str
    advice: str | None = None
    models: tuple[str, ...] = ()
    """The models that the finding concerns; empty: all."""
    options: str | None = None
    """Options of ``starmerge merge`` that follow the advice, quoted for a shell."""

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable data."""
        return {
            "topic": self.topic,
            "text": self.text,
            "advice": self.advice,
            "models": list(self.models),
            "options": self.options,
        }

    def __str__(self) -> str:
        """Return text and advice in one line."""
        return f"{self.text} {self.advice}" if self.advice else self.text


def findings_of(
    models: Sequence[Record],
    conflicts: Sequence[Record],
    tensors: Sequence[Record],
    kept: Sequence[Record],
    *,
    conflict: float | None,
    by_layer: Mapping[str, float],
    by_module: Mapping[str, float],
    eta: float,
    dtype: str,
) -> list[Finding]:
    """Return the findings of an inspection, the most important first.

    Args:
        models: A record for each model.
        conflicts: A record for each pair of models.
        tensors: A record for each tensor and model.
        kept: A record for each merge and model.
        conflict: The conflict of the whole model.
        by_layer: The conflict of each layer, by the layer's name.
        by_module: The conflict of each module, by the module's name.
        eta: STAR's η.
        dtype: The base's dtype.
    """
    changing = [model for model in models if model["norm"] > 0]
    return [
        *_kept(kept),
        *_nothing(models),
        *_sizes(changing),
        *_rounding(changing, dtype),
        *_noise(changing),
        *_pairs(conflicts, has_adapters=any("adapter" in model["kind"] for model in models)),
        *_places(conflict, by_layer, by_module),
        *_ranks(changing, eta),
        *_apart(changing),
        *_tensors(changing, tensors),
    ]


def _nothing(models: Sequence[Record]) -> Iterator[Finding]:
    empty = tuple(model["model"] for model in models if model["norm"] == 0)
    if empty:
        yield Finding(
            "nothing",
            f"{_listed(empty)}: all task vectors are zero. A merge still counts it as a model, so "
            "it makes an average smaller.",
            "Leave it out, unless it is meant to weaken the others.",
            empty,
        )


def _sizes(models: Sequence[Record]) -> Iterator[Finding]:
    if len(models) < 2:
        return
    if len(models) == 2:
        small, large = sorted(models, key=lambda model: model["norm"])
        ratio = large["norm"] / small["norm"]
        if ratio >= LARGE:
            names = (large["model"], small["model"])
            yield Finding(
                "size",
                f"{names[0]} is {ratio:.1f} times as large as {names[1]}.",
                _equalised(large["model"], 1 / ratio),
                names,
                _weighted(large["model"], 1 / ratio),
            )
        return
    typical = median(model["norm"] for model in models)
    for model in models:
        times = model["times_others"]
        if times >= LARGE:
            yield Finding(
                "size",
                f"{model['model']} is {times:.1f} times as large as the others (median of norms): "
                "it dominates a sum or an average.",
                _equalised(model["model"], typical / model["norm"]),
                (model["model"],),
                _weighted(model["model"], typical / model["norm"]),
            )
    for model in models:
        times = model["times_others"]
        if times <= 1 / LARGE:
            yield Finding(
                "size",
                f"{model['model']} is {1 / times:.1f} times smaller than the others (median of "
                "norms): the others may dominate it.",
                f"Try {_weighted(model['model'], min(1 / times, 4))}.",
                (model["model"],),
                _weighted(model["model"], min(1 / times, 4)),
            )


def _equalised(name: str, weight: float) -> str:
    return (
        f"Try {_weighted(name, weight)}, or let starmerge choose race -m auto -m average "
        "-m shares:response=0.5."
    )


def _weighted(name: str, weight: float) -> str:
    """Return the options of an average with a model's weight, quoted for a shell."""
    return f"-m average -w {shlex.quote(f'{name}={weight:.2g}')}"


def _rounding(models: Sequence[Record], dtype: str) -> Iterator[Finding]:
    hurt = [model for model in models if model["survived"] < SURVIVES]
    if hurt:
        worst = min(hurt, key=lambda model: float(model["survived"]))
        more = f" (and less than {SURVIVES:.0%} of {len(hurt) - 1} more)" if len(hurt) > 1 else ""
        yield Finding(
            "rounding",
            f"Added to the base and rounded to {dtype}, {worst['survived']:.0%} of the energy of "
            f"{worst['model']}'s update survives{more}; in an average, which divides by the number "
            "of models, less survives.",
            "Merge with --dtype float32, or as an adapter (--as adapter).",
            tuple(model["model"] for model in hurt),
            "--dtype float32",
        )


def _noise(models: Sequence[Record]) -> Iterator[Finding]:
    noisy = [model for model in models if (model["noise"] or 0) >= NOISY]
    if noisy:
        worst = max(noisy, key=lambda model: float(model["noise"]))
        yield Finding(
            "noise",
            f"{worst['noise']:.0%} of the energy of {worst['model']}'s update is explained by the "
            f"rounding of its stored weights ({len(noisy)} of {len(models)} models have "
            f"{NOISY:.0%} or more). Ranks and spectra here count only values above the noise "
            "floor.",
            "star removes the noise by itself; for other spectral merges add denoise, as in "
            "-m denoise+shares, or use -m auto, which does it.",
            tuple(model["model"] for model in noisy),
            "-m denoise+shares",
        )


def _pairs(conflicts: Sequence[Record], *, has_adapters: bool) -> Iterator[Finding]:
    same = [pair for pair in conflicts if (pair["cosine"] or 0) >= SAME]
    for pair in same[:_MOST_NAMED]:
        yield Finding(
            "pair",
            f"{pair['a']} and {pair['b']} are nearly the same model (cosine {pair['cosine']:.2f}).",
            "Leave one out: it counts twice.",
            (pair["a"], pair["b"]),
        )
    against = sorted(
        (pair for pair in conflicts if (pair["cosine"] or 0) <= OPPOSED),
        key=lambda pair: float(pair["cosine"]),
    )
    for pair in against[:_MOST_NAMED]:
        yield Finding(
            "pair",
            f"{pair['a']} and {pair['b']} oppose each other (cosine {pair['cosine']:.2f}, "
            f"{pair['sign_conflict']:.0%} of the magnitude with different signs).",
            "Merge one of them with the rest, or let ties elect signs: -m ties.",
            (pair["a"], pair["b"]),
            "-m ties",
        )
    loud = [
        (float(pair[f"{x}_on_{y}"]), pair[x], pair[y])
        for pair in conflicts
        for x, y in (("a", "b"), ("b", "a"))
        if pair not in same and (pair[f"{x}_on_{y}"] or 0) >= STRONG
    ]
    loud.sort(reverse=True)
    if loud:
        named = "; ".join(f"{one} on {other} {ratio:.2f}" for ratio, one, other in loud[:3])
        yield Finding(
            "pair",
            "Some tasks respond to another's inputs at least half as strongly as the other "
            f"itself: {named}{_and_more(len(loud) - _MOST_NAMED)}.",
            "Merges that divide shared directions separate these tasks: -m auto, "
            "-m covariance+own_response, -m tsv_m.",
            tuple(dict.fromkeys(name for _, one, other in loud[:3] for name in (one, other))),
            "-m auto",
        )
    for side, words in (("in", "input"), ("out", "output")):
        shared = [
            pair
            for pair in conflicts
            if pair not in same
            and (pair[f"overlap_{side}"] or 0)
            >= max(SHARED, min(1.0, _BY_CHANCE * (pair[f"chance_{side}"] or 0)))
        ]
        if shared:
            top = max(shared, key=lambda pair: float(pair[f"overlap_{side}"]))
            if side == "out":
                how = (
                    "The tasks change the same outputs: try -m pico+task_arithmetic+mean_norm, or "
                    f"{_BY_OUTPUTS}."
                )
            else:
                how = (
                    "Merges that separate tasks by their inputs cannot work well here: try "
                    f"{_BY_OUTPUTS}."
                )
                if has_adapters:
                    how += " Adapters trained from one seed have the same initial A, and so inputs."
            yield Finding(
                "pair",
                f"{len(shared)} of {len(conflicts)} pairs share their {words} directions; most "
                f"{top['a']} and {top['b']} (overlap {top[f'overlap_{side}']:.2f}, by chance "
                f"{top[f'chance_{side}']:.3f}).",
                how,
                (top["a"], top["b"]),
                _BY_OUTPUTS if side == "in" else "-m pico+task_arithmetic+mean_norm",
            )
    known = [pair for pair in conflicts if pair["a_on_b"] is not None]
    if known and not (same or against or loud):
        most = max(max(pair["a_on_b"], pair["b_on_a"] or 0.0) for pair in known)
        yield Finding(
            "pair",
            f"No pair clashes: no task responds more than {most:.2f} times as strongly to "
            "another's inputs as the other itself.",
            "Averaging then weakens the tasks more than it mixes them: try -m auto.",
            options="-m auto",
        )


def _places(
    conflict: float | None, by_layer: Mapping[str, float], by_module: Mapping[str, float]
) -> Iterator[Finding]:
    if not conflict:
        return
    high = [
        item
        for found in (by_layer, by_module)
        for item in sorted(found.items(), key=lambda item: -item[1])[:_MOST_NAMED]
        if item[1] >= STANDS_OUT * conflict
    ]
    if high:
        first = high[0][0]
        pattern = f"*.{first.split()[-1]}.*" if first in by_layer else f"*{first.split()[-1]}*"
        fewer = f'-m star -p \'eta={{"{pattern}": 20, "*": 40}}\''
        named = _listed([f"{name} ({value:.2f})" for name, value in high])
        yield Finding(
            "layers",
            f"Tasks clash most in {named}; in the whole model a task responds to another's inputs "
            f"{conflict:.2f} times as strongly as the other itself.",
            f"STAR can keep less there: {fewer}.",
            options=fewer,
        )


def _ranks(models: Sequence[Record], eta: float) -> Iterator[Finding]:
    known = [model for model in models if model["kept"] is not None]
    if not known:
        return
    kept = sum(model["kept"] for model in known) / len(known)
    rank = sum(model["rank"] for model in known) / len(known)
    top = sum(model["top_share"] for model in known) / len(known)
    if kept < ONE_DIRECTION <= rank / 2:
        yield Finding(
            "rank",
            f"STAR at η = {eta:g} keeps {kept:.1f} of {rank:.1f} directions on average: one "
            f"singular value holds {top:.0%} of the nuclear norm.",
            "STAR is then close to an average of first directions: try -m star -p eta=60, or -m "
            "auto.",
            options="-m star -p eta=60",
        )


def _apart(models: Sequence[Record]) -> Iterator[Finding]:
    apart = [model for model in models if len(models) > 1 and model["apart"] >= APART]
    if apart:
        most = max(apart, key=lambda model: float(model["apart"]))
        others = _listed([model["model"] for model in apart if model is not most])
        yield Finding(
            "apart",
            f"{most['apart']:.0%} of the energy of {most['model']}'s update lies in tensors that "
            f"at most half of the models change{f'; so does most of {others}' if others else ''}. "
            "Methods that divide shared directions keep it nearly whole, so it affects the other "
            "tasks in later layers.",
            "Let starmerge choose race -m shares:response=0.5 and -m average against -m auto.",
            tuple(model["model"] for model in apart),
        )


def _tensors(models: Sequence[Record], tensors: Sequence[Record]) -> Iterator[Finding]:
    for model in models:
        own = sorted(
            (record for record in tensors if record["model"] == model["model"]),
            key=lambda record: -float(record["norm"]),
        )
        few = max(1, round(FEW_TENSORS * len(own)))
        share = sum(record["norm"] ** 2 for record in own[:few]) / model["norm"] ** 2
        if len(own) >= 1 / FEW_TENSORS and share >= DOMINATED:
            yield Finding(
                "tensors",
                f"{few} of {len(own)} tensors hold {share:.0%} of the energy of {model['model']}'s "
                f"update, first {own[0]['tensor']}.",
                None,
                (model["model"],),
            )


def _kept(kept: Sequence[Record]) -> Iterator[Finding]:
    for merge in dict.fromkeys(record["merge"] for record in kept):
        own = [r for r in kept if r["merge"] == merge and r["own"] is not None]
        if not own:
            continue
        low, high = min(r["own"] for r in own), max(r["own"] for r in own)
        typical = median(r["own"] for r in own)
        if typical < WEAK:
            yield Finding(
                "kept",
                f"{merge} weakens all tasks: on the tasks' own inputs it keeps {low:.2f} to "
                f"{high:.2f} of their responses.",
                "Merges that separate tasks may be stronger: try -m auto, or "
                "-m covariance+own_response.",
                options="-m auto",
            )
        for record in sorted(own, key=lambda r: float(r["own"])):
            if len(own) > 1 and record["own"] < BEHIND * typical:
                yield Finding(
                    "kept",
                    f"{merge}: {record['model']} is weakened more than the others. On its inputs "
                    f"the merge keeps {record['own']:.2f} of its response, and of the others' "
                    f"{typical:.2f} (median).",
                    f"Give it more weight: -w {record['model']}=2.",
                    (record["model"],),
                )
        overlaid = [r for r in own if r["others"] >= max(OVERLAID, abs(r["own"]))]
        overlaid.sort(key=lambda r: -float(r["others"]))
        if overlaid:
            named = _listed([f"{r['model']} ({r['others']:.2f})" for r in overlaid[:_MOST_NAMED]])
            yield Finding(
                "kept",
                f"{merge}: other tasks overlay {named}{_and_more(len(overlaid) - _MOST_NAMED)}: on "
                "the task's inputs they respond at least as strongly as the task itself.",
                "Merge fewer models, or leave out the one that responds most (pairs: a on b)"
                + (
                    "."
                    if merge.startswith("auto")
                    else "; merges that divide shared directions may interfere less: -m auto."
                ),
                tuple(r["model"] for r in overlaid),
            )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""
