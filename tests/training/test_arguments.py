from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from pivotune.config.yaml_text import parse_config
from pivotune.errors import UsageError
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments

SUPERVISION = {
    "conversion": {"signal": "feature", "layer": 2, "weight": 0.7},
    "thinking": {"signal": "logits", "layer": 9, "weight": 0.2},
    "schedule": "cosine",
    "lens": "logit",
    "alternate": False,
    "keep_english": {"kl": 0.2, "top": 7},
    "phase": {"steps": 5, "task": True, "learning_rate": 3e-4},
    "logits": {"mode": "positional", "norm": "none", "gradient": "all", "forward": "separate"},
    "feature": {"pooling": "last", "span": "query+answer", "english": "frozen", "english_norm": "raw"},
    "contrastive": {"span": "query+answer", "english": "joint", "temperature": 0.2},
    "cka": {"span": "query+answer", "english": "joint"},
    "tuned": {"text": "both", "states": 321, "steps": 3, "refit": 0},
    "balance": {"mode": "gradient", "every": 7, "max_share": 0.2},
    "layers": "reading",
    "profile_rows": 11,
}


def settings(**changes) -> dict:
    return {"model": "m", "data": {"train": "t"}, "output_dir": "out", "training": {"use_cpu": True}, **changes}


def one_line(raised) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_options_survive_from_yaml_to_supervision():
    """Every option of `supervision:` and `data:` arrives under its own name, none is swapped or lost."""
    data = {"train": "t", "template": "alpaca", "english_ratio": 0.4, "max_prompt_tokens": 31, "max_completion_tokens": 17,
            "on_bad_row": "skip", "language": "sw"}  # fmt: skip
    config = parse_config(settings(supervision=SUPERVISION, data=data, seed=5))
    args = build_arguments(config)
    assert args.supervision == config.supervision
    assert args.supervision.model_dump() == args.to_dict()["supervision"] == SUPERVISION
    for name in ("template", "english_ratio", "max_prompt_tokens", "max_completion_tokens", "on_bad_row", "language"):
        assert getattr(args.data, name) == args.to_dict()["data"][name] == data[name]
    assert (args.output_dir, args.seed, args.method) == ("out", 5, "deep-supervision")
    limits = args.limits(100)
    assert (limits.prompt, limits.completion, limits.context) == (31, 17, 100)


def test_python_takes_sections_as_yaml_does(tmp_path):
    args = DeepSupervisionConfig(
        str(tmp_path), use_cpu=True, supervision={"thinking": {"layer": 9}, "schedule": "cosine"}
    )
    assert (args.supervision.thinking.layer, args.supervision.conversion.layer) == (9, "auto")
    assert args.supervision.schedule == "cosine"
    # Collectives wait as long as `faults` has it.
    assert DeepSupervisionConfig(str(tmp_path), use_cpu=True, faults={"hang_timeout": 60.0}).ddp_timeout == 60
    again = dataclasses.replace(args, data={"language": "vi"})
    assert (again.data.language, again.supervision) == ("vi", args.supervision)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "magic"}, ("method", "magic", "deep-supervision")),
        ({"supervision": {"conversion": {"signal": "logit"}}}, ("supervision.conversion.signal", "logit", "feature")),
        ({"supervision": {"thinking": {"weight": -1.0}}}, ("supervision.thinking.weight", "-1")),
        ({"supervision": {"conversion": {"layer": 0}}}, ("supervision.conversion.layer", "0")),
        (
            {"supervision": {"conversion": {"layer": 5}, "thinking": {"layer": 4}}},
            ("conversion.layer: 5 is not below", "thinking.layer: 4"),
        ),
        ({"supervision": {"schedule": "step"}}, ("supervision.schedule", "step")),
        ({"supervision": {"lens": "tunde"}}, ("supervision.lens", "tunde", "logit")),
        ({"supervision": {"thinkng": {}}}, ("unknown key supervision.thinkng", "did you mean supervision.thinking?")),
        ({"data": {"english_ratio": 1.5}}, ("data.english_ratio", "1.5")),
        ({"data": {"max_prompt_tokens": 0}}, ("data.max_prompt_tokens", "0")),
        ({"data": {"on_bad_row": "ignore"}}, ("data.on_bad_row", "ignore", "skip")),
        ({"data": {"train": "rows.jsonl"}}, ("unknown key data.train",)),
    ],
)
def test_values_that_cannot_be(tmp_path, changes, words):
    with pytest.raises(UsageError) as raised:
        DeepSupervisionConfig(output_dir=str(tmp_path), use_cpu=True, **changes)
    assert all(word in one_line(raised) for word in words)


def test_argument_parser_reads_a_mapping_and_a_command_line(tmp_path):
    parser = HfArgumentParser(DeepSupervisionConfig)
    section = {"thinking": {"layer": 9, "signal": "feature"}}
    (from_dict,) = parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True, "supervision": section})
    (from_words,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--supervision", json.dumps(section), "--method", "sft",
         "--data", '{"language": "vi"}', "--max_steps", "7"]
    )  # fmt: skip
    assert from_dict.supervision == from_words.supervision
    assert (from_words.supervision.thinking.layer, from_words.supervision.thinking.signal) == (9, "feature")
    assert (from_words.method, from_words.max_steps, from_words.data.language) == ("english-only", 7, "vi")


