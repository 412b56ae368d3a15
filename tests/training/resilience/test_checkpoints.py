from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tiny_training import assert_same, make_pairs, step_logs, tiny_trainer, weights
from transformers.trainer_utils import get_last_checkpoint

from pivotune.errors import UsageError
from pivotune.training.resilience.checkpoints import CHECKSUMS, STAGING, last_checkpoint, staged_folder


def content(folder: Path) -> dict[str, str]:
    """Every file but the checksums."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.fixture
def old(tmp_path) -> Path:
    """A complete `model/` of an earlier time."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    (folder / "extra").write_text("old")
    return folder


# ---- whole or not there ----


def test_folder_appears_only_when_complete(tmp_path):
    final = tmp_path / "deep" / "model"
    with staged_folder(final) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "weights").write_text("new")
        assert not final.exists()
        assert staging.name == final.name
    assert content(final) == {"sub/weights": "new"}
    assert not (final.parent / STAGING).exists()


def test_old_folder_is_replaced_as_a_whole(tmp_path, old):
    with staged_folder(old) as staging:
        (staging / "weights").write_text("new")
        assert content(old) == {"weights": "old", "extra": "old"}
    assert content(tmp_path) == {"model/weights": "new"}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("a bug"), RuntimeError("a bug"), OSError("no"), MemoryError()]
)
def test_old_folder_stays_when_the_block_fails(tmp_path, old, error):
    with pytest.raises(BaseException) as raised, staged_folder(old) as staging:  # noqa: PT011, PT012
        (staging / "weights").write_text("half")
        raise error
    assert content(tmp_path) == {"model/weights": "old", "model/extra": "old"}
    # Only what says "cannot write" becomes a user's message; everything else stays what it was.
    assert (raised.value is error) == (not isinstance(error, OSError))


def test_old_folder_comes_back_when_the_rename_fails(tmp_path, old, monkeypatch):
    rename = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target) == old and Path(source).name == "model":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match="Input/output error"), staged_folder(old) as staging:
        (staging / "weights").write_text("new")
    assert content(tmp_path) == {"model/weights": "old", "model/extra": "old"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
@pytest.mark.parametrize(("moved", "left"), [("model.old", "old"), ("model", "new")])
def test_nothing_is_lost_when_a_signal_comes_between_the_renames(tmp_path, old, monkeypatch, moved, left, error):
    """After the old folder was moved away, or after the new one was moved to its place."""
    rename = os.replace

    def interrupted(source: Any, target: Any) -> None:
        rename(source, target)
        if Path(target).name == moved and Path(source).name == "model":
            raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises((KeyboardInterrupt, UsageError)) as raised, staged_folder(old) as staging:
        (staging / "weights").write_text("new")
    assert isinstance(raised.value, KeyboardInterrupt) == isinstance(error, KeyboardInterrupt)
    assert (old / "weights").read_text() == left
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_is_kept_where_it_cannot_be_moved_back(tmp_path, old, monkeypatch):
    """A later process takes it from the staging folder."""
    rename = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target) == old:
            raise OSError(errno.EROFS, "Read-only file system")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(UsageError, match="Read-only"), staged_folder(old) as staging:
            (staging / "weights").write_text("new")
    assert not old.exists()
    with staged_folder(tmp_path / "adapter"):
        pass
    assert content(old) == {"weights": "old", "extra": "old"}


def test_what_a_kill_left_after_the_replacement_is_no_obstacle(tmp_path, old):
    stale = tmp_path / STAGING / "model.old"
    stale.mkdir(parents=True)
    (stale / "weights").write_text("older")
    with staged_folder(old) as staging:
        (staging / "weights").write_text("new")
    assert content(tmp_path) == {"model/weights": "new"}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not tell what a descriptor is of")
