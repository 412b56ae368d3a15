from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig
from tiny_training import arguments, assert_same, make_pairs, run_settings, tiny_trainer, weights

from pivotune.config.supervision import SupervisionConfig
from pivotune.config.yaml_text import parse_config
from pivotune.data.examples import Pair, Side
from pivotune.errors import UsageError
from pivotune.lenses.logit import ModelLens
from pivotune.lenses.tuned import lens_texts
from pivotune.runs.prepare import prepare_run
from pivotune.training import lens_fitting
from pivotune.training.lens_fitting import LENS_FILE, build_lens, read_lens_figures

TUNED = {
    "lens": "tuned",
    "conversion": {"layer": 1},
    "thinking": {"layer": 3},
    "tuned": {"states": 300, "steps": 5},
}
PAIRS = make_pairs(40)


def build(folder, pairs=PAIRS, **changes):
    supervision = SupervisionConfig.model_validate({**TUNED, **changes})
    return build_lens(build_tiny_model(), arguments(folder), supervision, pairs)


def test_a_fit_is_kept_and_used_again_only_if_nothing_changed(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = build(tmp_path)
    written = (tmp_path / LENS_FILE).stat().st_mtime_ns
    again = build(tmp_path)
    assert (tmp_path / LENS_FILE).stat().st_mtime_ns == written
    assert all(torch.equal(first.maps[k][0], again.maps[k][0]) for k in (1, 3))
    assert "tuned lens at layer 3: KL" in caplog.text
    # The maps of other layers are added.
    more = build(tmp_path, thinking={"layer": 2})
    assert list(more.maps) == [1, 2, 3]
    alone = build(tmp_path / "alone", thinking={"layer": 2})
    assert torch.equal(more.maps[2][0], alone.maps[2][0])
    assert torch.equal(more.maps[3][0], first.maps[3][0])
    changes = {"tuned": {"states": 300, "steps": 6}}
    build(tmp_path, **changes)
    assert "computed again (other settings)" in caplog.text
    build(tmp_path, pairs=PAIRS[:30], **changes)
    assert "computed again (other rows)" in caplog.text
    figures = read_lens_figures(tmp_path / LENS_FILE)
    assert list(figures) == [1, 3]
    assert 0 < figures[3].kl < figures[3].logit_kl


def test_a_lens_that_reads_little_is_warned_about(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lens_fitting, "UNRELIABLE_KL", 0.0)
    build(tmp_path)
    assert "above 0, so the layer holds little of the output" in caplog.text


def test_a_tuned_lens_needs_rows(tmp_path):
    with pytest.raises(UsageError, match="fitted on training rows"):
        build(tmp_path, pairs=None)


def test_losses_that_compare_raw_states_need_no_fit(tmp_path):
    feature = {"signal": "feature"}
    lens = build(tmp_path, conversion={"layer": 1, **feature}, thinking={"layer": 3, **feature})
    assert lens.maps == {}
    half = build(tmp_path, conversion={"layer": 1, **feature})
    assert list(half.maps) == [3]


def test_other_lenses_need_no_fit(tmp_path):
    assert isinstance(build(tmp_path, lens="model"), ModelLens)
    assert not (tmp_path / LENS_FILE).exists()


def test_texts():
    side = [Side(np.arange(start, start + 8, dtype=np.int32), (1, 3), 5, 9) for start in (10, 30)]
    pairs = [Pair(*side), Pair(*side), Pair(side[0], None)]
    assert [text.ids.tolist() for text in lens_texts(pairs, "english")] == [side[1].ids.tolist()] * 2 + [
        side[0].ids.tolist()
    ]
    assert [text.ids.tolist() for text in lens_texts(pairs[:2], "both")] == [side[1].ids.tolist(), side[0].ids.tolist()]
    query, answer, _, _ = lens_texts(pairs[:2], "branches")
    assert answer.ids.tolist() == [10, 11, 12, 13, 14, 35, 36, 37]
    assert query.ids.tolist() == [10, 11, 12, 13, 14, 31, 32]
    assert answer.first == query.first == 4


@pytest.mark.parametrize("adapters", [False, True])
def test_trained_through_the_lens(tmp_path, adapters):
    """Fitted before adapters are added, frozen in training; another lens trains another model."""
    peft_config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False) if adapters else None
    options = {"trainer": {"peft_config": peft_config}, "max_steps": 2, "learning_rate": 0.01}
    plain = build(tmp_path, pairs=make_pairs(16))
    trained = tiny_trainer(tmp_path / "tuned", supervision=TUNED, **options)
    before = {layer: maps[0].clone() for layer, maps in trained._losses._lens.maps.items()}
    assert all(torch.equal(before[k], plain.maps[k][0]) for k in (1, 3))
    trained.train()
    assert all(torch.equal(before[k], maps[0]) for k, maps in trained._losses._lens.maps.items())
    raw = tiny_trainer(tmp_path / "raw", supervision={**TUNED, "lens": "logit"}, **options)
    raw.train()
    ours, others = weights(trained.model), weights(raw.model)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)


def test_a_lens_is_fitted_again_in_training_and_on_resume_exactly(tmp_path):
    supervision = {**TUNED, "tuned": {"states": 200, "steps": 2, "refit": 2}}
    options = {"supervision": supervision, "max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole = tiny_trainer(tmp_path, **options)
    before = {layer: maps[0].clone() for layer, maps in whole._losses._lens.maps.items()}
    whole.train()
    assert all(not torch.equal(before[k], maps[0]) for k, maps in whole._losses._lens.maps.items())
    resumed = tiny_trainer(tmp_path, **options)
    assert torch.equal(resumed._losses._lens.maps[1][0], before[1])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(whole.model), weights(resumed.model))
    frozen = tiny_trainer(tmp_path / "frozen", **{**options, "supervision": TUNED})
    frozen.train()
    assert any(not torch.equal(one, two) for one, two in zip(
        weights(whole.model).values(), weights(frozen.model).values(), strict=True
    ))  # fmt: skip


def test_too_few_rows_are_refused_before_a_folder_is_made(tmp_path):
    tuned = run_settings(tmp_path, supervision={**TUNED, "layers": "reading"})
    tuned["data"] |= {"limit": 3, "validation": 1}
    with pytest.raises(UsageError, match="at least 100 are needed: give more rows"):
        prepare_run(parse_config(tuned))
    assert not (tmp_path / "run").exists()
    raw = {**tuned, "supervision": {**tuned["supervision"], "lens": "logit", "layers": "paper"}}
    assert prepare_run(parse_config(raw)).train
    # A loss that compares raw states fits no lens.
    feature = {"layers": "paper", "conversion": {"layer": 1, "signal": "feature"}, "thinking": {"signal": "none"}}
    assert prepare_run(parse_config({**tuned, "supervision": {**tuned["supervision"], **feature}})).train
