"""Languages and their codes in published data sets.

`languages.csv` has one row per language and script, with the fields of `Language`: FLORES-200 (`set` is `flores`; codes
from the README of facebookresearch/flores, `flores200`), then languages of NTREX-128, Tatoeba and users (`other`).
`aliases` are retired and other codes for lookup, `ntrex_regions` the codes with a region in NTREX-128's file names.
"""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources

from pivotune.errors import UsageError

# A script or region that selects Chinese in traditional characters.
_TRADITIONAL = frozenset(("hant", "tw", "hk", "mo"))
# Country codes that are often typed for a language.
_COUNTRIES = {
    "vn": "vi", "cn": "zh", "jp": "ja", "kr": "ko", "cz": "cs", "ua": "uk", "gr": "el", "dk": "da", "ir": "fa",
}  # fmt: skip

_TAG = re.compile(r"([A-Za-z]{2,3})([-_][A-Za-z0-9]{1,8})*")
# ISO 639-1 codes that `languages.csv` lacks.
_OTHER_CODES = frozenset((
    "aa", "ae", "av", "bh", "bi", "ce", "ch", "cr", "cu", "ho", "hz", "ii", "ik",
    "iu", "kj", "kv", "lu", "mh", "na", "ng", "nr", "oj", "pi", "se", "sh", "za",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Language:
    """One language in one script.

    Attributes:
        code: two-letter ISO 639-1 code; the FLORES code for a second script or a language without one.
        flores: FLORES-200 code (`vie_Latn`).
        iso639_3: three-letter codes in file names, likeliest first (`arb`, `ara`; `cmn` for Chinese); empty for a
            second script.
        ntrex: codes in NTREX-128's file names, likeliest first: `vie`, `zho-CN`, `srp-Cyrl`; regional ones last.
        aliases: further codes for lookup.
        name: in English.
        in_flores: True for a language of FLORES-200.
    """

    code: str
    flores: str
    iso639_3: tuple[str, ...]
    ntrex: tuple[str, ...]
    aliases: tuple[str, ...]
    name: str
    in_flores: bool

    @property
    def script(self) -> str:
        """ISO 15924 code (`Latn`)."""
        return self.flores.partition("_")[2]

    @property
    def is_chinese(self) -> bool:
        """True for text in Chinese characters alone, each of which stands for a word."""
        return self.script in ("Hans", "Hant")


@cache
def find_language(code: str) -> Language:
    """Return the language of an ISO 639-1 (`vi`), FLORES (`vie_Latn`), ISO 639-3, NTREX or tag (`zh-TW`, `pt-BR`) code.

    Only Chinese regions count: sets have one text per language and script.

    Raises:
        UsageError: unknown code, or unknown script of a known language; the message names the nearest codes.
    """
    base, *rest = re.split("[-_]", code.strip().lower())
    known = _languages_by_code()
    language = known.get("_".join([base, *rest])) or known.get(base)
    if language is None:
        raise UsageError(f"language {code!r} is unknown; {_nearest_codes(code)}")
    if language.code == "zh" and _TRADITIONAL.intersection(rest):
        return known["zho_hant"]
    if any(len(part) == 4 and part.isalpha() and part != language.script.lower() for part in rest):
        raise UsageError(
            f"language {code!r} is unknown: {language.name} is {language.flores} here; {_nearest_codes(code)}"
        )
    return language


@lru_cache(maxsize=4096)
def known_language(text: str) -> Language | None:
    """Return the language of a code or an English name (`vie`, `Vietnamese`, `Standard Arabic`); None for other text."""
    try:
        return find_language(text)
    except UsageError:
        names = {language.name.casefold(): language for language in _languages()}
        name = text.strip().casefold()
        return names.get(name) or names.get(name.split()[-1] if name else "")


def check_language(code: str, option: str) -> None:
    """Refuse a text that is no language code, before it names folders and reports.

    Three letters pass: ISO 639-3 has thousands of codes. So does any script or region.

    Raises:
        UsageError: names `option`, the text and the nearest codes.
    """
    tag = _TAG.fullmatch(code)
    base = tag[1].lower() if tag else ""
    if len(base) != 3 and base not in _OTHER_CODES and base not in _languages_by_code():
        raise UsageError(f"{option}: {code!r} is not a language code; {_nearest_codes(code)}")


def is_english(code: str) -> bool:
    """Return True for a code of English, with any script or region."""
    return re.split("[-_]", code.lower())[0] in ("en", "eng")


@cache
def flores_languages() -> tuple[str, ...]:
    """Return `Language.code` of every language of FLORES-200 except English."""
    return tuple(language.code for language in _languages() if language.in_flores and language.code != "en")


@cache
def _languages() -> tuple[Language, ...]:
    text = (resources.files("pivotune.text") / "languages.csv").read_text(encoding="utf-8")
    languages = []
    for row in csv.DictReader(text.splitlines()):
        flores, (base, script) = row["flores"], row["flores"].split("_")
        iso639_3, aliases, regions = (tuple(row[name].split()) for name in ("iso639_3", "aliases", "ntrex_regions"))
        with_script = [f"{code}-{script}" for code in iso639_3 or (base,)]
        # NTREX-128 names Chinese by region only.
        ntrex = regions if base == "zho" else (*iso639_3, *with_script, *regions)
        code, in_flores = row["iso639_1"] or flores, row["set"] == "flores"
        languages.append(Language(code, flores, iso639_3, ntrex, aliases, row["name"], in_flores))
    return tuple(languages)


@cache
def _languages_by_code() -> dict[str, Language]:
    """Map every code, in lower case with `_`, to its language."""
    return {
        code.lower(): language
        for language in _languages()
        for code in (language.code, language.flores, *language.iso639_3, *language.aliases)
    }


def _nearest_codes(code: str) -> str:
    wanted = code.strip()
    names = {language.name: language.code for language in _languages()}
    by_name = difflib.get_close_matches(wanted.title(), names, n=1, cutoff=0.8)
    if by_name or wanted.lower() in _COUNTRIES:
        meant = names[by_name[0]] if by_name else _COUNTRIES[wanted.lower()]
        return f"{find_language(meant).name} is {meant}"
    codes = dict.fromkeys(code for language in _languages() for code in (language.code, language.flores))
    near = difflib.get_close_matches(wanted, codes, n=3, cutoff=0.4)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    return f"{nearest}allowed: ISO 639-1 codes (vi) and FLORES codes (vie_Latn)"
