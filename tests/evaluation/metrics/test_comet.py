"""COMET with a fake of unbabel-comet: its arguments, and the reasons for leaving it out."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from pivotune.errors import UsageError
from pivotune.evaluation.metrics import comet
from pivotune.evaluation.metrics.comet import CometUnavailableError, comet_scores, find_checkpoint

TEXTS = (["a", "bb"], ["A", "BB"], ["x", "xx"])


@pytest.fixture
def package(monkeypatch):
    """A module `comet`; `asked` holds its arguments."""
    asked: dict = {}

    class Model:
        def predict(self, samples, **options):
            asked.update(samples=samples, options=options)
            return SimpleNamespace(scores=[len(sample["src"]) / 4 for sample in samples])

    def load_from_checkpoint(path, reload_hparams=False, strict=False, local_files_only=False):
        asked.update(path=path, local_files_only=local_files_only)
        return Model()

    module = ModuleType("comet")
    module.load_from_checkpoint = load_from_checkpoint  # pyright: ignore[reportAttributeAccessIssue]
    module.asked = asked  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "comet", module)
    monkeypatch.setattr(comet, "find_spec", lambda name: object() if name == "comet" else find_spec(name))
    return module


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "model.ckpt").touch()
    return tmp_path


def test_scores_in_the_order_of_the_sentences(package, folder):
    assert comet_scores(*TEXTS, str(folder)) == [0.25, 0.5]
    assert package.asked["samples"] == [{"src": "a", "mt": "A", "ref": "x"}, {"src": "bb", "mt": "BB", "ref": "xx"}]
    assert package.asked["path"] == str(folder / "checkpoints" / "model.ckpt")
    assert package.asked["local_files_only"] is True
    assert package.asked["options"]["progress_bar"] is False


def test_a_version_without_the_offline_option(package, folder):
    loaded = package.load_from_checkpoint
    package.load_from_checkpoint = lambda path: loaded(path)
    assert comet_scores(*TEXTS, str(folder / "checkpoints" / "model.ckpt")) == [0.25, 0.5]


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(comet, "find_spec", lambda name: None)
    with pytest.raises(CometUnavailableError, match=r"^unbabel-comet is not installed$"):
        comet_scores(*TEXTS)


def test_weights_that_are_not_in_the_cache(package, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in (None, "owner/other"):
        with pytest.raises(CometUnavailableError) as error:
            comet_scores(*TEXTS, name)
        assert str(error.value) == f"the weights of {name or 'Unbabel/wmt22-comet-da'} are not in the local cache"


def test_weights_in_the_cache(package, folder, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert find_checkpoint() == folder / "checkpoints" / "model.ckpt"
    assert asked == {"name": "Unbabel/wmt22-comet-da", "local_files_only": True}
    (folder / "checkpoints" / "model.ckpt").unlink()
    with pytest.raises(CometUnavailableError, match=r"has no checkpoints/model\.ckpt"):
        find_checkpoint()


@pytest.mark.parametrize("name", ["model.ckpt", "/no/such/folder", "wmt22"])
def test_a_path_that_is_not_there_is_the_users_mistake(package, name):
    with pytest.raises(UsageError, match=r"--comet .*no such file; allowed: a \.ckpt file"):
        comet_scores(*TEXTS, name)


def test_a_folder_without_weights_is_the_users_mistake(package, tmp_path):
    with pytest.raises(UsageError, match=r"has no checkpoints/model\.ckpt"):
        comet_scores(*TEXTS, str(tmp_path))


def test_weights_that_cannot_be_loaded_are_a_reason_in_one_line(package, folder):
    def load_from_checkpoint(path):
        raise OSError("xlm-roberta-large\nis not cached")

    package.load_from_checkpoint = load_from_checkpoint
    with pytest.raises(CometUnavailableError, match=r"cannot be loaded \(xlm-roberta-large is not cached\)"):
        comet_scores(*TEXTS, str(folder))


def test_no_sentences_need_no_model(package, folder):
    assert comet_scores([], [], [], str(folder)) == []
    assert package.asked == {}
