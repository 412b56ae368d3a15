"""Hub dataset names, and loading them without a network."""

from __future__ import annotations

import datasets
import pytest

from pivotune.data.hub import HubName, parse_hub_name, read_hub
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError

ROW = {"prompt": "Swali", "completion": "Jibu", "prompt_en": "Question", "completion_en": "Answer"}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `load_dataset`: the test sets what it gives; it records how it was asked."""

    class Hub:
        answer: object = None
        asked: tuple = ()

        def load(self, *args, **kwargs):
            self.asked = (args, kwargs)
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    return hub


@pytest.mark.parametrize(("source", "expected"), [
    ("owner/name", HubName("owner/name")),
    ("owner/na.me_2-x:test", HubName("owner/na.me_2-x", None, "test")),
    ("owner/name/vi", HubName("owner/name", "vi")),
    ("owner/name/vi:train[:10%]", HubName("owner/name", "vi", "train[:10%]")),
    ("hub:owner/name.csv:dev", HubName("owner/name.csv", None, "dev")),
    ("owner/name.csv", None),
    ("folder/deep/file.jsonl.gz", None),
])  # fmt: skip
def test_names(source, expected):
    assert parse_hub_name(source) == expected


def test_what_exists_here_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").touch()
    assert parse_hub_name("owner/name") is None
    assert parse_hub_name("hub:owner/name") == HubName("owner/name")


@pytest.mark.parametrize(("source", "message"), [
    ("pears", "pears: no such file; did you mean pairs? (allowed: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, "
     "each also with .gz; or a Hub dataset as hub:owner/name[:split])"),
    ("data/rows", "data/rows: no such file (allowed: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, "
     "each also with .gz; or a Hub dataset as hub:owner/name[:split])"),
    ("hub:name", "hub:name: not a Hub dataset; allowed: hub:owner/name[/config][:split]"),
])  # fmt: skip
def test_neither_file_nor_hub_name(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "pairs").mkdir()
    with pytest.raises(UsageError) as caught:
        parse_hub_name(source)
    assert str(caught.value) == message


def test_named_split_and_config_are_passed_on(hub):
    hub.answer = datasets.Dataset.from_list([ROW])
    rows = load_rows("owner/name/vi:dev")
    assert hub.asked == (("owner/name", "vi"), {"split": "dev"})
    assert (rows.source, rows[0].prompt, rows[0].number) == ("owner/name/vi:dev", "Swali", 1)


@pytest.mark.parametrize("names", [["train", "test"], ["validation"]])
def test_without_a_split_train_or_the_only_one_is_read(hub, names):
    dataset = datasets.Dataset.from_list([ROW])
    empty = datasets.Dataset.from_list([])
    hub.answer = datasets.DatasetDict({name: empty if name == "test" else dataset for name in names})
    assert list(read_hub(HubName("owner/name"))) == [(1, ROW)]
    assert hub.asked == (("owner/name", None), {"split": None})


def test_several_splits_without_train_are_listed(hub):
    hub.answer = datasets.DatasetDict(
        {"dev": datasets.Dataset.from_list([ROW]), "test": datasets.Dataset.from_list([])}
    )
    with pytest.raises(UsageError) as caught:
        load_rows("owner/name")
    assert str(caught.value) == "owner/name: has no split `train`; add one with a colon: dev, test"


@pytest.mark.parametrize(("failure", "reason"), [
    (FileNotFoundError("Dataset 'owner/name' doesn't exist\n on the Hub"),
     "Dataset 'owner/name' doesn't exist on the Hub"),
    (ConnectionError(), "ConnectionError"),
])  # fmt: skip
def test_a_failure_is_one_line(hub, failure, reason):
    hub.answer = failure
    with pytest.raises(UsageError) as caught:
        load_rows("owner/name")
    assert str(caught.value) == f"owner/name: no such file, and as a Hub dataset it cannot be loaded: {reason}"


def test_real_loader_offline_is_one_line():
    with pytest.raises(UsageError) as caught:
        load_rows("owner/surely-not-cached")
    message = str(caught.value)
    assert message.startswith("owner/surely-not-cached: no such file, and as a Hub dataset it cannot be loaded: ")
    assert "\n" not in message
