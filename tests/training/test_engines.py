from __future__ import annotations

import importlib.metadata

import pytest
from tiny_training import arguments

from pivotune.errors import UsageError
from pivotune.training.engines import check_fsdp, fsdp_version, shards_weights


def test_fsdp_1_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        arguments(tmp_path)


def test_the_trainer_looks_at_what_accelerate_made_of_it(tmp_path, monkeypatch):
    """Where no version is named, Accelerate takes its own default, which is version 1."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    args = arguments(tmp_path)
    assert fsdp_version(args) is None
    assert shards_weights(args)
    with pytest.raises(UsageError, match="fsdp_version: 2"):
        check_fsdp(1)


def test_fsdp_2_needs_a_new_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    arguments(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.14.0")
    with pytest.raises(UsageError, match=r"FSDP2 needs accelerate 1\.15 or newer and 1\.14\.0 is installed"):
        arguments(tmp_path)


def test_without_fsdp_any_accelerate_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.10.0")
    arguments(tmp_path)
