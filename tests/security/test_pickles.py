"""Nothing is unpickled from a model or run folder: planted pickles make a folder when they are loaded without care."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from planted import Mark, call, copy, plant, refused, resume, write_yaml
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import safe_globals

from pivotune.errors import UsageError
from pivotune.training.resilience.checkpoint_safety import _STAND_INS, _check_distributed, check_checkpoint
from pivotune.training.resilience.checkpoints import write_checksums

PICKLES = ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
           "tokenizer.pkl", "vocab.pkl")  # fmt: skip


def arguments(verb: str, model: Path, rows: Path, folder: Path) -> list[object]:
    """A quick call of a verb that reads a model folder."""
    if verb == "train":
        settings = {"model": str(model), "data": {"train": str(rows), "validation": 2}, "method": "tft"}
        return ["train", write_yaml(folder, **settings), "--set", "training.max_steps=1"]
    if verb == "analyze":
        return ["analyze", "--model", model, "--data", rows, "--rows", 2, "--out", folder / "layers.json"]
    if verb == "evaluate":
        return [
            "evaluate",
            model,
            "--tasks",
            "alignment_pairs_sw",
            "--pairs",
            rows,
            "--limit",
            3,
            "--out",
            folder / "out",
        ]
    return ["chat", model, "--prompt", "Namba?", "--max-new-tokens", 2]


VERBS = ("train", "analyze", "evaluate", "chat")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_pickles_beside_safetensors_are_not_read(verb, base, rows, tmp_path, mark, capsys):
    model = copy(base, tmp_path / "model")
    for index, name in enumerate(PICKLES):
        plant(model / name, mark, plain=index % 2 == 1)
    code, _, err = call(capsys, *arguments(verb, model, rows, tmp_path))
    assert code == 0, err


@pytest.mark.parametrize("verb", VERBS)
def test_pickled_weights_are_refused(verb, base, rows, tmp_path, mark, capsys):
    model = copy(base, tmp_path / "model")
    (model / "model.safetensors").unlink()
    plant(model / "pytorch_model.bin", mark)
    assert "only safetensors are read" in refused(capsys, *arguments(verb, model, rows, tmp_path))


@pytest.mark.parametrize("verb", VERBS)
def test_pickled_adapters_are_refused(verb, adapter, rows, tmp_path, mark, capsys):
    folder = copy(adapter, tmp_path / "planted")
    plant(folder / "adapter_model.bin", mark)
    if verb == "chat":
        assert call(capsys, *arguments(verb, folder, rows, tmp_path))[0] == 0
    (folder / "adapter_model.safetensors").unlink()
    assert "only safetensors are read" in refused(capsys, *arguments(verb, folder, rows, tmp_path))


def test_compare_reads_no_pickle(stopped, tmp_path, mark, capsys):
    for name in ("one", "two"):
        run = copy(stopped / "run", tmp_path / name)
        for pickled in PICKLES:
            plant(run / pickled, mark)
            plant(run / "model" / pickled, mark)
    assert call(capsys, "compare", tmp_path / "one", tmp_path / "two", "--resamples", 1000)[0] == 0


# ---- going on from a checkpoint ----


@pytest.fixture
def checkpoint(stopped, tmp_path) -> Path:
    copy(stopped / "run", tmp_path / "run")
    return tmp_path / "run" / "checkpoint-2"


def test_checkpoints_hold_no_pickled_arguments(checkpoint):
    assert (checkpoint / "optimizer.pt").is_file()
    assert not (checkpoint / "training_args.bin").exists()


def test_states_of_a_checkpoint_are_plain_values_and_are_used(checkpoint, stopped, tmp_path, capsys):
    """NumPy's random state is among what is read with `weights_only`; an old `training_args.bin` is not read at all."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with safe_globals():
            content = torch.load(checkpoint / name, weights_only=True)
        if name == "rng_state.pth":
            assert isinstance(content["numpy"][1], np.ndarray)
    plant(checkpoint / "training_args.bin", tmp_path / "never-made")
    code, out, err = call(capsys, *resume(stopped, tmp_path))
    assert code == 0, err
    assert str(checkpoint) in out.replace("\n", "")
    assert json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    assert not (tmp_path / "never-made").exists()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth", "pytorch_model_fsdp.bin",
             "optimizer.bin", "pytorch_model.bin", "adapter/adapter_model.bin", "global_step2/mp_rank_00_model_states.pt"]
)  # fmt: skip
def test_planted_states_are_refused(name, plain, checkpoint, stopped, tmp_path, mark, capsys):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    plant(checkpoint / name, mark, plain=plain)
    # Who plants files writes their checksums too; others are passed over as damaged.
    write_checksums(checkpoint)
    message = refused(capsys, *resume(stopped, tmp_path))
    assert message.startswith(f"{checkpoint / name}: not read: ")


def test_file_that_breaks_off_is_left_to_its_reader(checkpoint):
    whole = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    check_checkpoint(checkpoint)


def test_trainer_refuses_planted_states_too(checkpoint, tmp_path, mark):
    """Also where `train(resume_from_checkpoint=...)` is called from Python."""
    from tiny_training import tiny_trainer

    plant(checkpoint / "optimizer.pt", mark)
    # Whoever plants it can write checksums too.
    write_checksums(checkpoint)
    with pytest.raises(UsageError, match="not read"):
        tiny_trainer(tmp_path / "other").train(resume_from_checkpoint=str(checkpoint))


