"""`layers.json`: the chosen layers of a run, the reason, and the measurements behind them. Needs no torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from pivotune.errors import UsageError
from pivotune.layers.selection import Fall, LayerSelection, SelectionMethod, TermName
from pivotune.text.files import finite, write_json

if TYPE_CHECKING:
    from pivotune.layers.profile import LayerProfile
    from pivotune.layers.reading import LayerReading

LAYERS_JSON_VERSION = 1


class _Analysis(TypedDict):
    version: int
    model: str
    language: str | None
    num_layers: int
    conversion: int
    thinking: int
    method: SelectionMethod
    reason: str
    falls: list[dict[str, Any]]
    target: dict[str, Any]
    english: dict[str, Any] | None
    english_tokens: str | None


class LayerAnalysis(_Analysis, total=False):
    """Content of `layers.json`.

    `target` and `english` are the profiles on the two languages (`LayerProfile`, null for a value that is not finite)
    through the lens `lens`; `reading` is what each layer can say (`LayerReading`), where rows have both sides; `reasons`
    are the parts of `reason` by loss, where each layer has its own; `english_tokens` is the reason given by
    `english_looking_tokens`; `supervised` are the inner losses of a run.
    """

    lens: str
    reasons: dict[TermName, str]
    reading: dict[str, Any] | None
    supervised: list[TermName]


def analysis_to_json(
    selection: LayerSelection,
    target_profile: LayerProfile,
    english_profile: LayerProfile | None = None,
    *,
    model: str,
    language: str | None = None,
    english_tokens: str | None = None,
    lens: str = "logit",
    reading: LayerReading | None = None,
) -> LayerAnalysis:
    """Return the content of `layers.json`; `model` as the user wrote it, `language` its code."""
    analysis = {
        "version": LAYERS_JSON_VERSION,
        "model": model,
        "language": language,
        "num_layers": target_profile.num_layers,
        **selection.to_dict(),
        "target": asdict(target_profile),
        "english": english_profile and asdict(english_profile),
        "english_tokens": english_tokens,
        "lens": lens,
        "reading": reading and asdict(reading),
    }
    return finite(analysis)


def write_layers_json(path: str | os.PathLike[str], analysis: LayerAnalysis) -> None:
    """Write `layers.json` atomically, making missing folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, analysis)


def read_layers_json(path: str | os.PathLike[str]) -> LayerAnalysis:
    """Read a `layers.json`.

    Raises:
        UsageError: no such file, not JSON, not a layer analysis, or one of another version.
    """
    try:
        analysis: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); `pivotune analyze` writes it") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(analysis, dict) or "version" not in analysis:
        raise UsageError(f"{path}: not a layer analysis; `pivotune analyze` writes one")
    if analysis["version"] != LAYERS_JSON_VERSION:
        raise UsageError(
            f"{path}: version {analysis['version']!r} is not known; this Pivotune reads version {LAYERS_JSON_VERSION}"
        )
    if missing := sorted(LayerAnalysis.__required_keys__ - analysis.keys()):
        raise UsageError(f"{path}: not a complete layer analysis; missing: {', '.join(missing)}")
    return cast(LayerAnalysis, analysis)


def selection_from_json(analysis: LayerAnalysis) -> LayerSelection:
    """Return the selection in an analysis."""
    return LayerSelection(
        analysis["conversion"],
        analysis["thinking"],
        analysis["method"],
        analysis["reason"],
        tuple(Fall(**fall) for fall in analysis["falls"]),
        analysis.get("reasons", {}),
    )
