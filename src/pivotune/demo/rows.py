"""Parallel question-answer rows from real facts, for `pivotune demo`.

Templates written by hand (`pivotune/demo/templates`) put each fact of the Unicode CLDR (`pivotune.demo.facts`) into a
question and a short answer in the target language and in English. Rows are split by *entity*: the subject of a held-out
question (a territory, a currency, a date...) is the subject of no training row, for all kinds of question.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pivotune.demo.cldr import cldr_version
from pivotune.demo.facts import Fact, collect_facts, stable_rank
from pivotune.errors import UsageError

SUPPORTED_LANGUAGES: tuple[str, ...] = ("ar", "de", "es", "fr", "id", "ja", "pt", "sw", "vi", "zh")

# Facts per kind, so that plentiful kinds (territory names) do not drown the others (quarters of the year).
MAX_ROWS_PER_KIND = 250
# Facts per kind with one answer: most weeks begin on Monday and most languages are written in Latin script.
MAX_ROWS_PER_ANSWER = 25
# Share of the entities of each category (territories, currencies...) held out, at least one.
HELDOUT_SHARE = 0.15


@dataclass(frozen=True)
class DemoData:
    """Rows of the demo, each with id, prompt, completion, prompt_en, completion_en, entity and kind.

    No entity and no prompt occurs in both `train` and `validation`.
    """

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    cldr_version: str


def build_demo_rows(language: str, *, rows: int | None = None, seed: int = 0) -> DemoData:
    """Build the demo's rows for a language of `SUPPORTED_LANGUAGES`, in about a second.

    The result depends on the arguments and the Babel release only.

    Args:
        rows: number of training rows, sampled evenly over the kinds of fact; None keeps all (about 4,000). It does not
            change the held-out rows.

    Raises:
        UsageError: an unsupported language, or rows below 1.
    """
    if language not in SUPPORTED_LANGUAGES:
        raise UsageError(f"the demo has no language {language!r}; supported: {', '.join(SUPPORTED_LANGUAGES)}")
    if rows is not None and rows < 1:
        raise UsageError(f"the demo's rows: found {rows}, allowed 1 or more")
    all_rows = worded_rows(language)
    categories: defaultdict[str, set[str]] = defaultdict(set)
    for row in all_rows:
        categories[row["entity"].partition(":")[0]].add(row["entity"])
    held_out: set[str] = set()
    for entities in categories.values():
        ranked = sorted(entities, key=lambda entity: stable_rank("split", seed, entity))
        held_out.update(ranked[: max(1, round(HELDOUT_SHARE * len(ranked)))])

    def shuffled(chosen: Iterable[dict[str, str]]) -> list[dict[str, str]]:
        return sorted(chosen, key=lambda row: stable_rank("order", seed, row["id"]))

    # Spread evenly over the kinds as far as they go; a larger number of rows only adds rows.
    position: Counter[str] = Counter()
    rounds = []
    trained = (row for row in all_rows if row["entity"] not in held_out)
    for row in sorted(trained, key=lambda row: stable_rank("sample", seed, row["id"])):
        rounds.append((position[row["kind"]], row))
        position[row["kind"]] += 1
    train = [row for _, row in sorted(rounds, key=lambda pair: pair[0])][:rows]
    return DemoData(shuffled(train), shuffled(row for row in all_rows if row["entity"] in held_out), cldr_version())


def write_demo_rows(data: DemoData, folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `validation.jsonl` (UTF-8, a JSON object a line) and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, rows in zip(paths, (data.train, data.validation), strict=True):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return paths


def load_wording(language: str) -> dict[str, Any]:
    """Return the templates of a language.

    `language_name` is its name in English, `categories` maps a category of entity to its word, `kinds` a kind of fact to
    its prompts and its completion.
    """
    path = resources.files("pivotune.demo") / "templates" / f"{language}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def worded_facts(language: str) -> Iterator[tuple[Fact, dict[str, str]]]:
    """Yield every fact that a language has templates for, with its `prompt`, `completion` and their English twins."""
    target, english = load_wording(language), load_wording("en")
    for fact in collect_facts(language):
        if fact.kind not in target["kinds"]:
            continue
        number = stable_rank("prompt", fact.name) % len(english["kinds"][fact.kind]["prompts"])
        row = {}
        for side, (suffix, wording) in enumerate((("", target), ("_en", english))):
            templates = wording["kinds"][fact.kind]
            values = {name: pair[side] for name, pair in fact.slots.items()}
            category = wording["categories"].get(fact.category, "")
            slots = {"category": category, "target_language": target["language_name"], **values}
            row[f"prompt{suffix}"] = templates["prompts"][number].format_map(slots)
            row[f"completion{suffix}"] = templates["completion"].format_map(slots)
        yield fact, row


def worded_rows(language: str) -> list[dict[str, str]]:
    """Return all rows of a language without repeated prompts.

    At most `MAX_ROWS_PER_KIND` rows of a kind and `MAX_ROWS_PER_ANSWER` with one answer are kept, chosen by a hash of the
    entity first, so that the kinds keep the same entities.
    """
    kinds: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    rows: list[dict[str, str]] = []
    prompts: set[str] = set()
    facts = sorted(worded_facts(language), key=lambda each: (stable_rank(each[0].entity), stable_rank(each[0].name)))
    for fact, row in facts:
        # An answer that is the same text in both languages does not show which language was learned.
        if row["completion"] == row["completion_en"]:
            continue
        answer = (fact.kind, row["completion"])
        if kinds[fact.kind] >= MAX_ROWS_PER_KIND or answers[answer] >= MAX_ROWS_PER_ANSWER:
            continue
        kinds[fact.kind] += 1
        answers[answer] += 1
        if prompts.isdisjoint((row["prompt"], row["prompt_en"])):
            prompts |= {row["prompt"], row["prompt_en"]}
            rows.append({"id": f"{language}-{fact.name}", **row, "entity": fact.entity, "kind": fact.kind})
    return rows