# ---- sharded checkpoints, whose own readers unpickle ----


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "run" / "checkpoint-2" / "pytorch_model_fsdp_0"
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    half = torch.ones(2, dtype=torch.bfloat16)
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "half": half, "step": 3}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(states, checkpoint_id=str(folder), no_dist=True)
    return folder


def edit_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_sharded_checkpoints_pass(sharded):
    check_checkpoint(sharded.parent)


@pytest.mark.parametrize("name", [".metadata", "__1.metadata"])
def test_planted_metadata_is_refused(name, sharded, mark):
    edit_metadata(sharded, lambda metadata: setattr(metadata, "planner_data", Mark(mark)))
    (sharded / ".metadata").rename(sharded / name)
    with pytest.raises(UsageError, match="not read"):
        check_checkpoint(sharded.parent)


def build_on(module: str, name: str, key: str) -> bytes:
    """A pickle that gives a state to the named class or function itself, then is an empty dictionary."""
    state = pickle.dumps((None, {key: ""}), protocol=2)[2:-1]
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + state + b"b0}."


# One name for each thing that is handed out; many share one.
_NAMES = {id(found): (module, name) for module, names in _STAND_INS.items() for name, found in names.items()}


@pytest.mark.parametrize(("module", "name"), _NAMES.values())
def test_metadata_changes_no_class(module, name, sharded, mark):
    """`BUILD` on a class would change it for the whole process: no other file would have a suffix to be checked by."""
    (sharded / ".metadata").write_bytes(build_on(module, name, "suffix"))
    plant(sharded / "later.pt", mark)
    with pytest.raises(UsageError, match=r"metadata: not read") as raised:
        _check_distributed(sharded / ".metadata")
    assert isinstance(raised.value.__cause__, (pickle.UnpicklingError, TypeError))
    assert Path("x.pt").suffix == ".pt"
    with pytest.raises(UsageError, match=r"later\.pt: not read"):
        check_checkpoint(sharded.parent)


@pytest.mark.parametrize("state", [(None, {"__class__": "x"}), ({}, {"fqn": "y"}), 3, "text"])
def test_records_of_metadata_have_plain_states_only(state, sharded):
    """What assigns attributes could turn the record of a tensor into that of a value, after it was taken for a tensor."""
    state = pickle.dumps(state, protocol=2)[2:-1]
    name = b"ctorch.distributed.checkpoint.metadata\nTensorStorageMetadata\n"
    (sharded / ".metadata").write_bytes(b"\x80\x02" + name + b")\x81" + state + b"b.")
    with pytest.raises(UsageError, match=r"metadata: not read") as raised:
        check_checkpoint(sharded.parent)
    assert isinstance(raised.value.__cause__, pickle.UnpicklingError)


def test_planted_values_in_shards_are_refused(sharded, mark):
    buffer = io.BytesIO()
    torch.save(Mark(mark), buffer)
    (shard,) = sharded.glob("*.distcp")
    start = shard.stat().st_size
    shard.write_bytes(shard.read_bytes() + buffer.getvalue())

    def move(metadata) -> None:
        place = next(place for index, place in metadata.storage_data.items() if index.fqn == "step")
        place.offset, place.length = start, len(buffer.getvalue())

    edit_metadata(sharded, move)
    with pytest.raises(UsageError, match="not read"):
        check_checkpoint(sharded.parent)


def test_shards_elsewhere_are_refused(sharded):
    def move(metadata) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = f"../../{place.relative_path}"

    edit_metadata(sharded, move)
    with pytest.raises(UsageError, match="not read"):
        check_checkpoint(sharded.parent)


def test_deepspeed_states_may_hold_its_own_classes_and_no_others(tmp_path, mark, monkeypatch):
    module = types.ModuleType("deepspeed.runtime.loss_scaler")

    class LossScaler:
        pass

    LossScaler.__module__, LossScaler.__qualname__ = module.__name__, "LossScaler"
    module.LossScaler = LossScaler
    for name in ("deepspeed", "deepspeed.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    states = tmp_path / "checkpoint-2" / "global_step2" / "zero_pp_rank_0_optim_states.pt"
    states.parent.mkdir(parents=True)
    torch.save({"loss_scaler": LossScaler()}, states)
    check_checkpoint(tmp_path / "checkpoint-2")
    torch.save({"loss_scaler": LossScaler(), "more": Mark(mark)}, states)
    with pytest.raises(UsageError, match="not read"):
        check_checkpoint(tmp_path / "checkpoint-2")
    # What its modules import is theirs by name only.
    module.Popen, module.os = subprocess.Popen, os  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("LossScaler", "Popen", "os.Popen", "Missing"):
        with zipfile.ZipFile(states, "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02c" + f"{module.__name__}\n{name}\n.".encode())
            file.writestr("archive/version", "3")
        if name == "LossScaler":
            check_checkpoint(tmp_path / "checkpoint-2")
        else:
            with pytest.raises(UsageError, match="not read"):
                check_checkpoint(tmp_path / "checkpoint-2")
