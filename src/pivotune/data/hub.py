"""Records from a dataset on the Hugging Face Hub, named in one word.

`owner/name`, `owner/name:split`, `owner/name/config` or `owner/name/config:split`. A split may be a slice
(`train[:1000]`); without one `train` is read, or the only split. What looks like a file here is a file; `hub:` in
front (`hub:owner/name`) always means the Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pivotune.data.formats import describe_file_types, is_data_file_name, missing_file_error
from pivotune.data.text_files import NumberedRecords
from pivotune.errors import UsageError

_PREFIX = "hub:"
_SYNTAX = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/:]+))?(?::(?P<split>.+))?")


class HubName(NamedTuple):
    """A dataset on the Hub: `path` is owner/name; without `config` or `split` the default ones are meant."""

    path: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        split = f":{self.split}" if self.split else ""
        return f"{self.path}{config}{split}"


def parse_hub_name(source: str) -> HubName | None:
    """The parts of a Hub name, or None for what is meant as a file here.

    Raises:
        UsageError: it is neither a Hub name nor a data file that could be looked for.
    """
    path = Path(source).expanduser()
    is_marked = source.startswith(_PREFIX)
    if not is_marked and (path.exists() or is_data_file_name(path)):
        return None
    match = _SYNTAX.fullmatch(source.removeprefix(_PREFIX))
    if match and (is_marked or not path.parent.is_dir()):
        return HubName(**match.groupdict())
    if is_marked:
        raise UsageError(f"{source}: not a Hub dataset; allowed: hub:owner/name[/config][:split]")
    allowed = f"allowed: {describe_file_types()}; or a Hub dataset as hub:owner/name[:split]"
    raise UsageError(f"{missing_file_error(path)} ({allowed})")


def read_hub(name: HubName) -> NumberedRecords:
    """Yield (number, record) for every record of a Hub dataset, through `datasets` and its cache.

    Raises:
        UsageError: the dataset, config or split does not exist or cannot be loaded, in one line.
    """
    from datasets import load_dataset

    try:
        dataset = load_dataset(name.path, name.config, split=name.split)
    except Exception as error:  # the Hub, the network, the builder: they share no narrower type
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{name}: no such file, and as a Hub dataset it cannot be loaded: {reason}") from error
    yield from enumerate(_choose_split(name, dataset), start=1)


def _choose_split(name: HubName, dataset: Any) -> Iterable[Any]:
    if not isinstance(dataset, Mapping):
        return dataset
    if "train" in dataset:
        return dataset["train"]
    if len(dataset) == 1:
        return next(iter(dataset.values()))
    raise UsageError(f"{name}: has no split `train`; add one with a colon: {', '.join(map(str, dataset))}")
