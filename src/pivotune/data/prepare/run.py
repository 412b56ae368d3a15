"""From a source to rows of the contract: read, near-duplicates and overlapping rows left out, split, report and card.

Beside `rows.jsonl` lie `rows.validation.jsonl`, `rows.report.json` and the dataset card `rows.README.md`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pivotune.data.check import report_path, row_record
from pivotune.data.check.run import first_places
from pivotune.data.lazy import Subset
from pivotune.data.prepare.corpora import ENGLISH, open_corpus
from pivotune.data.prepare.near_duplicates import near_duplicates, shingle_length
from pivotune.data.prepare.overlap import Overlap, find_overlap
from pivotune.data.prepare.tasks import TASKS
from pivotune.data.rows import Row
from pivotune.data.sources import Rows, load_rows
from pivotune.errors import UsageError
from pivotune.text.escaping import markdown
from pivotune.text.files import write_json, write_jsonl, write_text
from pivotune.text.languages import Language
from pivotune.text.redaction import redact

REASONS = {
    "too_short": "is too short to be cut into prompt and answer",
    "overlap": "shares text with an evaluation set",
    "near_duplicate": "is a near-duplicate of an earlier row",
}
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
# Shows progress: takes a title and a total.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """Options of `pivotune data prepare`.

    Attributes:
        columns: columns of the sentence in the language and in English; None to find them.
        task: key of `TASKS`, for parallel sentences.
        near_duplicates: least Jaccard similarity of near-duplicates; 0 keeps them.
        validation: number of rows for the second file.
        license: of the rows, for the card; empty for unknown.
    """

    source: str
    language: Language
    english: str | None = None
    columns: tuple[str, str] | None = None
    task: str = "continue"
    near_duplicates: float = 0.8
    validation: int = 0
    seed: int = 0
    remove_overlap: bool = False
    license: str = ""


@dataclass(frozen=True)
class Prepared:
    """The rows that are written, and those that are not.

    Attributes:
        rows: all usable rows of the source; sentences are not yet cut by the task.
        training, validation: places of the rows of each file.
        left_out: place of a row -> the keys of `REASONS` that apply.
        duplicate_of: place of a near-duplicate -> that of the row that is kept.
        overlap: by task.
    """

    settings: PrepareSettings
    rows: Rows
    are_sentences: bool
    has_english: bool
    training: np.ndarray
    validation: np.ndarray
    left_out: Mapping[int, Sequence[str]]
    duplicate_of: Mapping[int, int]
    overlap: Mapping[str, Overlap]

    def reasons(self) -> dict[str, int]:
        """Return the number of usable rows left out by reason, in words."""
        found = Counter(reason for reasons in self.left_out.values() for reason in reasons)
        return {title: found[reason] for reason, title in REASONS.items() if found[reason]}

    def written(self, places: np.ndarray) -> Iterator[dict[str, Any]]:
        """Yield the records of a file."""
        for row in Subset(self.rows, places):
            row = TASKS[self.settings.task](row, self.settings.language) if self.are_sentences else row
            assert row is not None  # rows that are too short are left out
            record = {key: value for key, value in row_record(row).items() if value}
            yield {**record, "language": self.settings.language.code}


def prepare_rows(
    settings: PrepareSettings, tasks: Mapping[str, Sequence[Sequence[str]]], progress: Progress
) -> Prepared:
    """Read the rows, find near-duplicates and overlap, and split.

    Args:
        tasks: texts of every item of each evaluation task, as in `find_overlap`.

    Raises:
        UsageError: as `load_rows`; sentences without English; more held-out rows than rows.
    """
    rows, are_sentences, has_english = _read(settings)
    left_out: dict[int, list[str]] = {}
    if are_sentences:
        for place, row in enumerate(rows):
            if TASKS[settings.task](row, settings.language) is None:
                left_out[place] = ["too_short"]
    overlap: dict[str, Overlap] = {}
    if tasks:
        with progress("Comparing with evaluation sets", len(rows)) as advance:
            overlap = find_overlap(rows, tasks, advance)
    if settings.remove_overlap:
        for place in sorted({place for task in overlap.values() for place in task.rows}):
            left_out.setdefault(place, []).append("overlap")
    if len(left_out) == len(rows):
        raise UsageError(f"{rows.source}: no row is left; the first {REASONS[left_out[0][0]]}")
    duplicate_of: dict[int, int] = {}
    if settings.near_duplicates:
        places = [place for place in range(len(rows)) if place not in left_out]
        with progress("Finding near-duplicates", len(places)) as advance:
            length = shingle_length(settings.language)
            duplicate_of = near_duplicates(rows, places, settings.near_duplicates, length, advance)
    left_out |= {place: ["near_duplicate"] for place in duplicate_of}
    kept = np.array([place not in left_out for place in range(len(rows))])
    held_out = _hold_out(rows, kept, settings)
    training, validation = (np.flatnonzero(kept & (held_out == part)) for part in (False, True))
    return Prepared(settings, rows, are_sentences, has_english, training, validation, left_out, duplicate_of, overlap)


def _read(settings: PrepareSettings) -> tuple[Rows, bool, bool]:
    """Return the rows, True if they are sentences, and True if they have English."""
    language, is_english = settings.language, settings.language == ENGLISH
    column, english_column = settings.columns or (None, None)
    options: dict[str, Any] = {"on_bad_row": "skip", "needed_by": "data prepare"}
    if settings.english is None:
        source, layout = open_corpus(settings.source, language, column, english_column, beside_english=is_english)
        if layout.sentence and not layout.english:
            allowed = "rows with prompt and completion" if is_english else "--english FILE, or --columns TARGET,ENGLISH"
            raise UsageError(
                f"{settings.source}: holds sentences (column {layout.sentence}) without English; give {allowed}"
            )
        rows = load_rows(source, need_english=layout.has_english and not is_english, **options)
        return rows, layout.sentence is not None, layout.has_english
    source, layout = open_corpus(settings.source, language, column, None, beside_english=True)
    english, english_layout = open_corpus(
        settings.english, language, english_column, None, beside_english=True, is_english=True
    )
    if bool(layout.sentence) != bool(english_layout.sentence):
        sentences, others = (settings.source, settings.english)[:: 1 if layout.sentence else -1]
        raise UsageError(f"{sentences}: holds sentences, but {others} holds rows; give two files of the same form")
    return load_rows(source, english=english, **options), layout.sentence is not None, True


def _hold_out(rows: Rows, kept: np.ndarray, settings: PrepareSettings) -> np.ndarray:
    """Return True for the held-out rows, bool (rows,): whole groups of equal prompts, in either language.

    Raises:
        UsageError: the rows are too few.
    """
    held_out = np.zeros(len(rows), dtype=bool)
    if not settings.validation:
        return held_out
    if settings.validation >= kept.sum():
        allowed = "fewer than the rows that are kept"
        raise UsageError(f"--validation: {settings.validation} found; allowed: {allowed}, {kept.sum()}")
    groups = _same_as((row.prompt, row.input, *map(str, row.history)) for row in rows)
    if all(row.prompt_en for row in rows):
        english = _same_as((row.prompt_en, row.input_en, *map(str, row.history_en)) for row in rows) + len(rows)
        links = coo_array((np.ones(len(rows)), (groups, english)), shape=(2 * len(rows), 2 * len(rows)))
        groups = connected_components(links, directed=False)[1][groups]
    numbers, sizes = np.unique(groups[kept], return_counts=True)
    chosen, total = [], 0
    for place in np.random.default_rng(settings.seed).permutation(len(numbers)):
        if total + sizes[place] <= settings.validation:
            chosen.append(numbers[place])
            total += sizes[place]
    return np.isin(groups, chosen)


def _same_as(texts: Iterator[tuple[str, ...]]) -> np.ndarray:
    """Return for each prompt the first place with the same one, int64 (prompts,)."""
    digests = [blake2b("\0".join(parts).encode(), digest_size=8).digest() for parts in texts]
    return first_places(np.array(digests, dtype="S8"))


def written_paths(out: Path) -> dict[str, Path]:
    """Return the place of each file: rows, validation, report, card."""
    return {
        "rows": out,
        "validation": out.with_suffix(".validation.jsonl"),
        "report": report_path(out),
        "card": out.with_suffix(".README.md"),
    }


def write_prepared(out: Path, prepared: Prepared) -> None:
    """Write all files; a validation file of an earlier preparation is removed where this one has none."""
    paths, settings = written_paths(out), prepared.settings
    for name, places in (("validation", prepared.validation), ("rows", prepared.training)):
        if name == "rows" or len(places):
            write_jsonl(paths[name], prepared.written(places))
        else:
            paths[name].unlink(missing_ok=True)
    rows = prepared.rows

    def entry(place: int, reasons: Sequence[str]) -> dict[str, Any]:
        row: Row = rows[place]
        same = {"duplicate_of": rows[of].number} if (of := prepared.duplicate_of.get(place)) is not None else {}
        return {"number": row.number, "id": row.id, "reasons": reasons, **same}

    report = {
        "source": settings.source,
        "english": settings.english,
        "language": settings.language.code,
        "written": len(prepared.training),
        "validation": len(prepared.validation),
        "unusable": rows.skipped,
        "reasons": REASONS,
        "overlap": {name: found.to_dict(rows) for name, found in prepared.overlap.items()},
        "left_out": [entry(place, reasons) for place, reasons in sorted(prepared.left_out.items())],
    }
    write_json(paths["report"], report)
    write_text(paths["card"], dataset_card(prepared, out))


def dataset_card(prepared: Prepared, out: Path) -> str:
    """Return the dataset card, Markdown with the Hub's metadata: languages, sources, license, and numbers of rows."""
    settings, rows = prepared.settings, prepared.rows
    total = len(prepared.training) + len(prepared.validation)
    metadata: dict[str, Any] = {
        "language": list(dict.fromkeys([settings.language.code, *(["en"] if prepared.has_english else [])])),
        "size_categories": [next((name for size, name in _SIZES.items() if total < size), "n>10M")],
        "task_categories": ["text-generation"],
        "tags": ["pivotune"],
    }
    if settings.license:
        metadata["license"] = redact(settings.license)
    counts = {"read": rows.total, **rows.skipped, **prepared.reasons(), "written": len(prepared.training)}
    if len(prepared.validation):
        counts["held out for validation"] = len(prepared.validation)
    # A local path's folders are nobody else's concern.
    sources = [Path(name).name if Path(name).exists() else name for name in (settings.source, settings.english) if name]
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {markdown(out.stem)}: instruction rows in {settings.language.name}",
        f"Made from {', '.join(markdown(redact(source)) for source in sources)} with `pivotune data prepare`."
        + (f" Parallel sentences became rows by the task `{settings.task}`." if prepared.are_sentences else "")
        + ("" if settings.license else " The license of the rows is not stated: that of the sources counts."),
        "\n".join(
            ["| rows | number |", "|---|---|", *(f"| {markdown(name)} | {count:,} |" for name, count in counts.items())]
        ),
    ]
    if prepared.overlap:
        lines = ["| evaluation set | items | overlapping items | overlapping rows |", "|---|---|---|---|"]
        for name, found in prepared.overlap.items():
            lines.append(f"| {markdown(name)} | {found.items:,} | {len(found.found):,} | {len(found.rows):,} |")
        removed = "were left out" if settings.remove_overlap else "are still in the rows"
        parts += [f"Rows that share text with an evaluation set {removed}.", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"
