from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_training import run_settings, save_tiny_model, write_rows

from pivotune.cli.main import main

QUICK = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny model; never changed."""
    folder = tmp_path_factory.mktemp("security") / "base"
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return Path(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 20))


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, base, rows) -> Path:
    """A folder with `run.yaml` and a run in `run` that has stopped at its checkpoint 2; to be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    settings = run_settings(folder, model=str(base), data={"train": str(rows), "validation": 4}, method="tft")
    settings["training"].update(QUICK, max_steps=2)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert main(["train", str(folder / "run.yaml")]) == 0
    return folder


@pytest.fixture
def mark(tmp_path) -> Path:
    """Where planted code makes a folder; checked to be missing when the test ends."""
    place = tmp_path / "code-has-run"
    yield place
    assert not place.exists()
