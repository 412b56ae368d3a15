"""What must hold of training as a whole, checked through the real `Trainer` loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, build_tiny_tokenizer
from peft import LoraConfig
from tiny_training import QUIET, arguments, assert_same, make_pairs, step_logs, tiny_trainer, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from pivotune.config.registry import METHODS
from pivotune.data.collator import DeepSupervisionCollator, ExampleDataset
from pivotune.data.datasets import training_examples
from pivotune.runs.export import save_model
from pivotune.training.trainer import DeepSupervisionTrainer

SIGNALS: dict[str, dict[str, Any]] = {
    "logits": {},
    "prompt": {"supervision": {"logits": {"gradient": "prompt"}}},
    "positional": {"logits_mode": "positional"},
    "feature": {"conversion_signal": "feature", "thinking_signal": "feature", "feature_span": "query+answer"},
    "frozen": {"conversion_signal": "feature", "thinking_signal": "feature", "feature_english": "frozen"},
}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})


def trained(folder: Any, **options: Any) -> DeepSupervisionTrainer:
    trainer = tiny_trainer(folder, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def default_run(tmp_path_factory) -> Callable[[str], DeepSupervisionTrainer]:
    """Return the trainer of a signal, or of `tft`, after a run with no other option; each is trained once."""

    @cache
    def train(name: str) -> DeepSupervisionTrainer:
        options = {"method": "tft"} if name == "tft" else SIGNALS[name]
        return trained(tmp_path_factory.mktemp("run"), **options)

    return train


@pytest.mark.parametrize("signal", SIGNALS)
def test_accumulation_does_not_change_a_step(tmp_path, signal):
    """1 x 8 = 8 x 1 = 2 x 4: weights and every logged term, with English replay rows in the window."""
    options = {"english_ratio": 0.375, "optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "random",
               **SIGNALS[signal]}  # fmt: skip
    whole = trained(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    assert whole.state.global_step == 2
    assert sum(example.english_prompt for example in whole.train_dataset.examples) == 6
    start = weights(build_tiny_model())
    assert any((tensor - start[name]).abs().max() > 1e-3 for name, tensor in weights(whole.model).items())
    for size, steps in ((1, 8), (2, 4)):
        parts = trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps, **options)
        assert_same(weights(parts.model), weights(whole.model), tolerance=1e-6)
        for part, full in zip(step_logs(parts), step_logs(whole), strict=True):
            # What is padded does depend on the size of a batch.
            assert part.pop("padding_share") < full.pop("padding_share")
            assert part == pytest.approx(full, rel=2e-6, abs=1e-7)


def test_last_window_of_an_epoch_may_be_short(tmp_path):
    """10 rows by 2 x 4: windows of 8 and 2 rows, each normalised by its own counts."""
    options = {"rows": make_pairs(10), "optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    parts = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    whole = trained(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1, **options)
    assert parts.state.global_step == whole.state.global_step == 2
    assert_same(weights(parts.model), weights(whole.model), tolerance=1e-6)


@pytest.mark.parametrize("signal", SIGNALS)
def test_weight_zero_is_tft_bit_for_bit(tmp_path, signal, default_run):
    zero = trained(tmp_path, conversion_weight=0.0, thinking_weight=0.0, **SIGNALS[signal])
    tft, full = default_run("tft"), default_run(signal)
    assert_same(weights(zero.model), weights(tft.model))
    assert [line["tft_loss"] for line in step_logs(zero)] == [line["tft_loss"] for line in step_logs(tft)]
    assert any(not torch.equal(tensor, weights(tft.model)[name]) for name, tensor in weights(full.model).items())


@pytest.mark.parametrize("forward", ["shared", "separate"])
def test_tft_is_a_plain_trainer(tmp_path, forward):
    """`transformers.Trainer` with the model's own loss on the same batches, one micro-batch a step."""
    rows = make_pairs(16)
    # Plain steps: Adam would blow up rounding, which differs without padding.
    steps = {"optim": "sgd", "learning_rate": 0.1}
    ours = trained(tmp_path, rows=rows, method="tft", english_ratio=0.25, train_sampling_strategy="random",
                   logits_forward=forward, **steps)  # fmt: skip
    collate = DeepSupervisionCollator(pad_token_id=0)

    def plain_batch(examples: Any) -> dict[str, torch.Tensor]:
        return {name: collate(examples)[name] for name in ("input_ids", "attention_mask", "labels")}

    examples = training_examples(rows, METHODS["tft"], english_ratio=0.25, seed=42)
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 1, **steps}
    plain = Trainer(
        build_tiny_model(),
        TrainingArguments(str(tmp_path), **QUIET, **settings, save_strategy="no", remove_unused_columns=False),
        data_collator=plain_batch,
        train_dataset=ExampleDataset(examples),
        processing_class=build_tiny_tokenizer(),
    )
    plain.train()
    assert_same(weights(ours.model), weights(plain.model), tolerance=1e-6)
    losses = [line["loss"] for line in plain.state.log_history if "loss" in line]
    assert [line["loss"] for line in step_logs(ours)] == pytest.approx(losses, rel=1e-5)


