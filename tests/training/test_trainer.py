from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest
import torch
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows
from datasets import Dataset
from peft import LoraConfig
from tiny_batches import collate
from tiny_training import (
    arguments,
    assert_same,
    make_pairs,
    save_tiny_model,
    step_logs,
    tiny_trainer,
    weights,
    write_rows,
)
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from pivotune import DeepSupervisionConfig, DeepSupervisionTrainer
from pivotune.data.examples import Example
from pivotune.errors import UsageError
from pivotune.objectives.deep_supervision import DeepSupervisionLoss
from pivotune.training.resilience.counters import TrainingDivergedError


def answer_nll(model: nn.Module, example: Example) -> tuple[float, int]:
    """The gold answer's negative log-likelihood, token by token, from the model's own logits."""
    ids, first = example.main.ids.tolist(), example.main.answer
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return -sum(log_probabilities[at - 1, ids[at]].item() for at in range(first, len(ids))), len(ids) - first


# ---- what it takes ----


def test_ten_lines_as_in_the_readme(tmp_path):
    name = save_tiny_model(tmp_path / "base")
    trainer = DeepSupervisionTrainer(
        name,
        DeepSupervisionConfig(output_dir=str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none"),
        train_dataset=write_rows(tmp_path / "rows.jsonl", 12),
        eval_dataset=tiny_rows(4),
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.state.global_step == 2
    assert {"eval_target_nll", "eval_english_nll", "eval_target_nll_per_character"} <= metrics.keys()
    assert 1 <= trainer.layers["conversion"] < trainer.layers["thinking"] <= 3
    assert trainer.supervision.thinking.layer == trainer.layers["thinking"]
    assert next(trainer.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("form", ["list", "datasets", "file", "alpaca"])
def test_rows_in_any_form_are_the_same_rows(tmp_path, form):
    rows = tiny_rows(12)
    if form == "alpaca":
        names = {
            "prompt": "instruction",
            "completion": "output",
            "prompt_en": "instruction_en",
            "completion_en": "output_en",
        }
        given: Any = [{names[key]: value for key, value in row.items() if key in names} for row in rows]
    else:
        given = {"list": rows, "datasets": Dataset.from_list(rows), "file": None}[form]
    if form == "file":
        given = write_rows(tmp_path / "rows.jsonl", rows)
    one, other = tiny_trainer(tmp_path, rows=given), tiny_trainer(tmp_path, rows=tiny_rows(12))
    for mine, expected in zip(one.train_dataset.examples, other.train_dataset.examples, strict=True):
        assert mine.main.ids.tolist() == expected.main.ids.tolist()
        assert mine.english_answer == expected.english_answer


def test_model_by_name_of_a_folder(tmp_path):
    name = save_tiny_model(tmp_path / "base", dtype=torch.bfloat16)
    trainer = DeepSupervisionTrainer(name, arguments(tmp_path), train_dataset=make_pairs(8))
    assert trainer.model.config._name_or_path == name
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    adapted = DeepSupervisionTrainer(
        name, arguments(tmp_path), train_dataset=make_pairs(8), peft_config=LoraConfig(task_type="CAUSAL_LM")
    )
    assert {p.dtype for n, p in adapted.model.named_parameters() if "lora_" not in n} == {torch.bfloat16}


def test_name_of_an_adapter_trains_the_merged_model(tmp_path):
    """PEFT loads adapters frozen, for inference."""
    name = save_tiny_model(tmp_path / "base")
    options = {"train_dataset": make_pairs(8), "processing_class": build_tiny_tokenizer()}
    first = DeepSupervisionTrainer(
        name, arguments(tmp_path), peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"), **options
    )
    first.train()
    first.model.save_pretrained(tmp_path / "adapter")
    again = DeepSupervisionTrainer(str(tmp_path / "adapter"), arguments(tmp_path), **options)
    assert not hasattr(again.model, "peft_config")
    assert_same(weights(again.model), weights(first.model.merge_and_unload()), tolerance=1e-6)
    before = weights(again.model)
    again.train()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in weights(again.model).items())


def test_tokenizer_without_padding_token(tmp_path):
    """GPT-2's has none, and nobody should have to set one."""
    tokenizer = build_tiny_tokenizer(pad_token=None)
    assert tokenizer.pad_token_id is None
    trainer = DeepSupervisionTrainer(
        build_tiny_model(), arguments(tmp_path), train_dataset=tiny_rows(8), processing_class=tokenizer
    )
    other = tiny_trainer(tmp_path, rows=tiny_rows(8))
    trainer.train()
    other.train()
    assert step_logs(trainer) == step_logs(other)


@pytest.mark.parametrize(
    ("method", "english", "parallel"),
    [("sft", 16, 0), ("tft", 4, 0), ("deep-supervision", 4, 12)],
)
def test_methods_train_on_their_rows(tmp_path, method, english, parallel):
    trainer = tiny_trainer(tmp_path, method=method, english_ratio=0.25, num_train_epochs=3)
    examples = trainer.train_dataset.examples
    assert len(examples) == 16
    assert sum(example.english_prompt for example in examples) == english
    assert sum(example.parallel is not None for example in examples) == parallel
    trainer.train()
    names = {"tft_loss", "conversion_loss", "thinking_loss", "supervision_factor"}
    assert names & step_logs(trainer)[0].keys() == (names if parallel else {"tft_loss"})
    assert step_logs(trainer)[-1]["loss"] < step_logs(trainer)[0]["tft_loss"] or method != "sft"


def test_sft_equals_tft_on_the_english_side(tmp_path):
    from dataclasses import replace

    pairs = make_pairs(16)
    sft = tiny_trainer(tmp_path, rows=pairs, method="sft")
    tft = tiny_trainer(tmp_path, rows=[replace(p, target=p.english, english=p.target) for p in pairs], method="tft",
                       english_ratio=0.0)  # fmt: skip
    sft.train()
    tft.train()
    assert_same(weights(sft.model), weights(tft.model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversion_layer": 0}, "conversion"),
        ({"thinking_layer": 4}, "choose 1 to 3"),
        ({"thinking_layer": 9}, "9"),
        ({"conversion_layer": 3, "thinking_layer": 3}, "not below"),
        ({"conversion_signal": "none", "thinking_signal": "none"}, "that is method: tft"),
    ],
)
def test_layers_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UsageError) as raised:
        tiny_trainer(tmp_path, **changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_auto_layers_need_rows(tmp_path):
    with pytest.raises(UsageError, match="choosing layers needs training rows"):
        DeepSupervisionTrainer(
            build_tiny_model(), arguments(tmp_path, thinking_layer="auto"), processing_class=build_tiny_tokenizer()
        )


def test_one_signal_alone(tmp_path):
    trainer = tiny_trainer(tmp_path, conversion_signal="none", conversion_layer="auto", thinking_layer=1)
    trainer.train()
    first = step_logs(trainer)[0]
    assert "thinking_loss" in first
    assert "conversion_loss" not in first
    assert trainer.layers is None


# ---- a peer's habits ----


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append("step")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events += [f"evaluate {side}" for side in ("target", "english") if f"eval_{side}_loss" in metrics]

    def on_save(self, args, state, control, **kwargs):
        self.events.append("save")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs or {}))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_callbacks_are_called(tmp_path):
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=4,
        trainer={"callbacks": [recorder], "eval_dataset": make_pairs(3, seed=1)},
    )  # fmt: skip
    trainer.train()
    evaluated = ["evaluate target", "evaluate english"]
    assert recorder.events == ["begin", *["step", "step", *evaluated] * 2, "save", "end"]
    losses = [line for line in recorder.logs if "tft_loss" in line]
    assert [line["tft_loss"] for line in losses] == [line["tft_loss"] for line in step_logs(trainer)]
    assert all({"loss", "grad_norm", "learning_rate", "target_tokens_per_second"} <= line.keys() for line in losses)


