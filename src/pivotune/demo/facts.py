"""Real facts from the Unicode CLDR, each stated in a target language and in English."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from babel import Locale, UnknownLocaleError
from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from pivotune.demo.cldr import TIME_UNITS, Bilingual, BilingualLocale

# "In use" means on this day, near the release of CLDR 47: the same rows whenever they are built.
REFERENCE_DATE = datetime.date(2025, 7, 1)
# Joined the euro after CLDR 47 was released.
_OUTDATED_CURRENCY = {"BG"}
# Forms of one script ("Simplified", "Traditional"), whose CLDR names do not name a script by themselves.
_NOT_SCRIPTS = {"Hans", "Hant"}
_POOL_SIZE = 200
_FIRST_DATE, _DATE_RANGE_DAYS = datetime.date(1950, 1, 1), 32_000

# CLDR's categories and names of units whose abbreviation is known to every reader of English.
_UNITS = {
    "area": "acre hectare square-centimeter square-kilometer square-meter square-mile",
    "digital": "gigabyte kilobyte megabit megabyte petabyte terabyte",
    "electric": "ampere milliampere ohm volt",
    "energy": "calorie joule kilocalorie kilojoule kilowatt-hour",
    "frequency": "gigahertz hertz kilohertz megahertz",
    "graphics": "megapixel pixel",
    "length": "centimeter decimeter foot inch kilometer light-year meter micrometer mile millimeter nanometer"
    " nautical-mile yard",
    "light": "lux",
    "mass": "gram kilogram milligram ounce pound tonne",
    "power": "gigawatt horsepower kilowatt megawatt watt",
    "pressure": "hectopascal megapascal millibar pascal",
    "speed": "kilometer-per-hour knot meter-per-second mile-per-hour",
    "temperature": "celsius fahrenheit",
    "volume": "centiliter cubic-centimeter cubic-kilometer cubic-meter deciliter gallon hectoliter liter "
    "milliliter tablespoon teaspoon",
}


@dataclass(frozen=True)
class Fact:
    """The content of one question and its answer: `slots` holds the values of the template's slots.

    `entity` is the subject, such as 'territory:JP'; `variant` tells apart facts of one kind about one entity.
    """

    kind: str
    entity: str
    variant: str
    slots: dict[str, Bilingual]

    @property
    def name(self) -> str:
        """Unique within a language; the end of a row's id."""
        return "-".join(part for part in (self.kind, self.entity.replace(":", "-"), self.variant) if part)

    @property
    def category(self) -> str:
        return self.entity.split(":", 1)[0]


