"""Hostile files for the tests of security: pickles and code that leave a mark where they run, and names that misbehave."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_training import run_settings

from pivotune.cli.main import main

# Moves the cursor, changes the window's title, ends a line, turns the direction, and is markup of every kind.
HOSTILE = "a\x1b[31m\x1b]0;t\x07\x9b2J\u202eb\r[bold red]x[/] [/nobody] <script>|`*_$^&%{}\\"
CONTROLS = ("\x1b", "\x07", "\x9b", "\u202e", "\r", "\x00")


class Mark:
    """A pickle of this makes a folder when it is loaded without care."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


def plant(path: Path, mark: Path, *, plain: bool = False) -> None:
    """Write a file of `torch.save`, or a plain pickle, that makes `mark`."""
    if plain:
        path.write_bytes(pickle.dumps({"state": Mark(mark)}))
    else:
        torch.save({"state": Mark(mark)}, path)


def plant_code(path: Path, mark: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n", encoding="utf-8")


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target, symlinks=True))


def write_yaml(folder: Path, **changes: Any) -> Path:
    """The configuration of a short run of a tiny model; see `tiny_training.run_settings`."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_settings(folder, **changes), allow_unicode=True), encoding="utf-8")
    return path


def resume(stopped: Path, folder: Path, *more: str) -> list[object]:
    """The command that goes on with a copy in `folder/run` of a run that has stopped."""
    changes = [f"output_dir={folder / 'run'}", "training.max_steps=4", *more]
    return ["train", stopped / "run.yaml", "--resume", *(word for change in changes for word in ("--set", change))]


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command is refused with."""
    code, _, err = call(capsys, *words)
    assert code == 2, err
    assert err.startswith("pivotune: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("pivotune: error: ").rstrip("\n")
