"""Every field of `TrainingArguments` has an effect, tested here or named with its test, or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from tiny_training import arguments, make_pairs, tiny_trainer
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pivotune.config.training_fields import REFUSED, REFUSED_IN_YAML, declared_fields
from pivotune.config.yaml_text import parse_config
from pivotune.errors import UsageError
from pivotune.training.arguments import DeepSupervisionConfig, build_arguments

TESTS = Path(__file__).parents[1]
# Fields whose effect another file tests, or a device that few machines have.
ELSEWHERE = {
    "output_dir": "tests/training/test_trainer.py",
    "optim_target_modules": "tests/training/test_stand_in.py",
    "report_to": "tests/training/test_trainer.py",
    "load_best_model_at_end": "tests/training/test_trainer.py",
    "resume_from_checkpoint": "tests/training/resilience/test_resume.py",
    "ddp_timeout": "tests/training/test_arguments.py",
    "fsdp": "tests/training/distributed/test_strategies.py",
    "fsdp_config": "tests/training/distributed/test_strategies.py",
    "deepspeed": "tests/training/distributed/test_strategies.py",
    "use_cpu": "tests/tiny_training.py",
    "fp16": "tests/training/test_arguments.py",
    "gradient_checkpointing": "tests/training/test_arguments.py",
}
# Read by `TrainingArguments` itself, or by a script of the user's own, in Python only.
OF_TRANSFORMERS = {
    "tf32",
    "ddp_backend",
    "do_train",
    "do_eval",
    "do_predict",
    "local_rank",
    "gradient_checkpointing_kwargs",
}


@dataclasses.dataclass(frozen=True)
class Effect:
    """A field, a value, and what it changes: `observe` of a trainer differs with and without the value."""

    field: str
    value: Any
    observe: Callable[[Any], Any]
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)


def losses(trainer) -> Any:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def rates(trainer) -> Any:
    return [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]


def lines(trainer) -> Any:
    return [(line["step"], sorted(line)) for line in trainer.state.log_history]


def files(trainer) -> Any:
    folder = Path(trainer.args.output_dir)
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def evaluations(trainer) -> Any:
    return sum(line["step"] for line in trainer.state.log_history if "eval_target_loss" in line)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
OF_TRAINING = [
    Effect("per_device_train_batch_size", 8, losses),
    Effect("num_train_epochs", 2, losses),
    Effect("max_steps", 2, losses),
    Effect("learning_rate", 1e-3, losses),
    Effect("lr_scheduler_type", "cosine", rates),
    Effect("lr_scheduler_kwargs", {"num_cycles": 1.5}, rates, {"lr_scheduler_type": "cosine"}),
    Effect("warmup_steps", 2, rates),
    Effect("optim", "sgd", losses),
    Effect("optim_args", "momentum=0.9", losses, {"optim": "sgd"}),
    Effect("weight_decay", 0.5, losses),
    Effect("adam_beta1", 0.1, losses),
    Effect("adam_beta2", 0.5, losses),
    Effect("adam_epsilon", 0.1, losses),
    Effect("gradient_accumulation_steps", 2, losses),
    Effect("max_grad_norm", 0.01, losses, {"optim": "sgd"}),
    Effect("bf16", True, losses),
    Effect("logging_strategy", "epoch", lines, {"logging_steps": 500}),
    Effect("logging_steps", 2, lines),
    Effect("logging_first_step", True, lines, {"logging_steps": 3}),
    Effect("include_num_input_tokens_seen", "all", lines),
    Effect("skip_memory_metrics", False, lines),
    Effect("eval_strategy", "epoch", evaluations),
    Effect("eval_steps", 2, evaluations, {"eval_strategy": "steps"}),
    Effect("eval_delay", 3, evaluations, EVALUATED),
    Effect("eval_on_start", True, lines),
    Effect("save_strategy", "epoch", files),
    Effect("save_steps", 2, files, {"save_strategy": "steps"}),
    Effect("save_total_limit", 1, files, {"save_strategy": "steps", "save_steps": 1}),
    Effect("save_only_model", True, files, {"save_strategy": "epoch"}),
    Effect("metric_for_best_model", "english_nll", lambda trainer: trainer.state.best_metric, EVALUATED),
    Effect("greater_is_better", True, lambda trainer: trainer.state.best_metric,
           {**EVALUATED, "metric_for_best_model": "target_nll"}),
    Effect("seed", 1, losses),
    Effect("data_seed", 7, losses),
    Effect("train_sampling_strategy", "sequential", losses),
    Effect("dataloader_drop_last", True, losses, {"per_device_train_batch_size": 5}),
    Effect("activation_checkpointing", True, lambda trainer: trainer.model.is_activation_checkpointing),
    Effect("activation_checkpointing_kwargs", {"every_n_layers": 2},
           lambda trainer: sum(vars(module).get("gradient_checkpointing", False) for module in trainer.model.modules()),
           {"activation_checkpointing": True}),
]  # fmt: skip


def loader(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.get_train_dataloader(), name)


def of_ddp(name: str) -> Callable[[Any], Any]:
    return lambda trainer: getattr(trainer.accelerator.ddp_handler, name)


WORKER = {"dataloader_num_workers": 1}
BEFORE_TRAINING = [
    Effect("torch_compile", True, lambda trainer: trainer.accelerator.state.dynamo_plugin.backend),
    Effect("torch_compile_backend", "eager", lambda trainer: trainer.accelerator.state.dynamo_plugin.backend),
    Effect("torch_compile_mode", "max-autotune", lambda trainer: trainer.accelerator.state.dynamo_plugin.mode),
    Effect("use_cache", True, lambda trainer: trainer.model.config.use_cache),
    Effect("disable_tqdm", False, lambda trainer: [type(each) for each in trainer.callback_handler.callbacks]),
    Effect("per_device_eval_batch_size", 2, lambda trainer: len(trainer.get_eval_dataloader("target"))),
    Effect("dataloader_num_workers", 1, loader("num_workers")),
    Effect("dataloader_persistent_workers", True, loader("persistent_workers"), WORKER),
    Effect("dataloader_prefetch_factor", 5, loader("prefetch_factor"), WORKER),
    Effect("dataloader_multiprocessing_context", "spawn", loader("multiprocessing_context"), WORKER),
    Effect("accelerator_config", {"non_blocking": True}, lambda trainer: trainer.accelerator.non_blocking),
    Effect("ddp_find_unused_parameters", True, of_ddp("find_unused_parameters")),
    Effect("ddp_bucket_cap_mb", 3, of_ddp("bucket_cap_mb")),
    Effect("ddp_broadcast_buffers", False, of_ddp("broadcast_buffers")),
    Effect("ddp_static_graph", True, of_ddp("static_graph")),
    Effect("log_level", "debug", lambda trainer: transformers.logging.get_verbosity()),
    Effect("log_level_replica", "debug", lambda trainer: as_replica(trainer.args).get_process_log_level()),
    Effect("log_on_each_node", False, lambda trainer: as_replica(trainer.args, local=0).should_log),
]  # fmt: skip
REPORTED = {"run_name": "mine", "project": "mine", "trackio_space_id": "mine", "trackio_bucket_id": "mine",
            "trackio_static_space_id": "mine"}  # fmt: skip


def as_replica(args: Any, local: int = 1) -> Any:
    """The arguments as the first process of a second machine has them, or its second one."""

    class Replica(type(args)):
        process_index = 2
        local_process_index = local

    replica = object.__new__(Replica)
    vars(replica).update(vars(args))
    return replica


def names(effects: list[Effect]) -> set[str]:
    return {effect.field for effect in effects}


def test_every_field_is_known():
    """A field of a new release fails here: give it an effect and its test, or refuse it."""
    tested = names(OF_TRAINING) | names(BEFORE_TRAINING) | {*REPORTED, "torch_empty_cache_steps", "debug"}
    tested |= {"full_determinism", "bf16_full_eval", "fp16_full_eval", "dataloader_pin_memory"}
    groups = [tested, ELSEWHERE.keys(), OF_TRANSFORMERS, REFUSED.keys()]
    fields = [field.name for field in dataclasses.fields(TrainingArguments)]
    counted = {field: sum(field in group for group in groups) for field in fields}
    assert {field: count for field, count in counted.items() if count != 1} == {}
    assert set().union(*groups) == set(fields)
    assert set(declared_fields()) == set(fields)


@pytest.mark.parametrize(("field", "file"), ELSEWHERE.items())
def test_the_file_that_tests_a_field_names_it(field, file):
    assert field in (TESTS.parent / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("field", [*REFUSED, *REFUSED_IN_YAML])
def test_the_value_that_is_allowed_is_the_default(field):
    default = DeepSupervisionConfig.__dataclass_fields__[field]
    found = default.default if default.default_factory is dataclasses.MISSING else default.default_factory()
    assert found == {**REFUSED, **REFUSED_IN_YAML}[field][0]


def test_refused_fields_are_documented():
    text = (TESTS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [field for field in (*REFUSED, *REFUSED_IN_YAML) if f"`{field}`" not in text] == []


def other_value(field: str) -> Any:
    default = {**REFUSED, **REFUSED_IN_YAML}[field][0]
    return not default if isinstance(default, bool) else 0.5 if isinstance(default, float) else "secret"


@pytest.mark.parametrize("field", sorted(REFUSED.keys() - {"eval_accumulation_steps"}))
def test_refused_fields_are_refused_in_python(field, tmp_path):
    with pytest.raises(UsageError, match=rf"^training\.{field}: .*is not supported: \w+") as raised:
        arguments(tmp_path, **{field: other_value(field)})
    assert "hub_token" not in field or "secret" not in str(raised.value)


@pytest.mark.parametrize("field", sorted(REFUSED_IN_YAML))
def test_fields_for_scripts_are_refused_in_yaml_only(field, tmp_path):
    value = 7 if field in ("ddp_timeout", "local_rank") else other_value(field)
    config = {"model": "m", "data": {"train": "t"}, "output_dir": "o", "training": {field: value}}
    with pytest.raises(UsageError, match=rf"^training\.{field}: .*is not supported: \w+"):
        build_arguments(parse_config(config))
    assert getattr(arguments(tmp_path, **{field: value}), field) == value


def build(folder: Path, **changes: Any) -> Any:
    return tiny_trainer(folder, trainer={"eval_dataset": make_pairs(4, seed=5)}, **changes)


def trained(folder: Path, **changes: Any) -> Any:
    trainer = build(folder, **changes)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def without_field(tmp_path_factory) -> Callable[[dict[str, Any]], Any]:
    """Return the trained trainer with the settings beside a field; several fields are compared with the same one."""
    kept = {}

    def find(beside: dict[str, Any]) -> Any:
        key = repr(beside)
        if key not in kept:
            kept[key] = trained(tmp_path_factory.mktemp("without"), **beside)
        return kept[key]

    return find


@pytest.mark.slow
@pytest.mark.parametrize("effect", OF_TRAINING, ids=lambda effect: effect.field)
def test_a_field_changes_the_training(effect, tmp_path, without_field):
    changed = trained(tmp_path, **effect.beside, **{effect.field: effect.value})
    assert effect.observe(changed) != effect.observe(without_field(effect.beside))


@pytest.mark.parametrize("effect", BEFORE_TRAINING, ids=lambda effect: effect.field)
def test_a_field_changes_the_trainer(effect, tmp_path):
    verbosity = transformers.logging.get_verbosity()
    try:
        # Hooks and flags of the process are observed too: one trainer after the other.
        without = effect.observe(build(tmp_path, **effect.beside))
        assert effect.observe(build(tmp_path, **effect.beside, **{effect.field: effect.value})) != without
    finally:
        transformers.logging.set_verbosity(verbosity)


def test_memory_is_pinned_for_an_accelerator_alone(tmp_path, monkeypatch):
    trainers = [build(tmp_path, use_cpu=False, dataloader_pin_memory=asked) for asked in (True, False)]
    for available in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=available: found)
        assert [loader("pin_memory")(trainer) for trainer in trainers] == [available, False]


def test_integrations_read_their_names(tmp_path, monkeypatch):
    class Reporter(TrainerCallback):
        found: ClassVar[dict[str, Any]] = {}

        def on_train_begin(self, args, *rest, **kwargs):
            self.found.update({name: getattr(args, name) for name in REPORTED})

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "trackio", Reporter)
    tiny_trainer(tmp_path, report_to="trackio", **REPORTED).train()
    assert Reporter.found == REPORTED


def test_the_cache_is_emptied(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: calls.append(1))
    tiny_trainer(tmp_path, torch_empty_cache_steps=2).train()
    assert len(calls) == 2


def test_overflow_is_looked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, debug="underflow_overflow", faults={"nonfinite": "skip"})
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("inf"))
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="inf/nan detected"):
        trainer.train()


def test_full_determinism(tmp_path):
    try:
        tiny_trainer(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("field", "dtype"), [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_evaluation_alone_in_half_precision(field, dtype, tmp_path):
    trainer = tiny_trainer(tmp_path, trainer={"eval_dataset": make_pairs(4)}, **{field: True})
    trainer.evaluate()
    assert next(trainer.model.parameters()).dtype == dtype
