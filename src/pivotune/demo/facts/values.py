"""Facts about values a person writes out: months, weekdays, dates, numbers, measurements, spans of time."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

from pivotune.demo.facts.cldr import TIME_UNITS, BilingualLocale
from pivotune.demo.facts.fact import Fact, make_fact, stable_rank
from pivotune.demo.facts.names import translation_facts

_POOL_SIZE = 200
_FIRST_DATE = datetime.date(1950, 1, 1)
_DATE_RANGE_DAYS = 32_000

# CLDR's categories and names of units whose abbreviation is known to every reader of English.
_UNITS = {
    "area": "acre hectare square-centimeter square-kilometer square-meter square-mile",
    "digital": "gigabyte kilobyte megabit megabyte petabyte terabyte",
    "electric": "ampere milliampere ohm volt",
    "energy": "calorie joule kilocalorie kilojoule kilowatt-hour",
    "frequency": "gigahertz hertz kilohertz megahertz",
    "graphics": "megapixel pixel",
    "length": "centimeter decimeter foot inch kilometer light-year meter micrometer mile millimeter nanometer "
    "nautical-mile yard",
    "light": "lux",
    "mass": "gram kilogram milligram ounce pound tonne",
    "power": "gigawatt horsepower kilowatt megawatt watt",
    "pressure": "hectopascal megapascal millibar pascal",
    "speed": "kilometer-per-hour knot meter-per-second mile-per-hour",
    "temperature": "celsius fahrenheit",
    "volume": "centiliter cubic-centimeter cubic-kilometer cubic-meter deciliter gallon hectoliter liter "
    "milliliter tablespoon teaspoon",
}


def value_facts(locale: BilingualLocale) -> Iterator[Fact]:
    """All facts of this module."""
    yield from _month_facts(locale)
    yield from _weekday_facts(locale)
    yield from _date_facts(locale)
    yield from _number_facts(locale)
    yield from _unit_facts(locale)
    yield from _duration_facts(locale)


def _month_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for month, name in locale.months.items():
        entity = f"month:{month}"
        yield from translation_facts(entity, name)
        yield make_fact("month_quarter", entity, month=name, quarter=locale.quarters[(month + 2) // 3])
        for count in range(2, 12):
            duration = locale.measurement(count, "duration-month")
            answer = locale.months[(month + count - 1) % 12 + 1]
            if duration:
                yield make_fact("month_later", entity, str(count), month=name, duration=duration, answer=answer)


def _weekday_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for day, name in locale.weekdays.items():
        entity = f"weekday:{day}"
        yield from translation_facts(entity, name)
        for count in (count for count in range(2, 24) if count % 7):
            duration = locale.measurement(count, "duration-day")
            answer = locale.weekdays[(day + count) % 7]
            if duration:
                yield make_fact("weekday_later", entity, str(count), weekday=name, duration=duration, answer=answer)


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
        yield make_fact(
            "number_format", f"number:{number}", number=str(number), formatted=locale.grouped_number(number)
        )
        leading = 2 + stable_rank("leading digits", index) % (998 if index % 2 else 98)
        yield from _compact_number_facts(locale, leading * 10 ** (3 + index % 6))


def _compact_number_facts(locale: BilingualLocale, number: int) -> Iterator[Fact]:
    compact = locale.compact_number(number)
    if str(number) not in compact:
        yield make_fact("number_compact", f"number:{number}", number=str(number), compact=compact)


def _unit_facts(locale: BilingualLocale) -> Iterator[Fact]:
    units = (f"{category}-{name}" for category, names in _UNITS.items() for name in names.split())
    for unit in units:
        for index in range(3):
            count = 3 + stable_rank("measurement", unit, index) % (97 if index else 8)
            symbol = locale.measurement_symbol(count, unit)
            words = locale.measurement(count, unit)
            if symbol and words and symbol not in words:
                yield make_fact("unit_amount", f"unit:{unit}", str(count), measurement=symbol, words=words)


def _duration_facts(locale: BilingualLocale) -> Iterator[Fact]:
    for unit in TIME_UNITS:
        for count in range(2, 31):
            duration = locale.measurement(count, f"duration-{unit}")
            if duration is None:
                continue
            entity = f"duration:{count}-{unit}"
            for kind, past in (("relative_past", True), ("relative_future", False)):
                yield make_fact(kind, entity, duration=duration, when=locale.relative_time(count, unit, past=past))
