"""No name in data, configuration, model or run leads out of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from planted import call, copy, refused, resume, write_yaml
from safetensors.torch import load_file, save_file
from tiny_training import tiny_trainer

from pivotune.config.yaml_text import parse_config
from pivotune.errors import UsageError
from pivotune.models.loading import load_model
from pivotune.models.locating import ModelFiles, check_index
from pivotune.runs.folder import claim_run_folder
from pivotune.sweeps.plan import parse_grid
from pivotune.training.resilience.checkpoints import own_checkpoint, staged_folder, write_checksums


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder that must not be read, changed or emptied."""
    folder = tmp_path / "outside"
    for name in ("letter.txt", "checkpoint-7/letter.txt", "model/letter.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = tree(folder)
    yield folder
    assert tree(folder) == before


# ---- models ----


def shard(folder: Path, name: str) -> None:
    """Put the weights of a model folder behind an index."""
    weights = folder / "model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    weights.rename(folder / "moved.safetensors")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/ABSOLUTE", "sub/x.safetensors", "..\\x.safetensors", 7,
                                  "pytorch_model.bin"])  # fmt: skip
def test_shards_elsewhere_are_refused(name, base, tmp_path, capsys):
    folder = copy(base, tmp_path / "model")
    if name == "/ABSOLUTE":
        name = str(folder / "moved.safetensors")
    shard(folder, name)
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / "moved.safetensors").read_bytes())
    message = refused(capsys, "chat", folder, "--prompt", "Namba?")
    assert message.startswith(f"{folder / 'model.safetensors.index.json'}: the shard {name!r} is not ")


def test_shards_beside_the_index_are_read(base, tmp_path):
    folder = copy(base, tmp_path / "model")
    shard(folder, "moved.safetensors")
    assert load_model(str(folder)) is not None


def test_index_of_a_hub_model_is_checked(tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names, **options: str(path))
    files = ModelFiles("owner/model", frozenset({"model.safetensors.index.json"}), {})
    with pytest.raises(UsageError, match="not a file beside it"):
        check_index(files, None)
    check_index(ModelFiles("owner/model", files.names | {"model.safetensors"}, {}), None)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "named.safetensors.index.json"])
