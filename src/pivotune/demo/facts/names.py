"""Facts about things with a name and a code: territories, currencies, languages, scripts, time zones."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from babel import Locale, UnknownLocaleError
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from pivotune.demo.facts.cldr import BilingualLocale, Pair
from pivotune.demo.facts.fact import Fact, make_fact, stable_rank

# "In use" means on this day, near the release of CLDR 47: the same rows whenever they are built.
REFERENCE_DATE = datetime.date(2025, 7, 1)

# Joined the euro after CLDR 47 was released.
_OUTDATED_CURRENCY = {"BG"}

# Forms of one script ("Simplified", "Traditional"), whose CLDR names do not name a script by themselves.
_NOT_SCRIPTS = {"Hans", "Hant"}


def name_facts(locale: BilingualLocale) -> Iterator[Fact]:
    """All facts of this module."""
    yield from _territory_facts(locale)
    yield from _currency_facts(locale)
    yield from _language_facts(locale)
    yield from _script_facts(locale)
    yield from _zone_facts(locale)


def translation_facts(entity: str, name: Pair) -> Iterator[Fact]:
    """The name from English and into English, where the two differ."""
    target, english = name
    if target.casefold() != english.casefold():
        yield make_fact("translation", entity, term=english, translation=target)
        yield make_fact("to_english", entity, term=target, translation=english)


def _territory_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for code in _territory_codes(locale):
        name = locale.territories[code]
        entity = f"territory:{code}"
        yield make_fact("territory_name", entity, code=code, name=name)
        yield make_fact("territory_code", entity, code=code, name=name)
        yield from translation_facts(entity, name)
        currency = locale.currencies.get(_single_currency(code) or "")
        if currency:
            yield make_fact("territory_currency", entity, name=name, currency=currency)
        language = locale.languages.get(_single_official_language(code) or "")
        if language:
            yield make_fact("territory_language", entity, name=name, language=language)
        weekday = _first_weekday(code)
        if weekday is not None:
            yield make_fact("territory_first_weekday", entity, name=name, weekday=locale.weekdays[weekday])


def _territory_codes(locale: BilingualLocale) -> list[str]:
    """Codes of real territories (those with a time zone), neither world regions ('001') nor unknown ('ZZ')."""
    codes = (code for code in sorted(get_global("territory_zones")) if len(code) == 2 and code != "ZZ")
    return [code for code in codes if code in locale.territories]


def _currencies_of(territory: str) -> list[str]:
    return get_territory_currencies(territory, start_date=REFERENCE_DATE, tender=True)


def _single_currency(territory: str) -> str | None:
    if territory in _OUTDATED_CURRENCY:
        return None
    codes = _currencies_of(territory)
    return codes[0] if len(codes) == 1 else None


def _single_official_language(territory: str) -> str | None:
    codes = get_official_languages(territory, de_facto=True)
    return codes[0] if len(codes) == 1 else None


def _first_weekday(territory: str) -> int | None:
    """0 for Monday to 6 for Sunday; None where CLDR has no locale for the territory."""
    try:
        return Locale.parse(f"und_{territory}").first_week_day
    except (UnknownLocaleError, ValueError):
        return None


def _currency_facts(locale: BilingualLocale) -> Iterator[Fact]:
    in_use = {code for territory in get_global("territory_currencies") for code in _currencies_of(territory)}
    for code in sorted(in_use & locale.currencies.keys()):
        name = locale.currencies[code]
        entity = f"currency:{code}"
        yield make_fact("currency_name", entity, code=code, name=name)
        yield make_fact("currency_code", entity, code=code, name=name)
        yield from translation_facts(entity, name)
        symbol = locale.currency_symbol(code)
        # Symbols that CLDR words differently per language ("$", "US$") are no parallel fact.
        if symbol[0] == symbol[1] != code:
            yield make_fact("currency_symbol", entity, code=code, name=name, symbol=symbol)
        count = 3 + stable_rank("currency_amount", code) % 900
        amount = locale.currency_amount(count, code)
        yield make_fact("currency_amount", entity, code=code, count=str(count), amount=amount)


def _language_facts(locale: BilingualLocale) -> Iterator[Fact]:
    outdated = get_global("language_aliases")
    for code in (code for code in locale.languages if len(code) == 2 and code not in outdated):
        name = locale.languages[code]
        entity = f"language:{code}"
        yield make_fact("language_name", entity, code=code, name=name)
        yield make_fact("language_code", entity, code=code, name=name)
        yield from translation_facts(entity, name)
        script = locale.scripts.get(_likely_script(code) or "")
        if script:
            yield make_fact("language_script", entity, name=name, script=script)


def _likely_script(language: str) -> str | None:
    """The script a language is usually written in, from CLDR's likely subtags ('ja' -> 'ja_Jpan_JP')."""
    parts = get_global("likely_subtags").get(language, "").split("_")
    script = parts[1] if len(parts) > 1 and len(parts[1]) == 4 else None
    return None if script in _NOT_SCRIPTS else script


def _script_facts(locale: BilingualLocale) -> Iterator[Fact]:
    """Scripts in which some language that CLDR counts speakers or readers of is usually written."""
    known = {language for languages in get_global("territory_languages").values() for language in languages}
    in_use = {_likely_script(language) for language in known}
    for code in (code for code in locale.scripts if code in in_use):
        entity = f"script:{code}"
        yield make_fact("script_name", entity, code=code, name=locale.scripts[code])
        yield from translation_facts(entity, locale.scripts[code])


def _zone_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for territory in _territory_codes(locale):
        for zone in sorted(get_global("territory_zones")[territory]):
            name = locale.territories[territory]
            yield make_fact("zone_territory", f"zone:{zone}", zone=zone, territory=name)
