from __future__ import annotations

import sys
import types

import pytest
import torch
from conftest import tiny_config
from tiny_training import arguments, make_pairs, tiny_trainer
from transformers import TrainingArguments

from pivotune.errors import UsageError
from pivotune.layers import measure
from pivotune.training.stand_in import check_setup


def check(folder, **changes):
    check_setup(arguments(folder, **changes), tiny_config("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"},
         r"training\.lr_scheduler_type: cosine_with_min_lr: One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_rl": 0.1}},
         r"lr_scheduler_type: cosine_with_min_lr with lr_scheduler_kwargs: .*min_rl.*unexpected keyword argument 'min_rl'"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, r"lr_scheduler_type: warmup_stable_decay: .*num_decay_steps"),
        # Read after the warm-up only.
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "half"}, "warmup_steps": 5000},
         r"lr_scheduler_type: cosine with lr_scheduler_kwargs: .*half"),
        ({"report_to": "wandb"}, r"training\.report_to: wandb: WandbCallback requires wandb to be installed"),
        ({"optim": "sgd", "optim_args": "momentum=much"}, r"training\.optim: sgd with optim_args: momentum=much: .*much"),
        ({"save_total_limit": 2, "save_strategy": "no"}, "save_total_limit: 2 has no effect with save_strategy: no"),
        ({"optim_args": "momentum=0.9"}, r"optim_args: momentum=0\.9 has no effect with optim: adamw_torch_fused"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, foo=1"}, r"optim_args: foo=1 has no effect with optim: sgd"),
        ({"optim": "adafactor", "adam_beta1": 0.5}, r"training\.adam_beta1: 0\.5 has no effect with optim: adafactor"),
        ({"optim": "sgd", "adam_epsilon": 1e-3}, r"training\.adam_epsilon: 0\.001 has no effect with optim: sgd"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_or_changes_nothing(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message) as raised:
        check(tmp_path, **changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 3},
            "warmup_steps": 0.1,
        },
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 1e-3, "weight_decay": 0.1},
        {"optim": "adafactor"},
    ],
)
def test_settings_of_a_good_run(changes, tmp_path):
    check(tmp_path, **changes)


def test_optim_target_modules_are_looked_for_in_the_model(tmp_path, monkeypatch):
    galore = types.ModuleType("galore_torch")
    galore.GaLoreAdamW = galore.GaLoreAdafactor = galore.GaLoreAdamW8bit = torch.optim.AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "galore_torch", galore)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    chosen = {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}
    check(tmp_path, **chosen)
    with pytest.raises(UsageError, match=r"training\.optim: galore_adamw: No target modules found .*query"):
        check(tmp_path, **{**chosen, "optim_target_modules": ["query"]})
    with pytest.raises(
        UsageError, match=r"optim_target_modules: .* has no effect with optim: adamw_torch_fused; set an "
    ):
        arguments(tmp_path, optim_target_modules=["q_proj"])


def test_the_trainer_checks_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "analyze_layers", lambda *args, **kwargs: pytest.fail("layers were measured"))
    slow = {"conversion_layer": "auto", "thinking_layer": "auto"}
    with pytest.raises(UsageError, match="cosine_with_min_lr"):
        tiny_trainer(tmp_path, lr_scheduler_type="cosine_with_min_lr", **slow)
    evaluated = {"eval_strategy": "epoch", **slow}
    with pytest.raises(
        UsageError, match=r"training\.eval_strategy: epoch needs held-out rows and eval_dataset gives none"
    ):
        tiny_trainer(tmp_path, **evaluated)
    with pytest.raises(
        UsageError, match=r"metric_for_best_model: eval_loss is not measured; allowed: eval_target_loss, "
    ):
        tiny_trainer(tmp_path, metric_for_best_model="eval_loss", trainer={"eval_dataset": make_pairs(4)}, **evaluated)


def test_an_optimizer_of_the_user_replaces_the_settings(tmp_path):
    """Those of `training` are then not read."""
    from conftest import build_tiny_model

    model = build_tiny_model()
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = tiny_trainer(tmp_path, model=model, trainer={"optimizers": (own, None)}, optim_args="momentum=0.9")
    assert trainer.create_optimizer() is own
    assert TrainingArguments.__dataclass_fields__["optim_args"].default is None
