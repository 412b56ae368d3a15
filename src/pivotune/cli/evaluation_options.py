"""Options of every verb that evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Languages = Annotated[
    str, typer.Option("--lang", help="Languages of sets and groups, comma-separated; a run's own by default.")
]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the publishers' files; without it the Hub is used.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Items of each task: the first ones.")]
Split = Annotated[str | None, typer.Option(help="Split of all sets: test or validation.")]
BatchSize = Annotated[str, typer.Option(help="Requests at once: a number or auto.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer; default: each task's own.")]
Backend = Annotated[str, typer.Option(help="hf (Transformers) or vllm.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto, float32 or bfloat16.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out sets whose data is not there.")]
