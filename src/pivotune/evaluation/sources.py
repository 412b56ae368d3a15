"""Where benchmark data comes from: the publisher's files in a folder, or the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError

_CONVERTED = "refs/convert/parquet"


class MissingDataError(UsageError):
    """A benchmark's data is not where it was looked for; other benchmarks may be."""


@dataclass(frozen=True)
class Source:
    """Files below `data_dir`, or the Hub where that is None.

    Attributes:
        data_dir: folder with publishers' original files, in any layout: files are found by name, in any depth.
        split: split asked for (`test`, `validation`); None for the one each benchmark is usually reported on.
        pairs: the user's own parallel text (`--pairs`, `--english`), in any form the training data may have, or lines.
    """

    data_dir: Path | None = None
    split: str | None = None
    pairs: tuple[Path, Path | None] | None = None

    def find(self, *patterns: str) -> list[Path]:
        """Files whose path (relative to `data_dir`, `/` between folders) ends with the first pattern that any file matches.

        Args:
            patterns: `fnmatch` patterns of a name (`xquad.vi.json`) or of last folders and a name (`mmlu_ar/test/*.csv`);
                gzipped files (`.gz` added) match too.
        """
        for pattern in patterns:
            depth = pattern.count("/") + 1
            wanted = (pattern, f"{pattern}.gz")
            found = [path for path in self._files if any(fnmatchcase(_tail(path, depth), name) for name in wanted)]
            if found:
                return found
        return []

    @cached_property
    def _files(self) -> list[Path]:
        if self.data_dir is None:
            return []
        return sorted(path for path in self.data_dir.rglob("*") if path.is_file())


def _tail(path: Path, depth: int) -> str:
    return "/".join(path.parts[-depth:])


def missing(task: str, source: Source, wanted: str, homepage: str) -> MissingDataError:
    """The error for a set that is not in the folder: what was looked for and where to get it."""
    return MissingDataError(
        f"{task}: no {wanted} below {source.data_dir}; get it from {homepage}, or leave out --data-dir to use the Hub"
    )


def hub_name(path: str, config: str | None) -> str:
    """A Hub dataset and its configuration in one word."""
    return path if config is None else f"{path}/{config}"


def read_hub_records(task: str, path: str, config: str | None, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number, record) for every record of a Hub dataset's split.

    Raises:
        MissingDataError: it cannot be loaded; the line says which set and that `--data-dir` reads local files.
    """
    try:
        dataset = _load(path, config, split)
    except Exception as error:  # the Hub, the network, the builder: they share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingDataError(
            f"{task}: the Hub dataset {hub_name(path, config)} cannot be loaded ({reason[:200]}); "
            "--data-dir reads local files"
        ) from error
    yield from enumerate(dataset, start=1)


def _load(path: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(path, config, split=split)
    except RuntimeError as error:
        # Older sets are loading scripts, which `datasets` no longer runs; the Hub keeps a converted copy of them.
        if "script" not in str(error):
            raise
        return load_dataset(path, config, split=split, revision=_CONVERTED)
