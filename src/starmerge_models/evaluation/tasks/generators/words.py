"""Rows about English words, from the packages lemminflect and vaderSentiment."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from functools import cache

from starmerge_models.evaluation.tasks.generators.package import package

_PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adjective": "adj", "adverb": "adv"}
"""This task's labels and lemminflect's categories."""


def sentiment(rng: random.Random) -> Iterator[dict[str, object]]:
    """The sign of a word's mean rating in VADER's lexicon, where it is at least 1 of 4."""
    module = package("vaderSentiment.vaderSentiment")
    lexicon = module.SentimentIntensityAnalyzer().lexicon
    words = {word: mean for word, mean in lexicon.items() if word.isalpha() and abs(mean) >= 1}
    labelled = {
        label: sorted(word for word, mean in words.items() if mean * sign > 0)
        for label, sign in (("positive", 1), ("negative", -1))
    }
    size = min(map(len, labelled.values()))
    for label, members in labelled.items():
        for word in rng.sample(members, size):
            yield {"input": word, "label": label}


def past(rng: random.Random) -> Iterator[dict[str, object]]:
    """Base form to past tense; the wrong choices are misspelt or other forms of the verb."""
    for verb in _lemmas("verb"):
        label = _inflect(verb, "VBD")[0]
        wrong = {verb, verb + "ed", verb + "d", verb + verb[-1] + "ed", *_inflect(verb, "VBG")}
        yield {"input": verb, "label": label, "choices": [label, *sorted(wrong - {label})]}


def plural(rng: random.Random) -> Iterator[dict[str, object]]:
    """Singular to plural; the wrong choices are misspelt or the singular itself."""
    for noun in _lemmas("noun"):
        label = _inflect(noun, "NNS")[0]
        wrong = {noun, noun + "s", noun + "es", noun[:-1] + "ies"}
        if label.isalpha() and label != noun:
            yield {"input": noun, "label": label, "choices": [label, *sorted(wrong - {label})]}


def singular(rng: random.Random) -> Iterator[dict[str, object]]:
    """Plural to singular; the wrong choices are misspelt or the plural itself."""
    for noun in _lemmas("noun"):
        form = _inflect(noun, "NNS")[0]
        wrong = {form, form[:-1], form[:-2], form[:-3] + "y", form[:-1] + "e"}
        if form.isalpha() and form != noun:
            yield {"input": form, "label": noun, "choices": [noun, *sorted(wrong - {noun, ""})]}


def gerund(rng: random.Random) -> Iterator[dict[str, object]]:
    """Base form to -ing form; the wrong choices are misspelt or other forms of the verb."""
    for verb in _lemmas("verb"):
        label = _inflect(verb, "VBG")[0]
        wrong = {verb, verb + "ing", verb[:-1] + "ing", verb + verb[-1] + "ing"}
        wrong |= set(_inflect(verb, "VBD"))
        yield {"input": verb, "label": label, "choices": [label, *sorted(wrong - {label})]}


def third_person(rng: random.Random) -> Iterator[dict[str, object]]:
    """Base form to third person singular; the wrong choices are misspelt or other forms."""
    for verb in _lemmas("verb"):
        label = _inflect(verb, "VBZ")[0]
        wrong = {verb, verb + "s", verb + "es", verb[:-1] + "ies", *_inflect(verb, "VBG")}
        yield {"input": verb, "label": label, "choices": [label, *sorted(wrong - {label})]}


def comparative(rng: random.Random) -> Iterator[dict[str, object]]:
    """Adjective to comparative, of the adjectives of at most six letters."""
    short = (adjective for adjective in _lemmas("adj") if len(adjective) <= 6)
    for adjective in short:
        label = _inflect(adjective, "JJR")[0]
        wrong = {adjective, adjective + "er", adjective + "r", adjective + adjective[-1] + "er"}
        wrong |= {adjective[:-1] + "ier", *_inflect(adjective, "JJS")}
        if label.isalpha():
            choices = [label, *sorted(wrong - {label})]
            yield {"input": adjective, "label": label, "choices": choices}


def tense(rng: random.Random) -> Iterator[dict[str, object]]:
    """The form of a verb, one of four; only verbs whose four forms differ."""
    tags = {"past": "VBD", "gerund": "VBG", "third person": "VBZ"}
    for verb in rng.sample(_lemmas("verb"), 1200):
        forms = {"base": verb} | {label: _inflect(verb, tag)[0] for label, tag in tags.items()}
        if len(set(forms.values())) == len(forms):
            label = rng.choice(sorted(forms))
            yield {"input": forms[label], "label": label}


def part_of_speech(rng: random.Random) -> Iterator[dict[str, object]]:
    """The part of speech of a dictionary word that has only one."""
    every = {label: set(_lemmas(category)) for label, category in _PARTS_OF_SPEECH.items()}
    for label, words in every.items():
        others = set[str]().union(*(every[other] for other in every if other != label))
        only = sorted(words - others)
        for word in rng.sample(only, min(1000, len(only))):
            yield {"input": word, "label": label}


@cache
def _inflect(word: str, tag: str) -> tuple[str, ...]:
    """Return the spellings of a form of a word, by its Penn tag, such as VBD.

    Kept, as most of the time goes here, and the rows of a task are made again for each split.
    """
    forms: tuple[str, ...] = package("lemminflect").getInflection(word, tag)
    return forms


@cache
def _lemmas(category: str) -> tuple[str, ...]:
    """List the plain lower-case base forms of a category in lemminflect's dictionary, sorted."""
    config = package("lemminflect.config")
    with gzip.open(config.lemma_lu_fn, "rt", encoding="utf-8") as lines:
        entries = (line.strip().split(",") for line in lines)
        forms = {form for form, kind, lemma in entries if kind == category and lemma == form}
    plain = (word for word in forms if word.isalpha() and word.islower() and len(word) > 2)
    return tuple(sorted(plain))
