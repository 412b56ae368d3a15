"""Parallel question-answer rows from real facts, for `pivotune demo`.

The facts are the Unicode CLDR's, read through Babel (`pivotune.demo.facts`): names and codes of territories,
currencies, languages and scripts, calendars, dates, numbers, measurements. Templates written by hand put each
fact into a question and a short answer in the target language and in English. Rows are split by *entity*: what
a held-out question is about (a territory, a currency, a date...) is the subject of no training row, whatever
the kind of question.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pivotune.errors import UsageError

if TYPE_CHECKING:
    from pivotune.demo.facts import Fact

SUPPORTED_LANGUAGES: tuple[str, ...] = ("ar", "de", "es", "fr", "id", "ja", "pt", "sw", "vi", "zh")

# Facts per kind, so that plentiful kinds (territory names) do not drown the others (quarters of the year).
MAX_ROWS_PER_KIND = 250

# Facts per kind with one answer: most weeks begin on Monday and most languages are written in Latin script.
MAX_ROWS_PER_ANSWER = 25


@dataclass(frozen=True)
class DemoData:
    """Rows of the demo, each with id, prompt, completion, prompt_en, completion_en, entity and kind.

    No entity and no prompt occurs in both `train` and `validation`.
    """

    train: list[dict[str, str]]
    validation: list[dict[str, str]]
    language: str
    cldr_version: str
    babel_version: str


def build_demo_rows(
    language: str, *, rows: int | None = None, validation_share: float = 0.15, seed: int = 0
) -> DemoData:
    """Build the demo's rows for a language of `SUPPORTED_LANGUAGES`.

    `rows` caps the training rows, sampled evenly over the kinds of fact; None keeps all (about 4,000).
    `validation_share` is the share of the entities of each category (territories, currencies...) held out, at
    least one; `rows` does not change what is held out. The result depends on the arguments
    and the Babel release only. Takes about a second.

    Raises `UsageError` for an unsupported language, a missing Babel, rows below 1, or a share outside (0, 1).
    """
    _check_arguments(language, rows, validation_share)
    babel_version = _require_babel()
    from pivotune.demo.facts import cldr_version

    all_rows = _word_facts(language)
    held_out = _held_out_entities(all_rows, validation_share, seed)
    train = _sample_evenly([row for row in all_rows if row["entity"] not in held_out], rows, seed)
    validation = [row for row in all_rows if row["entity"] in held_out]
    return DemoData(
        train=_shuffled(train, seed),
        validation=_shuffled(validation, seed),
        language=language,
        cldr_version=cldr_version(),
        babel_version=babel_version,
    )


def write_demo_rows(data: DemoData, folder: str | Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `validation.jsonl` (UTF-8, a JSON object a line) and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, rows in zip(paths, (data.train, data.validation), strict=True):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return paths


def _check_arguments(language: str, rows: int | None, validation_share: float) -> None:
    if language not in SUPPORTED_LANGUAGES:
        raise UsageError(f"the demo has no language {language!r}; supported: {', '.join(SUPPORTED_LANGUAGES)}")
    if rows is not None and rows < 1:
        raise UsageError(f"the demo's rows: found {rows}, allowed 1 or more")
    if not 0 < validation_share < 1:
        raise UsageError(
            f"the demo's validation_share: found {validation_share}, allowed between 0 and 1, both excluded"
        )


def _require_babel() -> str:
    """The version of Babel, which only the extra `demo` installs."""
    try:
        import babel
    except ImportError:
        raise UsageError('the demo needs Babel: pip install "pivotune[demo]"') from None
    return babel.__version__


def _word_facts(language: str) -> list[dict[str, str]]:
    """All rows of the language, in the facts' order, without repeated prompts."""
    from pivotune.demo.facts import collect_facts
    from pivotune.demo.facts.wording import BilingualWording

    wording = BilingualWording.load(language)
    worded = ((fact, wording.row(fact)) for fact in collect_facts(language) if wording.covers(fact))
    # An answer that is the same text in both languages does not show which language was learned.
    usable = [(fact, row) for fact, row in worded if row["completion"] != row["completion_en"]]
    rows: list[dict[str, str]] = []
    prompts: set[str] = set()
    for fact, row in _limit_kinds(usable):
        if prompts.isdisjoint((row["prompt"], row["prompt_en"])):
            prompts |= {row["prompt"], row["prompt_en"]}
            rows.append({"id": f"{language}-{fact.name}", **row, "entity": fact.entity, "kind": fact.kind})
    return rows


def _limit_kinds(worded: Iterable[tuple[Fact, dict[str, str]]]) -> list[tuple[Fact, dict[str, str]]]:
    """At most `MAX_ROWS_PER_KIND` facts of a kind and `MAX_ROWS_PER_ANSWER` with one answer.

    Chosen by a hash of the entity first, so that the kinds keep the same entities.
    """
    from pivotune.demo.facts import stable_rank

    kinds: Counter[str] = Counter()
    answers: Counter[tuple[str, str]] = Counter()
    kept = []
    for fact, row in sorted(worded, key=lambda pair: (stable_rank(pair[0].entity), stable_rank(pair[0].name))):
        answer = (fact.kind, row["completion"])
        if kinds[fact.kind] < MAX_ROWS_PER_KIND and answers[answer] < MAX_ROWS_PER_ANSWER:
            kinds[fact.kind] += 1
            answers[answer] += 1
            kept.append((fact, row))
    return kept


def _held_out_entities(rows: list[dict[str, str]], share: float, seed: int) -> set[str]:
    """The share of the entities of every category, at least one of each."""
    from pivotune.demo.facts import stable_rank

    categories: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        categories[row["entity"].split(":", 1)[0]].add(row["entity"])
    held_out: set[str] = set()
    for entities in categories.values():
        ranked = sorted(entities, key=lambda entity: stable_rank("split", seed, entity))
        held_out.update(ranked[: max(1, round(share * len(ranked)))])
    return held_out


def _sample_evenly(rows: list[dict[str, str]], limit: int | None, seed: int) -> list[dict[str, str]]:
    """`limit` rows, as many of each kind as of the others where there are; a larger limit only adds rows."""
    from pivotune.demo.facts import stable_rank

    ranked = sorted(rows, key=lambda row: stable_rank("sample", seed, row["id"]))
    position: Counter[str] = Counter()
    rounds = []
    for row in ranked:
        rounds.append((position[row["kind"]], row))
        position[row["kind"]] += 1
    return [row for _, row in sorted(rounds, key=lambda pair: pair[0])][:limit]


def _shuffled(rows: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    from pivotune.demo.facts import stable_rank

    return sorted(rows, key=lambda row: stable_rank("order", seed, row["id"]))
