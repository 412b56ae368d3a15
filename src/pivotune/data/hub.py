"""Datasets on the Hugging Face Hub: their names as sources of rows, and their records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pivotune.data.formats import describe_file_types, is_data_file_name, missing_file_error
from pivotune.data.text_files import NumberedRecords
from pivotune.errors import UsageError

_HUB_PREFIX = "hub:"
_HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>.+))?")


class HubName(NamedTuple):
    """A dataset on the Hub: `path` is owner/name; `config` and `split` are None for the default ones."""

    path: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        return self.path + (f"/{self.config}" if self.config else "") + (f":{self.split}" if self.split else "")


def parse_hub_name(source: str, *more_types: str) -> HubName | None:
    """Return the parts of a Hub name, or None for the name of a file here.

    Args:
        more_types: endings that the caller reads beside those of `formats.py`, for the message.

    Raises:
        UsageError: it is neither a Hub name nor a data file.
    """
    path = Path(source).expanduser()
    is_marked = source.startswith(_HUB_PREFIX)
    if not is_marked and (path.exists() or is_data_file_name(path)):
        return None
    match = _HUB_NAME.fullmatch(source.removeprefix(_HUB_PREFIX))
    if match and (is_marked or not path.parent.is_dir()):
        return HubName(**match.groupdict())
    if is_marked:
        raise UsageError(f"{source}: not a Hub dataset; allowed: hub:owner/name[/config][:split]")
    allowed = f"allowed: {describe_file_types(*more_types)}; or a Hub dataset as hub:owner/name[:split]"
    raise UsageError(f"{missing_file_error(path)} ({allowed})")


def read_hub(name: HubName) -> NumberedRecords:
    """Yield (number, record) for every record of a Hub dataset, through `datasets` and its cache.

    Raises:
        UsageError: the dataset, config or split does not exist or cannot be loaded, in one line.
    """
    from datasets import load_dataset

    try:
        dataset: Any = load_dataset(name.path, name.config, split=name.split)
    except Exception as error:  # the Hub, the network and the builder share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: no such file, and as a Hub dataset it cannot be loaded: {reason}") from error
    if isinstance(dataset, Mapping):
        if "train" not in dataset and len(dataset) != 1:
            raise UsageError(f"{name}: has no split `train`; add one with a colon: {', '.join(map(str, dataset))}")
        dataset = dataset["train"] if "train" in dataset else next(iter(dataset.values()))
    yield from enumerate(dataset, start=1)
