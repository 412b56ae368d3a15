"""Held-out figures of several target languages: each is scored as it is alone, and all of them together."""

from __future__ import annotations

import json

import pytest
from conftest import build_tiny_tokenizer, tiny_config, tiny_rows
from tiny_training import arguments, run_config, tiny_trainer, write_rows

from pivotune.errors import UsageError
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run
from pivotune.training.heldout import score_answers, summarize
from pivotune.training.preparation import encode_dataset, heldout_examples

ROWS = [{**row, "language": "sw" if place % 3 else "vi"} for place, row in enumerate(tiny_rows(15))]


def test_evaluation_measures_every_language_and_all_of_them(tmp_path):
    args = arguments(tmp_path, method="tft")
    pairs = encode_dataset(ROWS[:9], args, build_tiny_tokenizer(), tiny_config("llama"), heldout=True)
    options = {"eval_strategy": "epoch", "metric_for_best_model": "eval_target_nll", "load_best_model_at_end": True}
    trainer = tiny_trainer(
        tmp_path, rows=ROWS, trainer={"eval_dataset": ROWS[:9]}, save_strategy="epoch", method="tft", **options
    )
    assert list(trainer.eval_dataset) == ["vi", "sw", "english"]
    trainer.train()
    found = trainer.evaluate()
    for name, chosen in {
        "vi": [pair for pair in pairs if pair.language == "vi"],
        "sw": [pair for pair in pairs if pair.language == "sw"],
        "target": list(pairs),
    }.items():
        scores = summarize(score_answers(trainer.model, heldout_examples(chosen)["target"], pad_token_id=0))
        assert found[f"eval_{name}_nll"] == found[f"eval_{name}_loss"] == pytest.approx(scores.nll, rel=1e-5)
        assert found[f"eval_{name}_nll_per_character"] == pytest.approx(scores.nll_per_character, rel=1e-5)
    assert trainer.state.best_metric == pytest.approx(found["eval_target_nll"], rel=1e-6)
    logged = [line for line in trainer.state.log_history if "eval_target_nll" in line]
    assert logged[-1]["eval_target_nll"] == found["eval_target_nll"]
    # Other sets are reported by their own names alone.
    others = trainer.evaluate({"mine": trainer.eval_dataset["vi"]}, metric_key_prefix="test")
    assert others["test_mine_nll"] == found["eval_vi_nll"]
    assert "test_target_nll" not in others
    again = trainer.evaluate(ROWS[:9])
    assert again["eval_target_nll"] == found["eval_target_nll"]


def test_the_best_model_can_be_that_of_one_language(tmp_path):
    options = {"eval_strategy": "epoch", "method": "tft", "trainer": {"eval_dataset": ROWS[:9]}}
    tiny_trainer(tmp_path, rows=ROWS, metric_for_best_model="eval_vi_nll", **options)
    with pytest.raises(UsageError, match=r"eval_zh_nll is not measured; allowed: eval_target_loss, .*eval_sw_nll"):
        tiny_trainer(tmp_path, rows=ROWS, metric_for_best_model="eval_zh_nll", **options)


def test_results_have_the_held_out_rows_of_every_language(tmp_path):
    path = write_rows(tmp_path / "mixed.jsonl", ROWS)
    config = run_config(tmp_path, method="tft", data={"train": path, "validation": 6, "language": "sw"})
    prepared = prepare_run(config)
    assert prepared.config.data.language == ["sw", "vi"]
    result = execute_run(prepared)
    tasks = result.results["tasks"]
    assert {name: task["n"] for name, task in tasks.items()} == {"heldout_sw": 4, "heldout_vi": 2, "heldout_en": 6}
    for code in ("sw", "vi"):
        pairs = [pair for pair in prepared.validation if pair.language == code]
        scores = summarize(score_answers(result.model, heldout_examples(pairs)["target"], pad_token_id=0))
        task = tasks[f"heldout_{code}"]
        assert task["language"] == code
        assert task["value"] == pytest.approx(scores.nll, rel=1e-5)
        assert task["stderr"] == pytest.approx(scores.stderr, rel=1e-4)
        assert task["base"]["value"] != pytest.approx(task["value"], rel=1e-4)
    # A run that goes on is the same run, though its rows have named its languages; other languages are other rows.
    prepare_run(config, resume=True)
    rows = [{**row, "language": "sw"} for row in ROWS[:1]] + ROWS[1:]
    write_rows(tmp_path / "mixed.jsonl", rows)
    with pytest.raises(UsageError, match="is not what the run in"):
        prepare_run(config, resume=True)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tasks"].keys() == tasks.keys()
