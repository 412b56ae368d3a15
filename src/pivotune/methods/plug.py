"""PLUG (Zhang et al., "PLUG: Leveraging Pivot Language in Cross-Lingual Instruction Tuning", ACL 2024, arXiv 2311.08711).

An answer is the English answer, a line that names the target language, and the target's answer, in one turn. The paper
also restates the instruction in English first; here the English answer alone is the pivot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pivotune.methods.base import Method, check_named, marker_in


@dataclass(frozen=True, kw_only=True)
class PivotAnswers(Method):
    """TFT on answers of two parts; rows replayed in English keep one part."""

    def rewriter(self, rows: Sequence[Any], settings: Any) -> Callable[[int, Any], Any]:
        """Return a function that puts the English answer and the marker before a row's answer.

        Raises:
            UsageError: no target language, whose name the marker needs, or an unknown one.
        """
        codes = settings.data.languages
        check_named(codes, f"method {self.name}: answers")

        def rewrite(place: int, row: Any) -> Any:
            marker = marker_in(self.pivot_marker, row.language or codes[0])
            return replace(row, completion=f"{row.completion_en}{marker}{row.completion}")

        return rewrite


PLUG = PivotAnswers(
    name="plug",
    summary="Pivot answers (PLUG, [arXiv 2311.08711](https://arxiv.org/abs/2311.08711)): the model answers in English, "
    "then writes a line with the name of the target language, then answers in it.",
    main_language="target",
    replay=True,
    needs_english=True,
    pivot_marker="\n\n[{language}]\n",
)
