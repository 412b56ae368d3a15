"""A model's fingerprint follows its weights and tokenizer, and nothing else in the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_training import save_tiny_model

from pivotune.evaluation import identity
from pivotune.evaluation.identity import model_fingerprint
from pivotune.models.locating import ModelFiles


def test_results_beside_the_weights_change_nothing(tmp_path):
    """`--out` may be the model's own folder: its cached answers must stay good."""
    name = save_tiny_model(tmp_path)
    before = model_fingerprint(name)
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "README.md").write_text("a card")
    assert model_fingerprint(name) == before


def test_other_weights_and_other_tokenizers_change_it(tmp_path):
    name = save_tiny_model(tmp_path / "a")
    before = model_fingerprint(name)
    assert model_fingerprint(save_tiny_model(tmp_path / "same")) == before
    assert model_fingerprint(save_tiny_model(tmp_path / "b", seed=1)) != before
    settings = tmp_path / "a" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps({**content, "clean_up_tokenization_spaces": True, "extra": 1}))
    assert model_fingerprint(name) != before


@pytest.mark.parametrize("filename", ["config.json", "adapter_config.json"])
def test_a_hub_model_is_its_commit(monkeypatch, filename):
    """An adapter's repository has no `config.json`; its base counts too."""
    asked = []

    def locate(name, revision):
        is_adapter = filename.startswith("adapter") and name == "me/model"
        return ModelFiles(name, frozenset([filename if is_adapter else "config.json"]), {})

    def download(location, file, **arguments):
        asked.append((location, file))
        return str(Path("/cache") / location / commits[location] / file)

    commits = {"me/model": "abc", "me/base": "def"}
    monkeypatch.setattr(identity, "locate", locate)
    monkeypatch.setattr(identity, "base_of", lambda name, files: ("me/base", None))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    first = model_fingerprint("me/model")
    assert ("me/model", filename) in asked
    for name in {location for location, _ in asked}:
        commits[name] += "x"
        changed = model_fingerprint("me/model")
        assert changed != first
        first = changed