def test_logged_loss_is_the_weighted_sum_of_its_terms(tmp_path):
    trainer = trained(tmp_path, conversion_weight=0.7, thinking_weight=0.2, per_device_train_batch_size=2,
                      gradient_accumulation_steps=2)  # fmt: skip
    lines = step_logs(trainer)
    assert [line["supervision_factor"] for line in lines] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    for line in lines:
        inner = 0.7 * line.get("conversion_loss", 0.0) + 0.2 * line.get("thinking_loss", 0.0)
        assert line["loss"] == pytest.approx(line["tft_loss"] + line["supervision_factor"] * inner, rel=1e-5)
    # At factor 0 the inner losses are not computed at all.
    assert [{"conversion_loss", "thinking_loss"} <= line.keys() for line in lines] == [True, True, True, False]


class StopAt(TrainerCallback):
    """Leaves training after a step, as a lost machine would: nothing is saved on the way out."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# 20 rows by 2 x 2 are 5 steps an epoch: step 3 is inside the first epoch. tests/training/resilience/test_resume.py resumes
# from the end of the first epoch and inside the second, and with adapters.
RESUMED: dict[str, dict[str, Any]] = {
    "logits": {"at": 4, "save": 3},
    "feature": {"at": 4, "save": 3, **SIGNALS["feature"], "supervision_schedule": "cosine"},
    "frozen": {"at": 4, "save": 3, **SIGNALS["frozen"]},
    "frozen lora": {"at": 4, "save": 3, "peft": {"lora_dropout": 0.2}, **SIGNALS["frozen"]},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_equals_never_having_stopped(tmp_path, case):
    """Weights, optimizer, learning rate and metrics, bit for bit."""
    options = dict(RESUMED[case])
    at, save, peft = options.pop("at"), options.pop("save"), options.pop("peft", None)
    options.update(
        rows=make_pairs(20), num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        lr_scheduler_type="cosine", english_ratio=0.3,
    )  # fmt: skip

    def make(folder: str, *callbacks: TrainerCallback, **changes: Any) -> DeepSupervisionTrainer:
        extra = {"callbacks": list(callbacks), "peft_config": None if peft is None else lora(**peft)}
        return tiny_trainer(tmp_path / folder, trainer=extra, **options, **changes)

    straight = make("straight")
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": save}
    with pytest.raises(KeyboardInterrupt):
        make("stopped", StopAt(at), **saving).train()
    resumed = make("stopped", **saving)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == straight.state.global_step == 10
    assert_same(weights(resumed.model), weights(straight.model))
    one, other = resumed.optimizer.state_dict()["state"], straight.optimizer.state_dict()["state"]
    for index in other:
        assert_same(one[index], other[index])
    assert resumed.lr_scheduler.state_dict() == straight.lr_scheduler.state_dict()
    assert step_logs(resumed) == step_logs(straight)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_lora_is_the_adapted_model(tmp_path, family):
    """The saved folder, read with plain Transformers, answers as the model with its adapters did; GPT-2 has `Conv1D`."""
    trainer = trained(tmp_path / "out", model=build_tiny_model(family),
                      trainer={"peft_config": lora(fan_in_fan_out=family == "gpt2")})  # fmt: skip
    input_ids = torch.arange(3, 40)[None]
    trainer.model.eval()
    with torch.no_grad():
        adapted = trainer.model(input_ids=input_ids).logits
        with trainer.model.disable_adapter():
            base = trainer.model(input_ids=input_ids).logits
    assert (adapted - base).abs().max() > 1e-2
    save_model(trainer.model, build_tiny_tokenizer(), tmp_path, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=input_ids).logits, adapted, rtol=0, atol=1e-5)
    assert not hasattr(merged, "peft_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").decode(input_ids[0]) == build_tiny_tokenizer().decode(
        input_ids[0]
    )
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_order_of_the_rows_is_that_of_tft(tmp_path):
    """Methods with the same seed are compared step by step."""
    rows = make_pairs(40)

    def batches(method: str) -> list[list[int]]:
        trainer = tiny_trainer(tmp_path, rows=rows, method=method, gradient_accumulation_steps=2)
        return [batch["input_ids"][:, 0].tolist() for batch in trainer.get_train_dataloader()]

    assert batches("tft") == batches("deep-supervision")


@pytest.mark.parametrize("adapters", [False, True])
def test_frozen_equals_a_copy_of_the_starting_model(tmp_path, adapters):
    """Steps with the vectors computed beforehand are those with a second model that runs along."""
    # Plain steps: Adam would blow up rounding where a gradient is nearly zero.
    options = {"trainer": {"peft_config": lora() if adapters else None}, "optim": "sgd", "learning_rate": 0.1,
               **SIGNALS["frozen"]}  # fmt: skip
    kept = tiny_trainer(tmp_path, **options)
    kept.train()
    live = tiny_trainer(tmp_path, **options)
    live.train_dataset = ExampleDataset(live.train_dataset.examples)
    reference = build_tiny_model().requires_grad_(False)
    live._losses._reference = reference
    live.train()
    assert_same(weights(kept.model), weights(live.model), tolerance=1e-6)
    detached = weights(trained(tmp_path, **{**options, "feature_english": "detached"}).model)
    assert any(not torch.allclose(tensor, detached[name], atol=1e-5) for name, tensor in weights(kept.model).items())


@pytest.mark.parametrize("signal", ["logits", "feature", "frozen"])
@pytest.mark.parametrize("adapters", [False, True])
def test_activation_checkpointing_changes_nothing(tmp_path, signal, adapters):
    # Plain steps: Adam would blow up rounding where a gradient is nearly zero.
    options = {"num_train_epochs": 0.5, "optim": "sgd", "learning_rate": 0.1, **SIGNALS[signal]}

    def run(**changes: Any) -> DeepSupervisionTrainer:
        return trained(tmp_path, trainer={"peft_config": lora() if adapters else None}, **options, **changes)

    off = weights(run().model)
    for use_reentrant in (False, True):
        on = run(**{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": use_reentrant}})
        assert_same(weights(on.model), off, tolerance=1e-6)


CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)


@pytest.mark.parametrize("signal", SIGNALS)
def test_bfloat16_autocast_trains(tmp_path, signal, default_run):
    """Terms near those of float32, weights kept in float32."""
    half, full = trained(tmp_path, bf16=True, **SIGNALS[signal]), default_run(signal)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    first, expected = step_logs(half)[0], step_logs(full)[0]
    assert first != expected
    names = ("loss", "tft_loss", "conversion_loss", "thinking_loss")
    assert [first[name] for name in names] == pytest.approx([expected[name] for name in names], rel=0.05)
    assert all(torch.isfinite(parameter).all() for parameter in half.model.parameters())


def test_same_seed_same_run_with_adapters(tmp_path):
    """The adapters' first weights follow `seed`, whatever was drawn before."""

    def run(noise: int, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        model = copy.deepcopy(BASE)
        trainer = DeepSupervisionTrainer(
            model, arguments(tmp_path, seed=seed, max_steps=2), train_dataset=make_pairs(8),
            processing_class=build_tiny_tokenizer(), peft_config=lora(),
        )  # fmt: skip
        trainer.train()
        return weights(trainer.model)

    first = run(1, 0)
    assert_same(run(2, 0), first)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in run(1, 1).items())


BASE = build_tiny_model()
