"""Options that several verbs have, and the values of their texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pivotune.cli.common import words
from pivotune.errors import UsageError

Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a key: training.max_steps=100. Repeatable.")]
Languages = Annotated[str, typer.Option("--lang", help="Languages of benchmarks, comma-separated; default: the run's.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the publishers' files; default: download them.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate only the first items of each task.")]
Split = Annotated[str | None, typer.Option(help="Split of all benchmarks: test or validation.")]
BatchSize = Annotated[str, typer.Option(help="Requests per batch: a number or auto.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens; default: each task's own.")]
Backend = Annotated[str, typer.Option(help="hf (Transformers) or vllm.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32 or bfloat16.")]
FoldSystem = Annotated[bool, typer.Option("--fold-system", help="Put a system message before the first user text.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Skip benchmarks whose data is missing.")]


def parse_languages(text: str) -> list[str]:
    """Split a comma-separated `--lang` and check its codes."""
    from pivotune.text.languages import check_language

    for code in words(text):
        check_language(code, "--lang")
    return words(text)


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """Parse a number or `auto`."""
    if text != "auto" and (not (text.isascii() and text.isdecimal()) or int(text) < 1):
        raise UsageError(f"--batch-size: {text!r} found; allowed: a number from 1, or auto")
    return "auto" if text == "auto" else int(text)