def test_weights_named_by_the_configuration_stay_inside(name, base, tmp_path, capsys):
    folder = copy(base, tmp_path / "model")
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    (folder / "named.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "../elsewhere.safetensors"}})
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    assert "elsewhere.safetensors" in refused(capsys, "chat", folder, "--prompt", "Namba?")


@pytest.mark.parametrize("name", [["a"], {"a": 1}, 7, ""])
def test_adapters_name_a_model(name, base, tmp_path, capsys):
    """The base of an adapter is a name as any other, and checked as one; it is no path of the adapter's folder."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "does not name the base model" in refused(capsys, "chat", folder, "--prompt", "Namba?")


# ---- runs ----


def test_languages_are_no_paths(base, rows, tmp_path, outside, capsys):
    data = {"train": str(rows), "validation": 2, "language": "../../outside/model"}
    message = refused(capsys, "train", write_yaml(tmp_path, model=str(base), data=data, method="tft"))
    assert "data.language: '../../outside/model' is not a language code" in message
    assert {path.name for path in tmp_path.iterdir()} == {"outside", "run.yaml", "base", "rows.jsonl"}


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--lang", "../../outside", "--out", "OUT"],
        ["evaluate", "BASE", "--tasks", "flores_vi-../../x", "--out", "OUT", "--data-dir", "DATA"],
        ["evaluate", "BASE", "--tasks", "alignment_pairs_../x", "--out", "OUT", "--pairs", "ROWS", "--limit", "2"],
    ],
)
def test_languages_of_tasks_are_no_paths(words, base, rows, tmp_path, outside, capsys):
    places = {"OUT": tmp_path / "out", "BASE": base, "ROWS": rows, "DATA": rows.parent}
    assert refused(capsys, *(places.get(word, word) for word in words))
    assert {path.name for path in tmp_path.iterdir()} == {"outside"}


def test_values_of_a_sweep_are_no_paths(base, rows, tmp_path, outside, capsys):
    (axis,) = parse_grid(["data.train=../../outside/a.jsonl,/etc/b.jsonl,..,."])
    assert all("/" not in option.label and not option.label.startswith(".") for option in axis)
    path = write_yaml(tmp_path, model=str(base), data={"train": str(rows), "validation": 2})
    words = ["sweep", path, "--out", tmp_path / "sweep", "--grid", "training.x/../../../y=1,2"]
    assert "unknown key training.x/" in refused(capsys, *words)
    assert not (tmp_path / "sweep").exists()


def run_folder(stopped: Path, tmp_path: Path) -> Path:
    return copy(stopped / "run", tmp_path / "run")


def test_overwriting_a_run_does_not_follow_links(stopped, tmp_path, outside):
    run = run_folder(stopped, tmp_path)
    for name in ("checkpoint-9", "adapter", ".saving"):
        (run / name).symlink_to(outside, target_is_directory=True)
    (run / "results.json").unlink()
    (run / "results.json").symlink_to(outside / "letter.txt")
    config = parse_config({"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": str(run)})
    claim_run_folder(config, overwrite=True)
    # The lock stays: another process may be waiting for it.
    assert [path.name for path in run.iterdir()] in ([], [".lock"])


@pytest.mark.parametrize("name", ["checkpoint-9", "model", ".saving", "metrics.jsonl"])
def test_links_out_of_a_resumed_run_are_refused(name, stopped, tmp_path, outside, capsys):
    run = run_folder(stopped, tmp_path)
    if (run / name).is_dir():
        (run / name).rename(run / "aside")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(outside / "letter.txt" if "." in name[1:] else outside)
    assert f"{run / name}" in refused(capsys, *resume(stopped, tmp_path))


def test_a_link_out_of_a_checkpoint_makes_it_damaged(stopped, tmp_path, outside, capsys):
    linked = run_folder(stopped, tmp_path) / "checkpoint-2" / "optimizer.pt"
    linked.unlink()
    linked.symlink_to(outside / "letter.txt")
    # As if it had been written so.
    write_checksums(linked.parent)
    code, _, err = call(capsys, *resume(stopped, tmp_path))
    assert code == 2
    assert "no checkpoint is whole" in err.splitlines()[-1]
    assert f"{linked} is a link out of the run" in err.splitlines()[-1]


def test_staging_does_not_empty_what_a_link_points_to(tmp_path, outside):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".saving").symlink_to(outside, target_is_directory=True)
    with staged_folder(tmp_path / "run" / "checkpoint-7") as staging:
        (staging / "new").write_text("new")
    assert (tmp_path / "run" / "checkpoint-7" / "new").is_file()


def test_rotation_does_not_follow_links(tmp_path, outside):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(outside, target_is_directory=True)
    tiny_trainer(run, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert (run / "checkpoint-4").is_dir()


# ---- the best checkpoint ----


def test_best_checkpoint_is_one_of_the_run(tmp_path, outside):
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    (run / "checkpoint-7").symlink_to(outside / "checkpoint-7", target_is_directory=True)
    for named in ("checkpoint-4", "/old/place/checkpoint-4", str(outside / "checkpoint-4")):
        assert own_checkpoint(named, run) == run / "checkpoint-4"
    for named in (None, "", "..", str(outside), str(outside / "checkpoint-7"), "checkpoint-5", "checkpoint-4/../.."):
        assert own_checkpoint(named, run) is None


def test_planted_best_checkpoint_is_not_loaded(tmp_path, caplog):
    """`trainer_state.json` of a resumed run may name any folder."""
    elsewhere = tmp_path / "elsewhere"
    trainer = tiny_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model(str(elsewhere / "checkpoint-9"))
    with torch.no_grad():
        next(trainer.model.parameters()).add_(1)
    before = next(trainer.model.parameters()).clone()
    trainer.state.best_model_checkpoint = str(elsewhere / "checkpoint-9")
    trainer._load_best_model()
    assert torch.equal(next(trainer.model.parameters()), before)
    assert trainer.state.best_model_checkpoint is None
    assert "not one of this run" in caplog.text
    (elsewhere / "checkpoint-9").rename(tmp_path / "run" / "checkpoint-9")
    trainer.state = SimpleNamespace(**{**vars(trainer.state), "best_model_checkpoint": str(elsewhere / "checkpoint-9")})
    trainer._load_best_model()
    assert not torch.equal(next(trainer.model.parameters()), before)
