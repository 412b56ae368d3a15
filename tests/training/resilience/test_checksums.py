from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pivotune.errors import UsageError
from pivotune.training.resilience.checkpoints import (
    CHECKSUMS,
    find_checkpoint_damage,
    find_damage,
    restore_replaced,
    staged_folder,
    whole_checkpoint,
    write_checksums,
)


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    with staged_folder(folder) as staging:
        save_file({"weight": torch.arange(100.0)}, staging / "model.safetensors")
        (staging / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (staging / "sub").mkdir()
        (staging / "sub" / "shard").write_bytes(b"abc")
    return folder


def test_every_file_is_named_with_size_and_digest(tmp_path):
    folder = checkpoint(tmp_path, 1)
    found = json.loads((folder / CHECKSUMS).read_text())
    assert set(found) == {"model.safetensors", "trainer_state.json", "sub/shard"}
    assert found["sub/shard"] == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "size": 3,
    }
    assert find_damage(folder) is None
    write_checksums(folder)
    assert json.loads((folder / CHECKSUMS).read_text()) == found


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _expect(path: Path, name: str, size: float = 3) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), name: {"size": size, "sha256": "0"}}))


def _link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    """Whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def _state(path: Path, text: str) -> None:
    """As if it had been written so."""
    path.write_text(text)
    write_checksums(path.parent)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", _cut, r"model\.safetensors has \d+ bytes where \d+ were written"),
        ("model.safetensors", _flip, r"model\.safetensors is not what was written"),
        ("sub/shard", Path.unlink, "sub/shard is missing"),
        ("trainer_state.json", Path.unlink, r"trainer_state\.json is missing"),
        (CHECKSUMS, _cut, "checksums.json is damaged|checksums.json has"),
        (CHECKSUMS, lambda path: path.write_text('{"a": 1}'), r"checksums\.json is damaged"),
        (CHECKSUMS, lambda path: path.write_bytes(b"\xff"), r"checksums\.json cannot be read"),
        (CHECKSUMS, lambda path: path.write_text("{}"), r"checksums\.json does not name trainer_state\.json"),
        (CHECKSUMS, lambda path: path.write_text("[" * 100_000), r"checksums\.json is damaged"),
        (CHECKSUMS, lambda path: _expect(path, "sub/shard", size=float("inf")), r"checksums\.json is damaged"),
        (CHECKSUMS, lambda path: _expect(path, "a\0b"), r"checksums\.json names 'a\\x00b', which is not in the folder"),
        (CHECKSUMS, lambda path: _expect(path, "/etc/hostname"), r"names '/etc/hostname', which is not in the folder"),
        (CHECKSUMS, lambda path: _expect(path, "../../x"), r"names '\.\./\.\./x', which is not in the folder"),
        ("sub/shard", lambda path: _link(path, "/etc/hostname"), r"sub/shard is a link out of the run"),
        ("sub/shard", lambda path: _link(path, "shard"), r"sub/shard is missing|sub/shard cannot be read"),
        ("sub/shard", lambda path: _pipe(path), r"sub/shard is no plain file"),
        (CHECKSUMS, lambda path: _pipe(path), r"checksums\.json is no plain file"),
        ("trainer_state.json", lambda path: _state(path, "[" * 100_000), r"trainer_state\.json is damaged"),
    ],
)
def test_damage_is_named_and_the_checkpoint_passed_over(tmp_path, caplog, name, damage, words):
    good, bad = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert whole_checkpoint(tmp_path) == bad
    damage(bad / name)
    if name == CHECKSUMS and damage is _cut:
        # Only its last line end is gone.
        assert find_checkpoint_damage(bad) is None
        return
    assert whole_checkpoint(tmp_path) == good
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"{bad} is damaged and passed over: ")
    assert re.search(words, message), message


def test_no_whole_checkpoint_is_an_error_and_no_checkpoint_is_none(tmp_path):
    assert whole_checkpoint(tmp_path) is None
    for step in (2, 4):
        _flip(checkpoint(tmp_path, step) / "model.safetensors")
    with pytest.raises(
        UsageError, match=r"no checkpoint is whole \(checkpoint-4: model.* checkpoint-2: .*remove them and give"
    ):
        whole_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", _cut, r"model\.safetensors cannot be read"),
        ("trainer_state.json", _cut, r"trainer_state\.json is damaged"),
        ("trainer_state.json", lambda path: path.write_text("[]"), r"trainer_state\.json is damaged"),
        ("trainer_state.json", Path.unlink, r"trainer_state\.json is missing"),
    ],
)
def test_checkpoints_of_earlier_versions_are_looked_at_without_checksums(tmp_path, name, damage, words):
    folder = checkpoint(tmp_path, 1)
    (folder / CHECKSUMS).unlink()
    assert find_checkpoint_damage(folder) is None
    damage(folder / name)
    found = find_checkpoint_damage(folder)
    assert found is not None
    assert re.match(words, found)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["optimizer.pt", "scheduler.pt", "rng_state.pth"], None),
        (["scheduler.pt", "rng_state.pth"], "optimizer.pt is missing"),
        (["optimizer.pt"], "scheduler.pt is missing"),
        (["rng_state_0.pth", "rng_state_1.pth"], "optimizer.pt is missing"),
        ([], None),  # save_only_model
        (["optimizer_0", "pytorch_model_fsdp_0", "scheduler.pt", "rng_state_0.pth"], None),
        (["global_step4", "latest", "rng_state_0.pth"], None),
    ],
)
def test_states_that_are_always_written_together(tmp_path, names, missing):
    folder = checkpoint(tmp_path, 1)
    (folder / CHECKSUMS).unlink()
    for name in names:
        (folder / name).write_bytes(b"")
    assert find_checkpoint_damage(folder) == missing


def test_a_replacement_half_done_is_undone(tmp_path):
    """Killed between the two renames: the old folder is out of its place and the new one not yet in it."""
    old = tmp_path / ".saving" / "model.old"
    old.mkdir(parents=True)
    (old / "weights").write_text("old")
    restore_replaced(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "old"
    (tmp_path / ".saving" / "model.old").mkdir()
    restore_replaced(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "old"
