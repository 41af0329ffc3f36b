"""Rows about places, from pycountry and from the cities of GeoNames in starmerge_models_demo."""

from __future__ import annotations

import csv
import gettext
import random
from collections.abc import Iterator
from pathlib import Path

from starmerge_models.evaluation.tasks.generators.package import package

_COUNTRIES = {
    "Britain": "GB",
    "Czechia": "CZ",
    "France": "FR",
    "Italy": "IT",
    "Russia": "RU",
    "Slovenia": "SI",
    "Thailand": "TH",
    "Turkey": "TR",
    "Uganda": "UG",
    "Vietnam": "VN",
}

_CONTINENTS = {
    "Africa": "AF",
    "Asia": "AS",
    "Europe": "EU",
    "North America": "NA",
    "South America": "SA",
}

_TONGUES = {
    "Dutch": "nl",
    "Finnish": "fi",
    "French": "fr",
    "Hungarian": "hu",
    "Polish": "pl",
    "Spanish": "es",
}


def country(rng: random.Random) -> Iterator[dict[str, object]]:
    """The country of a subdivision (ISO 3166-2), one of ten with many of them."""
    subdivisions = package("pycountry").subdivisions
    for label, code in _COUNTRIES.items():
        names = sorted({place.name for place in subdivisions.get(country_code=code)})
        for name in rng.sample(names, min(150, len(names))):
            yield {"input": name, "label": label}


def _cities() -> list[dict[str, str]]:
    """Return the cities of over 15,000 people: name, continent's code, hemisphere."""
    file: Path = package("starmerge_models_demo").CITIES
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def continent(rng: random.Random) -> Iterator[dict[str, object]]:
    """The continent of a city of over 15,000 people, as many cities for each continent."""
    cities = _cities()
    for label, code in _CONTINENTS.items():
        names = sorted({city["name"] for city in cities if city["continent"] == code})
        for name in rng.sample(names, 600):
            yield {"input": name, "label": label}


def hemisphere(rng: random.Random) -> Iterator[dict[str, object]]:
    """Whether a city of over 15,000 people lies north or south of the equator."""
    cities = _cities()
    for label in ("north", "south"):
        names = sorted({city["name"] for city in cities if city["hemisphere"] == label})
        for name in rng.sample(names, 1250):
            yield {"input": name, "label": label}


def kind(rng: random.Random) -> Iterator[dict[str, object]]:
    """Whether a name of an ISO standard is that of a country, currency, language or script."""
    pycountry = package("pycountry")
    lists = {
        "country": pycountry.countries,
        "currency": pycountry.currencies,
        "language": pycountry.languages,
        "script": pycountry.scripts,
    }
    for label, entries in lists.items():
        names = sorted({entry.name for entry in entries})
        for name in rng.sample(names, min(400, len(names))):
            yield {"input": name, "label": label}


def tongue(rng: random.Random) -> Iterator[dict[str, object]]:
    """The language in which the name of a country is written, one of six."""
    pycountry = package("pycountry")
    for label, code in _TONGUES.items():
        catalogue = gettext.translation("iso3166-1", pycountry.LOCALES_DIR, languages=[code])
        for entry in pycountry.countries:
            name = catalogue.gettext(entry.name)
            if name != entry.name:
                yield {"input": name, "label": label}