def test_report_to_reaches_the_integration(tmp_path, monkeypatch):
    from transformers import integrations

    class Reporter(Recorder):
        instances: ClassVar[list[Reporter]] = []

        def __init__(self) -> None:
            super().__init__()
            self.instances.append(self)

    monkeypatch.setitem(integrations.integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Reporter)
    tiny_trainer(tmp_path, report_to=["tensorboard"]).train()
    # One is built early, to see that it can be, and one is used.
    tried, reporter = Reporter.instances
    assert tried.logs == []
    assert any("conversion_loss" in line for line in reporter.logs)


def test_report_to_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, report_to=[])
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert sorted(names) == ["DefaultFlowCallback", "GradientBalance", "PrinterCallback"]


class Ruin(TrainerCallback):
    """Damages the model after its third step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                model.lm_head.weight.mul_(9.0)


def test_best_model_is_loaded_at_the_end(tmp_path):
    """It is neither the first nor the last, and its checkpoint survives the limit on checkpoints."""
    recorder = Recorder()
    trainer = tiny_trainer(
        tmp_path, learning_rate=1e-3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=2, load_best_model_at_end=True,
        trainer={"callbacks": [recorder, Ruin()], "eval_dataset": make_pairs(16)},
    )  # fmt: skip
    assert trainer.args.metric_for_best_model == "eval_target_loss"
    trainer.train()
    evaluated = [line["eval_target_loss"] for line in recorder.logs if "eval_target_loss" in line]
    assert evaluated.index(min(evaluated)) == 1
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.evaluate()["eval_target_loss"] == pytest.approx(min(evaluated), rel=1e-6)
    for path in tmp_path.glob("checkpoint-*"):
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_best_model_is_the_last_one(tmp_path):
    trainer = tiny_trainer(
        tmp_path, learning_rate=1e-3, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        save_total_limit=1, load_best_model_at_end=True, metric_for_best_model="eval_target_loss",
        trainer={"eval_dataset": make_pairs(16)},
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_global_step == 4
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-4")


def test_save_total_limit_keeps_the_newest(tmp_path):
    tiny_trainer(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-4")


def test_training_twice_starts_the_terms_anew(tmp_path):
    """5 steps logged every 2: the fifth is in no line of the first run, and must not be in one of the second."""
    rows = make_pairs(10)
    trainer = tiny_trainer(tmp_path, rows=rows, per_device_train_batch_size=2, logging_steps=2, learning_rate=0.0)
    trainer.train()
    first = step_logs(trainer)
    trainer.train()
    assert [line["tft_loss"] for line in step_logs(trainer)] == pytest.approx(
        [line["tft_loss"] for line in first], rel=1e-6
    )


# ---- logging and the schedule ----


@pytest.mark.parametrize(("schedule", "factors"), [
    ("constant", [1, 1, 1, 1, 1]),
    ("linear", [1, 0.75, 0.5, 0.25, 0]),
    ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
])  # fmt: skip
def test_schedule_is_logged_and_reaches_zero(tmp_path, schedule, factors):
    trainer = tiny_trainer(tmp_path, supervision_schedule=schedule, max_steps=5)
    trainer.train()
    assert [line["supervision_factor"] for line in step_logs(trainer)] == pytest.approx(factors, abs=1e-12)


def test_terms_are_means_over_all_steps_since_the_last_line(tmp_path):
    """At learning rate 0 the mean over four steps is the mean over the whole data, whatever the batches."""
    long = tiny_trainer(tmp_path, learning_rate=0.0, logging_steps=4, supervision_schedule="constant")
    whole = tiny_trainer(tmp_path, learning_rate=0.0, per_device_train_batch_size=16, supervision_schedule="constant")
    long.train()
    whole.train()
    (one,), (other,) = step_logs(long), step_logs(whole)
    for name in ("tft_loss", "conversion_loss", "thinking_loss"):
        assert one[name] == pytest.approx(other[name], rel=1e-5)


# ---- evaluation ----


def test_evaluation_is_the_mean_over_tokens(tmp_path):
    """7 rows of different length in batches of 3: every token weighs the same, and every character."""
    pairs = make_pairs(7, seed=3)
    trainer = tiny_trainer(tmp_path, per_device_eval_batch_size=3, trainer={"eval_dataset": pairs})
    trainer.model.train()
    metrics = trainer.evaluate()
    for side in ("target", "english"):
        sides = [getattr(pair, side) for pair in pairs]
        scores = [answer_nll(trainer.model.eval(), Example(one)) for one in sides]
        assert len({count for _, count in scores}) > 2
        total = sum(nll for nll, _ in scores)
        mean = total / sum(count for _, count in scores)
        assert metrics[f"eval_{side}_nll"] == metrics[f"eval_{side}_loss"] == pytest.approx(mean, rel=1e-5)
        per_character = total / sum(one.characters for one in sides)
        assert metrics[f"eval_{side}_nll_per_character"] == pytest.approx(per_character, rel=1e-5)
        assert abs(sum(nll / count for nll, count in scores) / 7 - mean) > 1e-3


@pytest.mark.parametrize("form", ["list", "datasets", "pairs"])
def test_other_rows_may_be_evaluated(tmp_path, form):
    rows: Any = {"list": tiny_rows(5), "datasets": Dataset.from_list(tiny_rows(5)), "pairs": make_pairs(5)}[form]
    expected = tiny_trainer(tmp_path, trainer={"eval_dataset": rows}).evaluate()
    metrics = tiny_trainer(tmp_path).evaluate(rows, metric_key_prefix="test")
    for name in ("target_nll", "english_nll", "target_nll_per_character"):
        assert metrics[f"test_{name}"] == expected[f"eval_{name}"]


def test_rows_without_english_are_evaluated_in_the_target_language_only(tmp_path):
    rows = [{key: row[key] for key in ("prompt", "completion")} for row in tiny_rows(3)]
    trainer = tiny_trainer(tmp_path, rows=tiny_rows(8), trainer={"eval_dataset": rows})
    metrics = trainer.evaluate()
    assert metrics["eval_target_nll"] > 0
    assert not any("english" in name for name in metrics)


def test_evaluation_leaves_training_terms_alone(tmp_path):
    """Held-out passes in the middle of a logging window must not enter the window's means."""
    options = {"logging_steps": 4, "rows": make_pairs(16)}
    plain = tiny_trainer(tmp_path, **options)
    evaluated = tiny_trainer(
        tmp_path, **options, eval_strategy="steps", eval_steps=1, trainer={"eval_dataset": make_pairs(5, seed=9)}
    )
    plain.train()
    evaluated.train()
    assert step_logs(plain) == step_logs(evaluated)


