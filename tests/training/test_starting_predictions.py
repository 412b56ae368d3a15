from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from tiny_batches import collate, make_examples
from tiny_training import arguments, assert_same, make_pairs, run_config, step_logs, tiny_trainer, weights
from torch import nn

from pivotune.config.supervision import KeepEnglishConfig, SupervisionConfig
from pivotune.data.collator import ExampleDataset
from pivotune.data.examples import Example, Side
from pivotune.errors import UsageError
from pivotune.runs.prepare import prepare_run
from pivotune.training.batching import blank_like
from pivotune.training.starting_model import PREDICTIONS_FILE, PredictionDataset, with_starting_model

TOP = 5
EXAMPLES = make_examples(8)


def keep(kl: float = 0.5, top: int = TOP) -> dict[str, Any]:
    return {"supervision": {"keep_english": {"kl": kl, "top": top}}}


def predicted(
    folder: Path, model: nn.Module | None = None, examples: list[Example] | None = None, top: int = TOP, **changes: Any
) -> Any:
    supervision = SupervisionConfig(keep_english=KeepEnglishConfig(kl=0.5, top=top))
    return with_starting_model(
        ExampleDataset(EXAMPLES if examples is None else examples),
        build_tiny_model() if model is None else model,
        supervision,
        arguments(folder, **changes),
        pad_token_id=0,
    )


@pytest.mark.parametrize("batch_size", [1, 8])
def test_predictions_of_the_model_itself(tmp_path, batch_size):
    """The row whose answer is all of it has no token before the first one."""
    short = Side(ids=np.array([5, 9, 7], np.int32), query=(0, 0), answer=0, characters=3)
    examples = [*EXAMPLES, Example(main=short, english_prompt=True, english_answer=True)]
    model: Any = build_tiny_model("gemma2", resid_pdrop=0.5).train()
    dataset = predicted(tmp_path, model, examples, per_device_eval_batch_size=batch_size)
    assert model.training
    lengths = []
    for example, found in zip(examples, dataset, strict=True):
        tokens, log_probabilities = found.start_predictions
        lengths.append(len(tokens))
        assert found.main is example.main
        if not example.english_answer:
            continue
        first = max(example.main.answer, 1)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor(example.main.ids[None]).long()).logits[0, first - 1 : -1]
        best, ids = logits.log_softmax(dim=-1).topk(TOP)
        assert tokens.tolist() == ids.tolist()
        assert (tokens.dtype, log_probabilities.dtype) == (np.int32, np.float16)
        np.testing.assert_allclose(log_probabilities[:, :-1], best, rtol=1e-3)
        np.testing.assert_allclose(np.exp(log_probabilities[:, -1]), 1 - best.exp().sum(dim=1), atol=2e-3)
    assert lengths == [0, 0, 5, 0, 0, 3, 0, 0, 2]


def test_batches_hold_the_predictions_of_their_rows(tmp_path):
    dataset = predicted(tmp_path)
    examples = [dataset[2], dataset[0], dataset[5], blank_like(dataset[5])]
    batch = collate(examples)
    assert batch["start_tokens"].shape == (4, 5, TOP)
    assert batch["start_log_probabilities"].shape == (4, 5, TOP + 1)
    assert (batch["start_tokens"].dtype, batch["start_log_probabilities"].dtype) == (torch.int64, torch.float32)
    for row, example in enumerate(examples):
        tokens, log_probabilities = example.start_predictions
        assert batch["start_tokens"][row, : len(tokens)].tolist() == tokens.tolist()
        assert batch["start_log_probabilities"][row, : len(tokens)].tolist() == log_probabilities.tolist()
        assert not batch["start_tokens"][row, len(tokens) :].any()
    assert "start_tokens" not in collate(EXAMPLES)


def test_a_worker_maps_the_file_again(tmp_path):
    dataset = predicted(tmp_path)
    assert len(pickle.dumps(dataset)) < len(pickle.dumps(ExampleDataset(EXAMPLES))) + 400
    again = pickle.loads(pickle.dumps(dataset))
    assert isinstance(again, PredictionDataset)
    for one, other in zip(dataset, again, strict=True):
        assert all(map(np.array_equal, one.start_predictions, other.start_predictions))


