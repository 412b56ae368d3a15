"""`layers.json`: the layer profile of a model, the chosen layers and why. Needs no torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pivotune.errors import UsageError
from pivotune.layers.selection import Fall, Method, Selection
from pivotune.text.files import finite, write_json

if TYPE_CHECKING:
    from pivotune.layers.profile import LayerProfile

VERSION = 1


class ProfileRecord(TypedDict):
    """`LayerProfile.to_dict()`; a value that is not finite is null."""

    num_layers: int
    tokens: int
    sequences: int
    entropy: list[float | None]
    entropy_stderr: list[float | None] | None
    agreement: list[float | None]
    english_share: list[float | None] | None


class LayerAnalysis(TypedDict):
    """Content of `layers.json`.

    `target` and `english` are the profiles on the two languages (`english` is null if only the target language was
    measured); `english_tokens` says how English-looking tokens were told, or why they could not be.
    """

    version: int
    model: str
    language: str | None
    num_layers: int
    conversion: int
    thinking: int
    method: Method
    reason: str
    falls: list[dict[str, Any]]
    target: ProfileRecord
    english: ProfileRecord | None
    english_tokens: str | None


def analysis_to_json(
    selection: Selection,
    target_profile: LayerProfile,
    english_profile: LayerProfile | None = None,
    *,
    model: str,
    language: str | None = None,
    english_tokens: str | None = None,
) -> LayerAnalysis:
    """Everything that `layers.json` holds.

    Args:
        model: name or folder, as the user wrote it.
        language: code of the target language.
        english_tokens: the sentence that `english_looking_tokens` gave.
    """
    analysis = {
        "version": VERSION,
        "model": model,
        "language": language,
        "num_layers": target_profile.num_layers,
        **selection.to_dict(),
        "target": target_profile.to_dict(),
        "english": english_profile and english_profile.to_dict(),
        "english_tokens": english_tokens,
    }
    return finite(analysis)


def write_layers_json(path: str | os.PathLike[str], analysis: LayerAnalysis) -> None:
    """Write `layers.json` atomically. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, analysis)


def read_layers_json(path: str | os.PathLike[str]) -> LayerAnalysis:
    """Read what `write_layers_json` wrote.

    Raises:
        UsageError: no such file, not JSON, not a layer analysis, or one of another version.
    """
    try:
        analysis = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); `pivotune analyze` writes it") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    _check(path, analysis)
    return analysis


def selection_from_json(analysis: LayerAnalysis) -> Selection:
    """The selection that an analysis holds."""
    return Selection(
        conversion=analysis["conversion"],
        thinking=analysis["thinking"],
        method=analysis["method"],
        reason=analysis["reason"],
        falls=tuple(Fall(**fall) for fall in analysis["falls"]),
    )


def _check(path: str | os.PathLike[str], analysis: Any) -> None:
    if not isinstance(analysis, dict) or "version" not in analysis:
        raise UsageError(f"{path}: not a layer analysis; `pivotune analyze` writes one")
    if analysis["version"] != VERSION:
        raise UsageError(f"{path}: version {analysis['version']!r} is not known; this Pivotune reads version {VERSION}")
    missing = sorted(LayerAnalysis.__required_keys__ - analysis.keys())
    if missing:
        raise UsageError(f"{path}: not a complete layer analysis; missing: {', '.join(missing)}")