# ---- divergence ----


def test_nan_stops_before_the_weights_change(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.norm.weight[0] = math.nan
                self.before = weights(model)

    poison = Poison()
    trainer = tiny_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
        trainer={"callbacks": [poison]},
    )  # fmt: skip
    with pytest.raises(TrainingDivergedError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "at step 3" in message
    assert "tft nan" in message
    assert "conversion" in message
    assert "training.learning_rate" in message
    assert "\n" not in message
    after = weights(trainer.model)
    assert all(torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) for name, tensor in poison.before.items())
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")


def test_nan_in_the_middle_of_a_window_stops_before_the_weights_change(tmp_path, monkeypatch):
    """Whether the loss is finite is asked once per step: the first of its micro-batches counts too."""
    trainer = tiny_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    compute_loss, calls = trainer.compute_loss, []

    def poisoned(*args: Any, **options: Any) -> Any:
        calls.append(weights(trainer.model))
        return compute_loss(*args, **options) * (math.nan if len(calls) == 5 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", poisoned)
    with pytest.raises(TrainingDivergedError, match="at step 2 "):
        trainer.train()
    assert len(calls) == 8
    assert_same(weights(trainer.model), calls[4])
    assert any(not torch.equal(tensor, calls[0][name]) for name, tensor in calls[4].items())


def test_loss_outside_training_counts_its_own_batch(tmp_path):
    """`compute_loss` without a window, as other code calls it."""
    trainer = tiny_trainer(tmp_path, method="tft", english_ratio=0.0)
    examples = trainer.train_dataset.examples[:3]
    batch = collate(examples)
    scores = [answer_nll(trainer.model, example) for example in examples]
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    expected = sum(nll for nll, _ in scores) / sum(count for _, count in scores)
    assert loss.item() == outputs["loss"].item() == pytest.approx(expected, rel=1e-5)
    # It is no training step, so that no log line may count it.
    assert trainer._window.empty


def test_contrastive_negatives_are_those_of_the_accumulation_window(tmp_path):
    """Not those of the window before, nor of the measurement of gradients before the first step."""
    trainer = tiny_trainer(
        tmp_path, conversion_signal="none", thinking_signal="contrastive", gradient_accumulation_steps=2,
        max_steps=2, learning_rate=1e-12, supervision_schedule="constant",
    )  # fmt: skip
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    expected = []
    for window in (batches[:2], batches[2:4]):
        losses = DeepSupervisionLoss(trainer.supervision)
        terms = [losses.terms(trainer.model, batch)["thinking"] for batch in window]
        expected.append(sum(term.sum.item() for term in terms) / sum(int(term.count) for term in terms))
    assert [line["thinking_loss"] for line in step_logs(trainer)] == pytest.approx(expected, rel=1e-4)
