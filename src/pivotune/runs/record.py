"""Records of the start of a run, which a resumed run must match: a digest of its rows, and the first held-out scores."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivotune.config.settings import DataConfig
from pivotune.data.examples import Pair
from pivotune.data.pair_store import pairs_digest
from pivotune.errors import UsageError
from pivotune.text.files import sha256_of, write_json
from pivotune.training.heldout import RowScore
from pivotune.training.resilience.checkpoints import last_checkpoint

logger = logging.getLogger(__name__)
ROWS_FILE = "rows.json"
SCORES_FILE = "start-scores.json"


def write_rows_record(folder: Path, train: Sequence[Pair], data: DataConfig) -> None:
    """Write `rows.json`: the number and the digest of the training rows, and the digests of the data files."""
    files = {key: digest for key, path in _data_files(data).items() if (digest := _file_digest(path)) is not None}
    write_json(folder / ROWS_FILE, {"rows": len(train), "sha256": pairs_digest(train), "files": files})


def changed_data_file(folder: Path, data: DataConfig) -> tuple[str, Any] | None:
    """Return key and value of `data` where the file differs from the run's; None where none does or none is recorded."""
    files, now = (_read_rows_record(folder) or {}).get("files") or {}, _data_files(data)
    return next(((key, now.get(key)) for key, digest in files.items() if _file_digest(now.get(key)) != digest), None)


def _data_files(data: DataConfig) -> dict[str, Any]:
    """Return the values of `data` that may be files, by their key."""
    files: dict[str, Any] = {"validation": data.validation, "validation_english": data.validation_english}
    if isinstance(data.train, str):
        return {"train": data.train, "english": data.english, **files}
    names = ("path", "english")
    entries = {f"train.{place}.{key}": getattr(each, key) for place, each in enumerate(data.train) for key in names}
    return {**entries, **files}


def _file_digest(source: Any) -> str | None:
    """Return the SHA-256 of a local file; None for anything else."""
    path = Path(source).expanduser() if isinstance(source, str) else None
    return sha256_of(path) if path is not None and path.is_file() else None


def has_rows_record(folder: Path) -> bool:
    """Return True if the folder has a readable `rows.json`."""
    return _read_rows_record(folder) is not None


def _read_rows_record(folder: Path) -> dict[str, Any] | None:
    record = _read(folder / ROWS_FILE)
    return record if isinstance(record, dict) and isinstance(record.get("sha256"), str) else None


def check_rows_record(folder: Path, train: Sequence[Pair], source: str) -> None:
    """Refuse other rows than the run began with; a run without a record passes.

    Raises:
        UsageError: the rows differ, or the record cannot be read and rows were trained on already.
    """
    record, path = _read_rows_record(folder), folder / ROWS_FILE
    if record is None:
        if not path.exists():
            return
        if last_checkpoint(folder) is not None:
            raise UsageError(
                f"--resume: {path} cannot be read, so the rows cannot be compared with those of the run's start; restore "
                "it, or remove it if the rows are the same"
            )
        # Without a checkpoint no row was trained on.
        logger.warning("%s cannot be read and is written anew: the run has no checkpoint yet", path)
        return
    if record["sha256"] == pairs_digest(train):
        return
    before = record.get("rows")
    found = f"{len(train)} training rows now, {before} then" if before != len(train) else "the same number of rows"
    raise UsageError(
        f"--resume: {source} is not what the run in {folder} began with ({found}); restore the file, or start again with "
        "--overwrite or in another output_dir"
    )


def write_start_scores(folder: Path, key: Mapping[str, Any], scores: Mapping[str, Sequence[RowScore]]) -> None:
    """Write the starting model's scores exactly: JSON's decimals give every double back."""
    write_json(folder / SCORES_FILE, {"of": dict(key), "scores": dict(scores)})


def read_start_scores(folder: Path, key: Mapping[str, Any]) -> dict[str, list[RowScore]] | None:
    """Return the kept scores if they belong to these rows and settings (`key`), or None."""
    kept = _read(folder / SCORES_FILE)
    if not isinstance(kept, dict) or kept.get("of") != dict(key):
        return None
    try:
        return {side: [RowScore(*score) for score in found] for side, found in kept["scores"].items()}
    except (KeyError, TypeError, AttributeError):
        return None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
