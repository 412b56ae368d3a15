"""Real facts from the Unicode CLDR (through Babel), each stated in a target language and in English.

`collect_facts` is the entry point; `pivotune.demo.rows` makes rows of the facts. Importing this package needs
Babel.
"""

from __future__ import annotations

from pivotune.demo.facts.cldr import BilingualLocale
from pivotune.demo.facts.fact import Fact, stable_rank
from pivotune.demo.facts.names import name_facts
from pivotune.demo.facts.values import value_facts

__all__ = ["Fact", "cldr_version", "collect_facts", "stable_rank"]


def collect_facts(language: str) -> list[Fact]:
    """Every fact CLDR has in both the language (a code such as 'vi') and English, in a fixed order."""
    locale = BilingualLocale.parse(language)
    return [*name_facts(locale), *value_facts(locale)]


def cldr_version() -> str:
    """The CLDR release inside the installed Babel, such as '47'."""
    from babel.core import get_global

    return str(get_global("cldr")["version"])
