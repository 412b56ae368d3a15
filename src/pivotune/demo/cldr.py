"""Names and formats of two CLDR locales side by side: the target language and English, read through Babel.

Importing this module without Babel raises a `UsageError`.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from pivotune.errors import UsageError

try:
    from babel import Locale, dates, numbers
    from babel.core import get_global
except ImportError:
    raise UsageError('the demo needs Babel: pip install "pivotune[demo]"') from None

# The text in the target language, then in English.
Bilingual = tuple[str, str]
TimeUnit = Literal["year", "month", "week", "day", "hour", "minute", "second"]
TIME_UNITS: tuple[TimeUnit, ...] = get_args(TimeUnit)

_BIDIRECTIONAL_MARKS = dict.fromkeys(map(ord, "\u200e\u200f\u061c"))


def clean_text(text: str) -> str:
    """Return text as a person would type it: NFC, plain spaces for no-break ones, no invisible direction marks."""
    return " ".join(unicodedata.normalize("NFC", text).translate(_BIDIRECTIONAL_MARKS).split())


class BilingualLocale:
    """The target language's CLDR data beside the English one.

    `territories`, `languages`, `currencies` and `scripts` map codes to names; `months` 1 to 12, `weekdays` 0 (Monday) to 6
    and `quarters` 1 to 4.
    """

    def __init__(self, language: str) -> None:
        self.target, self.english = Locale.parse(language), Locale.parse("en")
        self.territories, self.languages = self._names("territories"), self._names("languages")
        self.currencies, self.scripts = self._names("currencies"), self._names("scripts")
        self.months = self._calendar(dates.get_month_names, range(1, 13))
        self.weekdays = self._calendar(dates.get_day_names, range(7))
        self.quarters = self._calendar(dates.get_quarter_names, range(1, 5))

    def long_date(self, day: datetime.date) -> Bilingual:
        """Return the date in the long format: '15. März 2024', 'March 15, 2024'."""
        return self._pair(lambda locale: dates.format_date(day, "long", locale=locale))

    def grouped_number(self, number: int) -> Bilingual:
        """Return the number with thousands separators."""
        return self._pair(lambda locale: numbers.format_decimal(number, locale=locale))

    def compact_number(self, number: int) -> Bilingual:
        """Return the number with a word for its magnitude: '3,4 Millionen', '3.4 million'."""

        def compact(locale: Locale) -> str:
            # Chinese and Japanese have one form only, which CLDR files under "short".
            length = "long" if "long" in locale.compact_decimal_formats else "short"
            return numbers.format_compact_decimal(number, format_type=length, locale=locale, fraction_digits=2)

        return self._pair(compact)

    def currency_amount(self, count: int, code: str) -> Bilingual:
        """Return a whole amount with the currency's name in the right plural form."""
        options: Any = {"format_type": "name", "currency_digits": False}
        return self._pair(lambda locale: numbers.format_currency(count, code, locale=locale, **options))

    def currency_symbol(self, code: str) -> Bilingual:
        """Return the currency's symbol; the code itself where CLDR has none."""
        return self._pair(lambda locale: numbers.get_currency_symbol(code, locale))

    def measurement(self, count: int, unit: str) -> Bilingual | None:
        """Return a count with the unit's name in words; None where CLDR has no name. `unit` like 'length-meter'."""
        target = _measurement(count, unit, self.target, ("long", "short"))
        english = _measurement(count, unit, self.english, ("long",))
        return (target, english) if target and english else None

    def measurement_symbol(self, count: int, unit: str) -> str | None:
        """Return a count with the unit's abbreviation, as written in English: '5 km'."""
        return _measurement(count, unit, self.english, ("short",))

    def relative_time(self, count: int, unit: TimeUnit, *, past: bool) -> Bilingual:
        """Return '3 days ago' or 'in 3 days'."""
        seconds = dict(dates.TIMEDELTA_UNITS)[unit] * count
        delta = datetime.timedelta(seconds=-seconds if past else seconds)
        # A threshold that no count reaches keeps Babel from moving to a larger unit.
        options: Any = {"granularity": unit, "threshold": 10**9, "add_direction": True}
        return self._pair(lambda locale: dates.format_timedelta(delta, locale=locale, **options))

    def _pair(self, text_of: Callable[[Locale], str]) -> Bilingual:
        return clean_text(text_of(self.target)), clean_text(text_of(self.english))

    def _calendar(self, names_of: Callable[..., Any], numbers: Iterable[int]) -> dict[int, Bilingual]:
        # Not in the `stand-alone` context, whose names Babel (2.18) mixes up between locales (python-babel issue 1234).
        target, english = (names_of("wide", "format", locale) for locale in (self.target, self.english))
        return {number: (clean_text(target[number]), clean_text(english[number])) for number in numbers}

    def _names(self, table: str) -> dict[str, Bilingual]:
        """Return code -> names for the codes with one plain name of their own in both languages.

        Left out: a name missing or equal to its code (untranslated), a name with a bracketed remark, a name
        shared by two codes (the question back from name to code would have two answers).
        """
        plain = []
        for locale in (self.target, self.english):
            names = {code: clean_text(name) for code, name in getattr(locale, table).items()}
            counts = Counter(name.casefold() for name in names.values())
            unique = {code: name for code, name in names.items() if name and counts[name.casefold()] == 1}
            kept = (item for item in unique.items() if item[1].casefold() != item[0].casefold())
            plain.append({code: name for code, name in kept if not set(name) & set("([\uff08")})
        target, english = plain
        return {code: (target[code], english[code]) for code in sorted(target.keys() & english.keys())}


def _measurement(count: int, unit: str, locale: Locale, lengths: tuple[str, ...]) -> str | None:
    patterns = locale._data["unit_patterns"].get(unit, {})
    for length in lengths:
        if pattern := (patterns.get(length) or {}).get(locale.plural_form(count)):
            return clean_text(pattern.format(numbers.format_decimal(count, locale=locale)))
    return None


def cldr_version() -> str:
    """Return the CLDR release inside the installed Babel, such as '47'."""
    return str(get_global("cldr")["version"])
