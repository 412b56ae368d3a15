from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_training import QUIET, arguments, assert_same, make_pairs, run_config, tiny_trainer, weights
from torch import Tensor
from transformers import AutoModelForCausalLM

from pivotune.errors import UsageError
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run
from pivotune.training.arguments import build_arguments
from pivotune.training.averaging import AVERAGE_FILE
from pivotune.training.heldout import score_answers, summarize
from pivotune.training.preparation import heldout_examples

LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")}


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def averaged_by_hand(trainer: Any, decay: float) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Train, and return the average after every step as a sum over all weights so far, and the last weights."""
    seen = [trained(trainer.model)]
    trainer.create_optimizer().register_step_post_hook(lambda *_: seen.append(trained(trainer.model)))
    trainer.train()
    averages = []
    for last in range(1, len(seen)):
        shares = [decay**last, *((1 - decay) * decay ** (last - step) for step in range(1, last + 1))]
        averages.append(
            {
                name: sum(share * one[name].double() for share, one in zip(shares, seen, strict=False))
                for name in seen[0]
            }
        )
    return averages, seen[-1]


@pytest.mark.parametrize("constructor", [{}, LORA], ids=["whole model", "adapters"])
def test_the_model_ends_as_the_average_of_its_weights(tmp_path, constructor):
    trainer = tiny_trainer(tmp_path, trainer=constructor, ema=0.7, save_strategy="steps", save_steps=1)
    averages, last = averaged_by_hand(trainer, 0.7)
    found = trained(trainer.model)
    assert len(averages) == 4
    for name, tensor in averages[-1].items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=0, atol=1e-6)
    assert any((found[name] - last[name]).abs().max() > 1e-3 for name in last)
    for step, average in enumerate(averages, start=1):
        kept = load_file(tmp_path / f"checkpoint-{step}" / AVERAGE_FILE)
        assert kept.keys() == average.keys()
        for name, tensor in average.items():
            torch.testing.assert_close(kept[name].double(), tensor, rtol=0, atol=1e-6)


def test_the_average_of_half_precision_weights_is_float32(tmp_path):
    """Steps of 0.001 of the difference would be lost in bfloat16."""
    model = build_tiny_model().to(torch.bfloat16)
    trainer = tiny_trainer(tmp_path, model=model, ema=0.999, save_strategy="steps", save_steps=4)
    averages, _ = averaged_by_hand(trainer, 0.999)
    kept = load_file(tmp_path / "checkpoint-4" / AVERAGE_FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    assert kept[name].dtype == torch.float32
    torch.testing.assert_close(kept[name].double(), averages[-1][name], rtol=0, atol=1e-6)
    assert not torch.equal(kept[name], kept[name].bfloat16().float())
    assert trained(trainer.model)[name].dtype == torch.bfloat16


def test_tied_weights_stay_tied(tmp_path):
    model = build_tiny_model(tie_word_embeddings=True)
    trainer = tiny_trainer(tmp_path, model=model, ema=0.5)
    trainer.train()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_evaluations_in_the_training_read_the_weights_themselves(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2}
    rows = {"eval_dataset": make_pairs(5, seed=9)}
    plain, averaged = (tiny_trainer(tmp_path, trainer=rows, **options, **ema) for ema in ({}, {"ema": 0.7}))
    lines = []
    for trainer in (plain, averaged):
        trainer.train()
        lines.append([line["eval_target_nll"] for line in trainer.state.log_history if "eval_target_nll" in line])
    assert lines[0] == lines[1]
    assert averaged.evaluate()["eval_target_nll"] != pytest.approx(lines[0][-1], rel=1e-4)
    assert plain.evaluate()["eval_target_nll"] == lines[0][-1]


def test_a_run_scores_and_saves_the_average(tmp_path):
    config = run_config(tmp_path, ema=0.6)
    prepared = prepare_run(config)
    result = execute_run(prepared)
    model = AutoModelForCausalLM.from_pretrained(result.folder / "model")
    last = sorted(Path(result.folder).glob("checkpoint-*"))[-1]
    average = load_file(last / AVERAGE_FILE)
    found = dict(model.named_parameters())
    assert_same({name: found[name].detach() for name in average}, average)
    scores = score_answers(model, heldout_examples(prepared.validation)["target"], pad_token_id=0)
    assert result.results["tasks"]["heldout_sw"]["value"] == pytest.approx(summarize(scores).nll, rel=1e-5)
    assert (weights(AutoModelForCausalLM.from_pretrained(last))["lm_head.weight"] - found["lm_head.weight"]).any()


# ---- mistakes ----


@pytest.mark.parametrize(("decay", "warned"), [(0.999, True), (0.5, False)])
def test_an_average_that_keeps_the_starting_weights_is_warned_about(tmp_path, caplog, decay, warned):
    tiny_trainer(tmp_path, ema=decay).train()
    line = "ema: 0.999 keeps 100 % of the starting weights in the average after 4 steps; lower it, or leave it out"
    assert (line in caplog.messages) is warned


def test_sharded_weights_have_no_average(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    arguments(tmp_path)
    with pytest.raises(UsageError, match=r"^ema: 0\.9 needs whole weights in every process, and fsdp2 shards them; "):
        arguments(tmp_path, ema=0.9)


def test_the_best_checkpoint_would_replace_the_average(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    with pytest.raises(UsageError, match=r"^training\.load_best_model_at_end: true would replace the moving average"):
        arguments(tmp_path, ema=0.9, **best)


@pytest.mark.parametrize("decay", [0.0, 1.0, -1, "x"])
def test_a_decay_lies_between_0_and_1(tmp_path, decay):
    with pytest.raises(UsageError, match=r"^DeepSupervisionConfig: ema: .* is not allowed; allowed: "):
        arguments(tmp_path, ema=decay)


def test_ema_stands_beside_training(tmp_path):
    assert build_arguments(run_config(tmp_path, ema=0.9)).ema == 0.9
    with pytest.raises(UsageError, match=r"training\.ema is set outside of training:"):
        build_arguments(run_config(tmp_path, training={**QUIET, "ema": 0.9}))


def test_a_checkpoint_without_an_average(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    path = tmp_path / "checkpoint-2" / AVERAGE_FILE
    with pytest.raises(UsageError, match=rf"^{path}: holds no average of these weights; resume with the ema"):
        tiny_trainer(tmp_path, ema=0.9).train(resume_from_checkpoint=str(path.parent))
