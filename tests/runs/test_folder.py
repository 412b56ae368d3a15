from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import parse_config
from pivotune.errors import UsageError
from pivotune.runs.folder import claim_run_folder, environment, read_run_config, write_run_config
from pivotune.text.files import write_text


def config(folder: Path, **changes: Any) -> RunConfig:
    data = {"train": "rows.jsonl", **changes.pop("data", {})}
    return parse_config({"model": "m", "data": data, "output_dir": str(folder), **changes})


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with all its files, and two of the user's own."""
    folder = tmp_path / "run"
    write_run_config(folder, config(folder))
    fill(folder, "layers.json", "metrics.jsonl", "results.json", "results.items.jsonl.gz", "README.md", "model/config.json",
         "adapter/x", "checkpoint-7/x", ".saving/checkpoint-9/x", "notes.txt", "mine/x")  # fmt: skip
    return folder


def refusal(folder: Path, **options: Any) -> str:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}
    with pytest.raises(UsageError) as raised:
        claim_run_folder(options.pop("config", config(folder)), **options)
    assert "\n" not in str(raised.value)
    assert before == {path: path.read_bytes() for path in before}
    return str(raised.value)


# ---- who may write there ----


def test_new_and_empty_folders_are_free_and_not_made_yet(tmp_path):
    assert claim_run_folder(config(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert claim_run_folder(config(tmp_path / "empty"), overwrite=True) == tmp_path / "empty"


def test_run_is_refused_unless_resumed_or_overwritten(run):
    assert refusal(run) == f"output_dir: {run} already holds a run; add --resume to go on with it or --overwrite"
    before = tree(run)
    assert claim_run_folder(config(run), resume=True) == run
    assert tree(run) == before


def test_a_run_that_has_not_trained_is_replaced(tmp_path):
    """A line of an evaluation is no step; a `config.yaml` alone is the user's own."""
    write_run_config(tmp_path, config(tmp_path))
    fill(tmp_path, "layers.json", "rows.json", ".saving/checkpoint-2/x")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_target_loss": 2.5}\n')
    before = tree(tmp_path)
    assert claim_run_folder(config(tmp_path, seed=9)) == tmp_path
    assert tree(tmp_path) == before
    for name in (
        "checkpoint-2/x",
        "passed-over-checkpoint-2/x",
        "model/x",
        "results.json",
        ".saving/checkpoint-2.old/x",
    ):
        fill(tmp_path, name)
        assert "already holds a run" in refusal(tmp_path)
        shutil.rmtree(tmp_path / name.rpartition("/")[0]) if "/" in name else (tmp_path / name).unlink()
        assert claim_run_folder(config(tmp_path)) == tmp_path
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    assert "already holds a run" in refusal(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "environment.json").unlink()
    assert "already holds a run" in refusal(tmp_path)


def test_overwrite_removes_what_a_run_writes_and_nothing_else(run):
    assert claim_run_folder(config(run, seed=9), overwrite=True) == run
    assert tree(run) == ["mine", "mine/x", "notes.txt"]


def test_overwrite_leaves_what_others_named_alike(run):
    fill(run, "checkpoint-7-backup/x", "passed-over-checkpoint-8/x", "passed-over-checkpoint-x/x")
    claim_run_folder(config(run), overwrite=True)
    left = [path.name for path in run.iterdir()]
    assert sorted(left) == ["checkpoint-7-backup", "mine", "notes.txt", "passed-over-checkpoint-x"]


def test_an_overwriting_that_is_cut_short_can_be_repeated(run, monkeypatch):
    """Killed before each removal: what is left is a run, or free."""
    shutil.rmtree(run / "mine")
    (run / "notes.txt").unlink()
    remove, count = os.unlink, 0

    def killed(path: Any, *args: Any, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        remove(path, *args, **options)

    while True:
        left = count
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", killed)
            try:
                claim_run_folder(config(run, seed=9), overwrite=True)
                break
            except KeyboardInterrupt:
                pass
        claim_run_folder(config(run, seed=9), overwrite=True)
        assert claim_run_folder(config(run, seed=9)) == run
        count += 1
        write_run_config(run, config(run))
        fill(run, "layers.json", "metrics.jsonl", "README.md", "model/config.json", "checkpoint-7/x")
    assert count > 6


def test_a_checkpoint_that_cannot_be_removed_is_named(run, monkeypatch):
    """It would be what `--resume` goes on from."""

    def refuse(path: Any, *args: Any, **options: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    message = refusal(run, overwrite=True)
    assert message.startswith(f"--overwrite: {run / 'checkpoint-7'} cannot be removed (Permission denied)")


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize(
    "files",
    [
        ["thesis.tex"],
        ["model/config.json", "README.md"],
        # A `config.yaml` of another program does not make its `model/` ours.
        ["config.yaml", "model/weights", "README.md"],
        ["checkpoint-7/x"],
    ],
)
def test_folders_of_others_are_never_touched(tmp_path, files, options):
    fill(tmp_path / "theirs", *files)
    if "config.yaml" in files:
        (tmp_path / "theirs" / "config.yaml").write_text("model: {layers: 3}\noptimizer: adam\n")
    assert "is not empty and holds no run" in refusal(tmp_path / "theirs", **options)


def test_run_of_another_version_may_be_overwritten(run):
    """Its configuration may have a key that this version does not know; `environment.json` says whose it is."""
    settings = {**yaml.safe_load((run / "config.yaml").read_text()), "future": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "unknown key future" in refusal(run, resume=True)
    claim_run_folder(config(run), overwrite=True)
    assert tree(run) == ["mine", "mine/x", "notes.txt"]


def test_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    assert refusal(tmp_path / "run") == f"output_dir: {tmp_path / 'run'} is a file"


def test_nothing_to_resume(tmp_path):
    assert refusal(tmp_path / "run", resume=True) == f"output_dir: there is no run in {tmp_path / 'run'} to resume"


@pytest.mark.parametrize(
    ("changes", "key", "now", "before"),
    [
        ({"seed": 3}, "seed", "3", "0"),
        ({"data": {"english_ratio": 0.5}}, "data.english_ratio", "0.5", "0.25"),
        ({"supervision": {"thinking": {"weight": 1.0}}}, "supervision.thinking.weight", "1.0", "0.3"),
        ({"lora": {"r": 4}}, "lora.alpha", "32", "None"),
        ({"method": "tft"}, "method", "'tft'", "'deep-supervision'"),
    ],
)
def test_resuming_with_other_settings_names_the_key(run, changes, key, now, before):
    message = refusal(run, resume=True, config=config(run, **changes))
    assert message.startswith(f"--resume: {key} is {now} here and was {before} in {run}")


def test_resuming_with_a_longer_training_is_allowed(run):
    assert claim_run_folder(config(run, training={"num_train_epochs": 9}), resume=True) == run


# ---- what is written ----


def test_configuration_is_written_whole_and_read_back(tmp_path):
    asked = config(tmp_path / "run", seed=4, training={"learning_rate": 2e-5}, data={"language": "sw"})
    write_run_config(tmp_path / "run", asked)
    assert tree(tmp_path / "run") == ["config.yaml", "environment.json"]
    assert read_run_config(tmp_path / "run") == asked
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["supervision"]["thinking"] == {"signal": "logits", "layer": "auto", "weight": 0.3}


@pytest.mark.parametrize("place", ["file/run", "file"])
def test_folder_that_cannot_be_made(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=r"output_dir: .* cannot be written \((Not a directory|File exists)\)"):
        write_run_config(tmp_path / place, config(tmp_path / place))


def test_unreadable_configuration_names_the_file(tmp_path):
    for text in ("{", "nonsense: 1"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UsageError, match=r"config\.yaml") as raised:
            read_run_config(tmp_path)
        assert "\n" not in str(raised.value)


def test_environment_has_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "s3cr3t-value")
    monkeypatch.setattr(sys, "argv", ["/home/somebody/bin/pivotune", "train", "run.yaml"])
    content = environment()
    text = json.dumps(content)
    import torch
    import transformers

    assert content["libraries"]["torch"] == torch.__version__
    assert content["libraries"]["transformers"] == transformers.__version__
    assert content["command"] == ["pivotune", "train", "run.yaml"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/pivotune/__main__.py", "train"])
    assert environment()["command"] == ["pivotune", "train"]
    assert "s3cr3t-value" not in text
    assert "SOME_SERVICE_TOKEN" not in text
    assert "somebody" not in text
    assert not any(value in text for name, value in os.environ.items() if name in ("HOME", "USER") and len(value) > 4)


def test_text_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")
    # A lone surrogate cannot be encoded: the write fails in the middle.
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert tree(tmp_path) == ["results.json"]
    write_text(path, "neu, größer")
    assert path.read_text(encoding="utf-8") == "neu, größer"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_resumed_run_keeps_what_the_optimizer_brings_along(run):
    """Its state in a checkpoint would be used in place of the new value, without a word."""
    claim_run_folder(config(run, training={"max_steps": 9}), resume=True)
    with pytest.raises(UsageError, match=r"--resume: training\.learning_rate is 0\.5 here and was None in"):
        claim_run_folder(config(run, training={"learning_rate": 0.5}), resume=True)
