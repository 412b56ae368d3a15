"""Dataset card of prepared rows, with the Hub's metadata block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pivotune.text.escaping import markdown
from pivotune.text.redaction import redact

if TYPE_CHECKING:
    from pivotune.data.prepare.run import Prepared

_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def dataset_card(prepared: Prepared, out: Path) -> str:
    """Return the card as Markdown: languages, sources, license, and the number of rows read, left out and written."""
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
