"""Publishers' files written by tests, and benchmarks read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pivotune.evaluation.tasks.base import Benchmark, TaskData
from pivotune.evaluation.tasks.tables import Source


def read_task(benchmark: Benchmark, language: str, folder: Path | None, split: str | None = None) -> TaskData:
    """Read a benchmark's only task in a language from a folder (None: from the Hub)."""
    (task,) = benchmark.tasks(language)
    return task.read(Source(folder, split))


def write_file(path: Path, content: Any) -> Path:
    """Write text and bytes unchanged and other content as JSON; make missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else json.dumps(content, ensure_ascii=False)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path