def test_english_columns_are_never_dropped(tmp_path):
    assert DeepSupervisionConfig(str(tmp_path), use_cpu=True).remove_unused_columns is False
    with pytest.raises(UsageError, match=r"training\.remove_unused_columns: true is not supported: .*English columns"):
        DeepSupervisionConfig(str(tmp_path), use_cpu=True, remove_unused_columns=True)


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({}, "eval_target_loss"),
        ({"method": "sft"}, "eval_english_loss"),
        ({"metric_for_best_model": "eval_english_nll"}, "eval_english_nll"),
    ],
)
def test_best_model_is_judged_in_the_trained_language(tmp_path, changes, metric):
    args = DeepSupervisionConfig(
        str(tmp_path), use_cpu=True, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps",
        eval_steps=5, save_steps=5, **changes,
    )  # fmt: skip
    assert args.metric_for_best_model == metric
    assert DeepSupervisionConfig(str(tmp_path), use_cpu=True).metric_for_best_model is None


def test_defaults_of_a_run_and_what_training_says():
    args = build_arguments(parse_config(settings()))
    assert (args.report_to, args.logging_steps, str(args.save_strategy.value), args.disable_tqdm) == (
        [],
        10,
        "epoch",
        True,
    )
    changed = build_arguments(
        parse_config(settings(training={"use_cpu": True, "logging_steps": 3, "save_strategy": "no"}))
    )
    assert (changed.logging_steps, str(changed.save_strategy.value)) == (3, "no")
    assert args.train_sampling_strategy == "group_by_length"
    assert args.logging_nan_inf_filter is False
    assert changed.deepspeed is None
    assert not changed.fsdp


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"lerning_rate": 1e-4}, ("unknown key training.lerning_rate", "did you mean training.learning_rate?")),
        ({"xyzzy": 1}, ("unknown key training.xyzzy", "transformers.TrainingArguments")),
        ({"seed": 3}, ("training.seed is set outside of training:",)),
        ({"english_ratio": 0.5}, ("training.english_ratio", "is set outside of training:")),
        ({"save_strategy": "sometimes"}, ("training.save_strategy: 'sometimes'", "no, steps, epoch, best")),
        ({"bf16": True, "fp16": True}, ("training: ",)),
        (
            {"train_sampling_strategy": "by_length"},
            ("training.train_sampling_strategy: 'by_length' is not allowed", "random, sequential, group_by_length"),
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
            ("training: ", "strategy"),
        ),
    ],
)
def test_training_keys_that_cannot_be(training, words):
    with pytest.raises(UsageError) as raised:
        build_arguments(parse_config(settings(training={"use_cpu": True, **training})))
    assert all(word in one_line(raised) for word in words)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("per_device_train_batch_size", 0, "a number from 1"),
        ("per_device_eval_batch_size", 0, "a number from 1"),
        ("gradient_accumulation_steps", 0, "a number from 1"),
        ("save_total_limit", -1, "a number from 1"),
        ("learning_rate", -1.0, "a number from 0"),
        ("learning_rate", float("nan"), "a number from 0"),
        ("learning_rate", float("inf"), "a number from 0"),
        ("weight_decay", float("nan"), "a number from 0"),
        ("dataloader_num_workers", -1, "a number from 0"),
        ("adam_beta1", 5.0, "a number from 0, below 1"),
        ("save_steps", 0, "a number of steps from 1"),
        ("logging_steps", -1, "a number of steps from 1"),
        ("max_steps", -5, "a number from 1, or -1"),
        ("num_train_epochs", 0.0, "a number above 0"),
        ("report_to", "foo", "all, none, "),
    ],
)
def test_numbers_that_no_run_can_be_made_with(key, value, allowed):
    """Before anything slow: torch and Transformers would say so when they come to use them."""
    with pytest.raises(UsageError) as raised:
        build_arguments(parse_config(settings(training={"use_cpu": True, key: value})))
    found = repr(value) if isinstance(value, str) else f"{value:g}"
    assert f"training.{key}: {found} is not allowed; allowed: {allowed}" in one_line(raised)


def test_a_checkpoint_is_not_named_in_the_configuration():
    with pytest.raises(UsageError, match="goes on with --resume or --auto-resume"):
        build_arguments(parse_config(settings(training={"resume_from_checkpoint": "x"})))


def test_mixed_precision_of_the_launcher_is_that_of_the_run(monkeypatch):
    """Trainer obeys it; what scores and estimates goes by `bf16`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert build_arguments(parse_config(settings())).bf16
    with pytest.raises(UsageError) as raised:
        build_arguments(parse_config(settings(training={"use_cpu": True, "bf16": False})))
    assert "training.bf16: false found, and the launcher asks for bf16" in one_line(raised)
    with pytest.raises(UsageError) as raised:
        build_arguments(parse_config(settings(training={"use_cpu": True, "fp16": True})))
    assert "training.fp16: true found, and the launcher asks for bf16" in one_line(raised)


def test_old_name_of_activation_checkpointing_works_and_warns(tmp_path):
    if "activation_checkpointing" not in TrainingArguments.__dataclass_fields__:
        pytest.skip("this version of transformers has the old name only")
    with pytest.warns(FutureWarning, match="activation_checkpointing"):
        args = DeepSupervisionConfig(str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert args.activation_checkpointing is True
