from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig
from tiny_training import (
    arguments,
    assert_same,
    run_config,
    save_tiny_model,
    tiny_trainer,
    weights,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from pivotune.errors import UsageError
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run
from pivotune.training.averaging import interpolate_weights
from pivotune.training.heldout import score_answers, summarize
from pivotune.training.preparation import heldout_examples

SHARE = 0.3


def lora(**options: Any) -> dict[str, Any]:
    return {"peft_config": LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})}


def between(trained: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: SHARE * trained[name] + (1 - SHARE) * start[name] for name in trained}


def test_weights_between_start_and_end():
    trained = {"a": torch.tensor([4.0, -2.0]), "b": torch.tensor([[1.0]], dtype=torch.bfloat16)}
    start = {"a": torch.tensor([0.0, 2.0], dtype=torch.float64), "b": torch.tensor([[3.0]]), "frozen": torch.ones(1)}
    found = interpolate_weights(trained, start, 0.25)
    assert {name: (tensor.tolist(), tensor.dtype) for name, tensor in found.items()} == {
        "a": ([1.0, 1.0], torch.float32),
        "b": ([[2.5]], torch.bfloat16),
    }
    assert trained["a"].tolist() == [4.0, -2.0]
    assert interpolate_weights(trained, start, 1.0)["a"].tolist() == [4.0, -2.0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ema", [None, 0.6])
def test_a_model_named_by_its_folder(tmp_path, tied, ema):
    name = save_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    start = weights(AutoModelForCausalLM.from_pretrained(name))
    found = []
    for share in (1.0, SHARE):
        trainer = tiny_trainer(tmp_path / "run", model=name, interpolate=share, ema=ema)
        trainer.train()
        found.append(weights(trainer.model))
    assert_same(found[1], between(found[0], start), tolerance=1e-6)
    assert (found[0]["model.norm.weight"] - found[1]["model.norm.weight"]).abs().max() > 1e-3
    head = trainer.model.get_output_embeddings().weight
    assert (head is trainer.model.get_input_embeddings().weight) == tied


def test_adapters_are_scaled(tmp_path):
    """The merged model lies between the starting model and the merged one of the whole way."""
    start, merged = weights(build_tiny_model()), []
    for share in (1.0, SHARE):
        trainer = tiny_trainer(tmp_path, trainer=lora(), interpolate=share)
        trainer.train()
        merged.append(weights(copy.deepcopy(trainer.model).merge_and_unload()))
    assert_same(merged[1], between(merged[0], start), tolerance=1e-6)
    assert (
        merged[0]["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]
    ).abs().max() > 1e-3


def test_a_resumed_run_goes_back_once(tmp_path):
    """Checkpoints hold the trained weights."""
    name = save_tiny_model(tmp_path / "base")
    options = {"model": name, "interpolate": SHARE, "save_strategy": "steps", "save_steps": 2}
    whole = tiny_trainer(tmp_path / "run", **options)
    whole.train()
    for step in (2, 4):
        resumed = tiny_trainer(tmp_path / "run", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_same(weights(resumed.model), weights(whole.model))


@pytest.mark.parametrize("settings", [{}, {"lora": {"r": 4, "dropout": 0.0}}], ids=["whole model", "adapters"])
def test_a_run_scores_what_it_saves(tmp_path, settings):
    models, values = [], []
    for share in (1.0, SHARE):
        config = run_config(tmp_path, interpolate=share, output_dir=str(tmp_path / f"run-{share}"), **settings)
        prepared = prepare_run(config)
        result = execute_run(prepared)
        models.append(AutoModelForCausalLM.from_pretrained(result.folder / "model"))
        scores = score_answers(models[-1], heldout_examples(prepared.validation)["target"], pad_token_id=0)
        values.append(result.results["tasks"]["heldout_sw"]["value"])
        assert values[-1] == pytest.approx(summarize(scores).nll, rel=1e-5)
    start = weights(AutoModelForCausalLM.from_pretrained(Path(config.model)))
    assert_same(weights(models[1]), between(weights(models[0]), start), tolerance=1e-6)
    assert values[0] != pytest.approx(values[1], rel=1e-3)


# ---- mistakes ----


def test_a_model_without_a_name_cannot_be_read_again(tmp_path):
    with pytest.raises(
        UsageError, match=r"^interpolate: 0\.3 reads the starting weights again at the end; give the model "
    ):
        tiny_trainer(tmp_path, interpolate=SHARE)
    trainer = tiny_trainer(tmp_path, interpolate=SHARE, trainer={"load_start": build_tiny_model})
    trainer.train()
    other = tiny_trainer(tmp_path)
    other.train()
    assert_same(weights(trainer.model), between(weights(other.model), weights(build_tiny_model())), tolerance=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"modules_to_save": ["norm"]}, "norm.modules_to_save.default.weight"),
        ({"use_dora": True, "target_modules": ["q_proj"]}, "q_proj.lora_magnitude_vector.default.weight"),
        ({"init_lora_weights": False, "target_modules": ["q_proj"]}, "q_proj.lora_B.default.weight"),
    ],
)
def test_only_plain_adapters_are_scaled(tmp_path, options, name):
    with pytest.raises(
        UsageError, match=r"^interpolate: 0\.3 scales LoRA adapters that start as zeros, and "
    ) as caught:
        tiny_trainer(tmp_path, interpolate=SHARE, trainer=lora(**options))
    assert name in str(caught.value)


def test_sharded_weights_are_not_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(
        UsageError, match=r"^interpolate: 0\.3 needs whole weights in every process, and fsdp2 shards them"
    ):
        arguments(tmp_path, interpolate=SHARE)
