"""`layers.json`: round trip, atomic writing, and refused files."""

from __future__ import annotations

import json
import math
import os

import pytest

from pivotune.errors import UsageError
from pivotune.layers.layers_json import analysis_to_json, read_layers_json, selection_from_json, write_layers_json
from pivotune.layers.profile import LayerProfile
from pivotune.layers.selection import Fall, LayerSelection

SELECTION = LayerSelection(
    conversion=1, thinking=2, method="entropy-falls", reason="fällt zweimal", falls=(Fall(0, 1, 2.0), Fall(2, 3, 1.0))
)


def profile(**changes):
    values = {
        "num_layers": 3,
        "tokens": 10,
        "sequences": 2,
        "entropy": [4.0, 2.0, 2.0, 1.0],
        "entropy_stderr": [0.1, 0.1, 0.1, 0.1],
        "agreement": [0.0, 0.1, 0.5, 1.0],
        "english_share": None,
    }
    return LayerProfile(**{**values, **changes})


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "layers.json"
    analysis = analysis_to_json(
        SELECTION, profile(), profile(tokens=12), model="runs/vi", language="vi", english_tokens="why"
    )
    write_layers_json(path, analysis)
    assert read_layers_json(path) == analysis
    assert selection_from_json(read_layers_json(path)) == SELECTION
    assert "fällt" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["layers.json"]


def test_content():
    analysis = analysis_to_json(SELECTION, profile(), model="runs/vi")
    assert analysis["version"] == 1
    assert (analysis["model"], analysis["language"], analysis["num_layers"]) == ("runs/vi", None, 3)
    assert (analysis["conversion"], analysis["thinking"], analysis["method"]) == (1, 2, "entropy-falls")
    assert analysis["target"]["entropy"] == [4.0, 2.0, 2.0, 1.0]
    assert analysis["english"] is None
    assert analysis["falls"][1] == {"start": 2, "end": 3, "drop": 1.0}


def test_values_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "layers.json"
    broken = profile(entropy=[4.0, math.nan, math.inf, 1.0])
    write_layers_json(path, analysis_to_json(SELECTION, broken, model="m"))
    assert read_layers_json(path)["target"]["entropy"] == [4.0, None, None, 1.0]
    assert "NaN" not in path.read_text(encoding="utf-8")


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "layers.json"
    write_layers_json(path, analysis_to_json(SELECTION, profile(), model="old"))

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_layers_json(path, analysis_to_json(SELECTION, profile(), model="new"))
    assert read_layers_json(path)["model"] == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["layers.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a layer analysis"),
        ('{"loss": 1}', "not a layer analysis"),
        ('{"version": 99}', "version 99 is not known; this Pivotune reads version 1"),
        ('{"version": 1, "model": "m"}', "missing: conversion, english, english_tokens, falls"),
    ],
)
def test_refused_content(tmp_path, content, said):
    path = tmp_path / "layers.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as error:
        read_layers_json(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"layers.json: cannot be read \(No such file"):
        read_layers_json(tmp_path / "layers.json")


def test_no_half_precision_is_lost(tmp_path):
    path = tmp_path / "layers.json"
    exact = profile(entropy=[0.1 + 0.2, 1 / 3, 2.0, 1.0])
    write_layers_json(path, analysis_to_json(SELECTION, exact, model="m"))
    assert json.loads(path.read_text(encoding="utf-8"))["target"]["entropy"][:2] == [0.1 + 0.2, 1 / 3]