def stable_rank(*parts: object) -> int:
    """Return a pseudo-random number in [0, 2**64), the same for the same parts on every machine and Python."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def collect_facts(language: str) -> Iterator[Fact]:
    """Yield all facts that CLDR has in both the language (a code such as 'vi') and English, in a fixed order."""
    locale = BilingualLocale(language)
    for facts in (_territory_facts, _currency_facts, _language_facts, _script_facts, _calendar_facts,
                  _date_facts, _number_facts, _unit_facts, _duration_facts):  # fmt: skip
        yield from facts(locale)


def make_fact(kind: str, entity: str, variant: str = "", **slots: str | Bilingual) -> Fact:
    """Return a fact from slots that are the same in both languages (text) or differ (target, English)."""
    pairs = {name: (value, value) if isinstance(value, str) else value for name, value in slots.items()}
    return Fact(kind, entity, variant, pairs)


def _coded_facts(entity: str, name: Bilingual) -> Iterator[Fact]:
    """Yield the facts of an entity with a code and a name: each from the other, and the translations."""
    kind, code = entity.split(":")
    yield make_fact(f"{kind}_name", entity, code=code, name=name)
    yield make_fact(f"{kind}_code", entity, code=code, name=name)
    yield from _translation_facts(entity, name)


def _translation_facts(entity: str, name: Bilingual) -> Iterator[Fact]:
    """Yield the translations of a name from and into English, where the two differ."""
    target, english = name
    if target.casefold() != english.casefold():
        yield make_fact("translation", entity, term=english, translation=target)
        yield make_fact("to_english", entity, term=target, translation=english)


def _territory_facts(locale: BilingualLocale) -> Iterator[Fact]:
    """Yield facts of real territories (with a time zone), without world regions ('001') and unknown ('ZZ')."""
    zones = get_global("territory_zones")
    for code in (code for code in sorted(zones) if len(code) == 2 and code != "ZZ" and code in locale.territories):
        name, entity = locale.territories[code], f"territory:{code}"
        yield from _coded_facts(entity, name)
        for zone in sorted(zones[code]):
            yield make_fact("zone_territory", f"zone:{zone}", zone=zone, territory=name)
        # Only where there is one answer.
        currencies = [] if code in _OUTDATED_CURRENCY else _currencies_of(code)
        if len(currencies) == 1 and (currency := locale.currencies.get(currencies[0])):
            yield make_fact("territory_currency", entity, name=name, currency=currency)
        languages = get_official_languages(code, de_facto=True)
        if len(languages) == 1 and (language := locale.languages.get(languages[0])):
            yield make_fact("territory_language", entity, name=name, language=language)
        with suppress(UnknownLocaleError, ValueError):  # no locale for the territory
            weekday = locale.weekdays[Locale.parse(f"und_{code}").first_week_day]
            yield make_fact("territory_first_weekday", entity, name=name, weekday=weekday)


def _currencies_of(territory: str) -> list[str]:
    return get_territory_currencies(territory, start_date=REFERENCE_DATE, tender=True)


def _currency_facts(locale: BilingualLocale) -> Iterator[Fact]:
    in_use = {code for territory in get_global("territory_currencies") for code in _currencies_of(territory)}
    for code in sorted(in_use & locale.currencies.keys()):
        name = locale.currencies[code]
        entity = f"currency:{code}"
        yield from _coded_facts(entity, name)
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
        yield from _coded_facts(entity, name)
        if script := locale.scripts.get(_likely_script(code) or ""):
            yield make_fact("language_script", entity, name=name, script=script)


def _likely_script(language: str) -> str | None:
    """Return a language's usual script, from CLDR's likely subtags ('ja' -> 'ja_Jpan_JP')."""
    parts = get_global("likely_subtags").get(language, "").split("_")
    script = parts[1] if len(parts) > 1 and len(parts[1]) == 4 else None
    return None if script in _NOT_SCRIPTS else script


def _script_facts(locale: BilingualLocale) -> Iterator[Fact]:
    """Yield names of the usual scripts of the languages for which CLDR counts speakers."""
    known = {language for languages in get_global("territory_languages").values() for language in languages}
    in_use = {_likely_script(language) for language in known}
    for code in (code for code in locale.scripts if code in in_use):
        entity = f"script:{code}"
        yield make_fact("script_name", entity, code=code, name=locale.scripts[code])
        yield from _translation_facts(entity, locale.scripts[code])


def _calendar_facts(locale: BilingualLocale) -> Iterator[Fact]:
    """Yield names of months and weekdays, and the ones some months or days later."""
    months, weekdays = range(2, 12), [count for count in range(2, 24) if count % 7]
    for kind, unit, names, counts in (
        ("month", "month", locale.months, months),
        ("weekday", "day", locale.weekdays, weekdays),
    ):
        first = min(names)
        for number, name in names.items():
            entity = f"{kind}:{number}"
            yield from _translation_facts(entity, name)
            if kind == "month":
                yield make_fact("month_quarter", entity, month=name, quarter=locale.quarters[(number + 2) // 3])
            for count in counts:
                answer = names[first + (number - first + count) % len(names)]
                if duration := locale.measurement(count, f"duration-{unit}"):
                    own: dict[str, Bilingual] = {kind: name, "duration": duration, "answer": answer}
                    yield make_fact(f"{kind}_later", entity, str(count), **own)


def _date_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for index in range(_POOL_SIZE):
        day = _FIRST_DATE + datetime.timedelta(days=stable_rank("date", index) % _DATE_RANGE_DAYS)
        iso, entity = day.isoformat(), f"date:{day.isoformat()}"
        yield make_fact("date_long", entity, date=iso, long=locale.long_date(day))
        yield make_fact("date_iso", entity, date=locale.long_date(day), iso=iso)
        yield make_fact("date_next", entity, date=iso, long=locale.long_date(day + datetime.timedelta(days=1)))
        yield make_fact("date_month", entity, date=iso, month=locale.months[day.month])


def _number_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for index in range(_POOL_SIZE):
        digits = 4 + index % 6
        number = 10 ** (digits - 1) + stable_rank("number", index) % (9 * 10 ** (digits - 1))
        formatted = locale.grouped_number(number)
        yield make_fact("number_format", f"number:{number}", number=str(number), formatted=formatted)
        leading = 2 + stable_rank("leading digits", index) % (998 if index % 2 else 98)
        number = leading * 10 ** (3 + index % 6)
        compact = locale.compact_number(number)
        if str(number) not in compact:
            yield make_fact("number_compact", f"number:{number}", number=str(number), compact=compact)


def _unit_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for unit in (f"{category}-{name}" for category, names in _UNITS.items() for name in names.split()):
        for index in range(3):
            count = 3 + stable_rank("measurement", unit, index) % (97 if index else 8)
            symbol = locale.measurement_symbol(count, unit)
            words = locale.measurement(count, unit)
            if symbol and words and symbol not in words:
                yield make_fact("unit_amount", f"unit:{unit}", str(count), measurement=symbol, words=words)


def _duration_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for unit in TIME_UNITS:
        for count in range(2, 31):
            if duration := locale.measurement(count, f"duration-{unit}"):
                for kind, past in (("relative_past", True), ("relative_future", False)):
                    when = locale.relative_time(count, unit, past=past)
                    yield make_fact(kind, f"duration:{count}-{unit}", duration=duration, when=when)