def test_folders_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with staged_folder(tmp_path / "model") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "weights").write_text("new")
    where = tmp_path / STAGING / "model"
    assert set(synced[:-2]) == {str(where / name) for name in (".", "sub", "sub/weights", CHECKSUMS)}
    assert synced[-2:] == [str(tmp_path), str(tmp_path / STAGING)]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (OSError(errno.EROFS, "Read-only file system"), "see to it that it can be written"),
        (SafetensorError("I/O error: Read-only file system (os error 30)"), "see to it that it can be written"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "make room"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "make room"),
    ],
)
def test_the_advice_fits_the_fault(tmp_path, error, advice):
    with pytest.raises(UsageError, match=f"{advice} and go on with --resume"), staged_folder(tmp_path / "model"):
        raise error


def test_leftovers_of_a_killed_process_are_not_mixed_in(tmp_path):
    stale = tmp_path / STAGING / "model"
    stale.mkdir(parents=True)
    (stale / "stale").write_text("half")
    with staged_folder(tmp_path / "model") as staging:
        (staging / "weights").write_text("new")
    assert content(tmp_path) == {"model/weights": "new"}


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", f"{STAGING}/checkpoint-11"):
        (tmp_path / name).mkdir(parents=True)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# ---- disk full ----


def full_weights(monkeypatch) -> None:
    """What safetensors raises; half of the file is there."""
    import transformers.modeling_utils as modeling

    def save(tensors: Any, path: str, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(modeling, "safe_save_file", save)


def full_optimizer(monkeypatch) -> None:
    """What torch's zip writer raises while the optimizer is written."""

    def save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError(
            "[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file data/3: file write failed"
        )

    monkeypatch.setattr(torch, "save", save)


def full_state(monkeypatch) -> None:
    from transformers.trainer_callback import TrainerState

    def save(self: TrainerState, path: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TrainerState, "save_to_json", save)


@pytest.mark.parametrize("fill", [full_weights, full_optimizer, full_state])
def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, fill):
    """One line that names it; it loads, and the run goes on from it as if nothing had happened."""
    options = {"rows": make_pairs(24), "save_strategy": "steps", "save_steps": 2}
    straight = tiny_trainer(tmp_path / "straight", **options)
    straight.train()

    trainer = tiny_trainer(tmp_path / "run", **options)
    save = trainer._save_checkpoint
    with monkeypatch.context() as patch:

        def save_or_fail(*args: Any) -> None:
            if trainer.state.global_step == 4:
                fill(patch)
            save(*args)

        trainer._save_checkpoint = save_or_fail
        with pytest.raises(UsageError) as raised:
            trainer.train()
    good = tmp_path / "run" / "checkpoint-2"
    message = str(raised.value)
    assert "\n" not in message
    assert f"{tmp_path / 'run' / 'checkpoint-4'}: cannot be saved" in message
    assert f"the last good checkpoint is {good}" in message
    assert "--resume" in message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    assert get_last_checkpoint(str(tmp_path / "run")) == str(good)

    resumed = tiny_trainer(tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed.model), weights(straight.model))
    assert step_logs(resumed) == step_logs(straight)


def test_full_disk_without_an_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, save_strategy="steps", save_steps=2)
    full_weights(monkeypatch)
    with pytest.raises(UsageError, match=r"No space left on device.*there is no checkpoint yet"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


_LIMITED = """
import resource, sys
from pathlib import Path
from tiny_training import make_pairs, tiny_trainer
from pivotune.errors import UsageError

folder = Path(sys.argv[1])
trainer = tiny_trainer(folder, rows=make_pairs(16), save_strategy="steps", save_steps=2)
save = trainer._save_checkpoint

def save_with_less_room(*args):
    if trainer.state.global_step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    save(*args)

trainer._save_checkpoint = save_with_less_room
try:
    trainer.train()
except UsageError as error:
    sys.exit(f"UsageError: {error}")
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.5, 1.5])
def test_a_real_limit_on_file_size(tmp_path, share):
    """The kernel refuses the bytes: at half of the weights' size in the weights, at 1.5 times in the optimizer."""
    size = sum(tensor.nbytes for tensor in tiny_trainer(tmp_path / "size").model.state_dict().values())
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path / "run"), str(int(share * size))],
        capture_output=True, text=True, timeout=480, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stderr
    assert last_line.startswith("UsageError: ")
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}" in last_line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-2"]
    resumed = tiny_trainer(tmp_path / "run", rows=make_pairs(16))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
