"""Question and answer templates per language, from the YAML files of `pivotune/demo/templates`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from pivotune.demo.facts.fact import Fact, stable_rank


@dataclass(frozen=True)
class Wording:
    """The templates of one language.

    `kinds` maps a kind of fact to its prompts and its completion, `categories` a category of entity to its word;
    `language_name` is the language's name in English.
    """

    language_name: str
    categories: dict[str, str]
    kinds: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, language: str) -> Wording:
        """Read the templates of a language code."""
        path = resources.files("pivotune.demo") / "templates" / f"{language}.yaml"
        return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class BilingualWording:
    """Puts a fact into words of the target language and of English, with the same choice of prompt in both."""

    target: Wording
    english: Wording

    @classmethod
    def load(cls, language: str) -> BilingualWording:
        """Read the templates of a language code and of English."""
        return cls(Wording.load(language), Wording.load("en"))

    def covers(self, fact: Fact) -> bool:
        """Whether the target language has templates for this kind of fact."""
        return fact.kind in self.target.kinds

    def row(self, fact: Fact) -> dict[str, str]:
        """`prompt`, `completion` and their English twins."""
        number = stable_rank("prompt", fact.name) % len(self.english.kinds[fact.kind]["prompts"])
        prompt, completion = self._fill(self.target, fact, fact.target, number)
        prompt_en, completion_en = self._fill(self.english, fact, fact.english, number)
        return {
            "prompt": prompt,
            "completion": completion,
            "prompt_en": prompt_en,
            "completion_en": completion_en,
        }

    def _fill(self, wording: Wording, fact: Fact, slots: dict[str, str], number: int) -> tuple[str, str]:
        templates = wording.kinds[fact.kind]
        slots = {
            "category": wording.categories.get(fact.category, ""),
            "target_language": self.target.language_name,
            **slots,
        }
        return templates["prompts"][number].format_map(slots), templates["completion"].format_map(slots)