def changed_model() -> nn.Module:
    model = build_tiny_model()
    with torch.no_grad():
        next(model.parameters())[7, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"model": changed_model()}, "other weights"),
        ({"top": 4}, "other settings"),
        ({"bf16": True}, "other settings"),
        ({"examples": [*EXAMPLES[:2], *EXAMPLES[3:]]}, "other rows"),
    ],
    ids=str,
)
def test_the_file_is_used_again_for_the_same_predictions(tmp_path, caplog, changes, reason):
    predicted(tmp_path)
    path = tmp_path / PREDICTIONS_FILE
    before = path.stat().st_mtime_ns
    with caplog.at_level(logging.WARNING, logger="pivotune"):
        predicted(tmp_path, **changes)
    assert caplog.messages == ([] if reason is None else [f"{path}: computed again ({reason})"])
    assert (path.stat().st_mtime_ns == before) == (reason is None)


# ---- training ----


@pytest.mark.parametrize("method", ["tft", "deep-supervision"])
def test_the_loss_is_logged_and_weighted(tmp_path, method):
    """It is 0 in the first step, whose model is the starting one."""
    trainer = tiny_trainer(tmp_path, method=method, english_ratio=0.5, **keep(), supervision_schedule="constant")
    trainer.train()
    lines = step_logs(trainer)
    assert lines[0]["english_kl_loss"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["english_kl_loss"] > 2e-3
    for line in lines:
        inner = 0.3 * (line.get("conversion_loss", 0) + line.get("thinking_loss", 0))
        assert line["loss"] == pytest.approx(line["tft_loss"] + inner + 0.5 * line["english_kl_loss"], rel=1e-5)
        assert ("thinking_loss" in line) == (method == "deep-supervision")


def test_a_high_weight_keeps_the_predictions(tmp_path):
    """Trained on the replayed rows' own answers, the model leaves the starting one."""
    found = []
    for kl in (1e-6, 20.0):
        options = {**keep(kl=kl), "num_train_epochs": 4, "learning_rate": 3e-3}
        trainer = tiny_trainer(tmp_path, method="tft", english_ratio=0.5, **options)
        trainer.train()
        found.append(step_logs(trainer)[-1]["english_kl_loss"])
    assert found[1] < 0.3 * found[0]


def test_its_weight_is_constant_through_schedule_and_phase(tmp_path):
    supervision = {**keep()["supervision"], "phase": {"steps": 2}}
    trainer = tiny_trainer(tmp_path, english_ratio=0.5, supervision=supervision)
    trainer.train()
    lines = step_logs(trainer)
    assert [line["supervision_factor"] for line in lines] == [1.0, 0.0, 0.0, 0.0]
    assert lines[1]["loss"] == pytest.approx(0.5 * lines[1]["english_kl_loss"], rel=1e-5)
    assert lines[3]["loss"] == pytest.approx(lines[3]["tft_loss"] + 0.5 * lines[3]["english_kl_loss"], rel=1e-5)


def test_frozen_features_beside_it(tmp_path):
    feature = {"conversion_signal": "feature", "thinking_signal": "feature", "feature_english": "frozen"}
    trainer = tiny_trainer(tmp_path, english_ratio=0.5, **keep(), **feature, dataloader_num_workers=1)
    trainer.train()
    assert {"english_kl_loss", "thinking_loss"} <= step_logs(trainer)[0].keys()


def test_a_method_without_replay_does_not_read_it(tmp_path):
    one, other = tiny_trainer(tmp_path, method="english-only", **keep()), tiny_trainer(tmp_path, method="english-only")
    for trainer in (one, other):
        trainer.train()
    assert step_logs(one) == step_logs(other)
    assert_same(weights(one.model), weights(other.model))
    assert not (tmp_path / PREDICTIONS_FILE).exists()


# ---- mistakes ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"english_ratio": 0.0},
            r"supervision\.keep_english\.kl: 0\.5 trains on rows replayed in English, and data\.english_ratio: 0 gives ",
        ),
        (keep(top=384), r"supervision\.keep_english\.top: 384 is not below the vocabulary of 384 tokens$"),
        (keep(kl=0.0), r"DeepSupervisionConfig: supervision\.keep_english: top belongs to a loss; set "),
    ],
)
def test_a_loss_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        tiny_trainer(tmp_path, rows=make_pairs(8), **{**keep(), **changes})


def test_a_run_is_refused_before_the_model_is_loaded(tmp_path):
    config = run_config(tmp_path)
    data = config.data.model_dump() | {"english_ratio": 0.01}
    with pytest.raises(UsageError, match=r"data\.english_ratio: 0\.01 gives none of 16; raise it$"):
        prepare_run(run_config(tmp_path, data=data, **keep()))


def test_zero_3_gathers_the_head_for_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("pivotune.training.preparation.strategy_of", lambda args: "zero3")
    with pytest.raises(UsageError, match=r"^supervision\.keep_english: ZeRO-3 cannot share out this loss; train with "):
        tiny_trainer(tmp_path, **keep())
