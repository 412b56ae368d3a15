"""Options of the verbs that evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Languages = Annotated[
    str, typer.Option("--lang", help="Languages of benchmarks and groups, comma-separated; default: the run's own.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the publishers' files; default: download from the Hub.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Evaluate only the first items of each task.")]
Split = Annotated[str | None, typer.Option(help="Split of all benchmarks: test or validation.")]
BatchSize = Annotated[str, typer.Option(help="Requests per batch: a number or auto.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens; default: each task's own.")]
Backend = Annotated[str, typer.Option(help="hf (Transformers) or vllm.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32 or bfloat16.")]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Skip benchmarks whose data is missing.")]
