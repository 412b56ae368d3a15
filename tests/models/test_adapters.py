from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import build_tiny_model, tiny_config
from peft import LoraConfig
from tiny_batches import make_batch, signal, supervise
from transformers import AutoConfig, AutoModelForCausalLM

from pivotune.config.settings import LoraSettings
from pivotune.errors import UsageError
from pivotune.models.adapters import add_adapters, build_lora_config, check_adapters, is_tied
from pivotune.objectives.deep_supervision import deep_supervision_terms


def tied_model(family: str = "llama") -> Any:
    return build_tiny_model(family, tie_word_embeddings=True)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **options})


def perturb(model: Any) -> Any:
    """Adapters start as nothing; give them something to say."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def test_settings_become_a_peft_configuration():
    settings = LoraSettings(r=3, alpha=7, dropout=0.25, target_modules=["q_proj"])
    config = build_lora_config(settings, build_tiny_model())
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (3, 7, 0.25, {"q_proj"})
    assert (config.task_type, config.fan_in_fan_out) == ("CAUSAL_LM", False)


def test_gpt2_stores_its_weights_the_other_way_round():
    """`Conv1D`: PEFT warns, and corrects itself, where this is not said."""
    model = build_tiny_model("gpt2")
    config = build_lora_config(LoraSettings(r=2), model)
    assert config.fan_in_fan_out is True
    adapted = add_adapters(model, config)
    assert any("c_attn.lora_A" in name for name, _ in adapted.named_parameters())


def test_tied_or_not():
    assert is_tied(tied_model())
    assert not is_tied(build_tiny_model(tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("target_modules", ["q_proj", "lm_head"], "lm_head"),
        ("target_modules", ["embed_tokens"], "embed_tokens"),
        ("target_modules", "lm_head", "lm_head"),
        ("target_modules", r".*(q_proj|lm_head)", "lm_head"),
        ("target_modules", r"model\.embed_.*", "embed_tokens"),
        ("modules_to_save", ["lm_head"], "lm_head"),
        ("modules_to_save", ["head"], "lm_head"),
        ("modules_to_save", ["embed_tokens"], "embed_tokens"),
        ("target_parameters", ["lm_head.weight"], "lm_head"),
        ("trainable_token_indices", [3, 4], "embed_tokens"),
    ],
)
def test_tied_head_is_refused(option, value, name):
    model = tied_model()
    with pytest.raises(UsageError) as raised:
        add_adapters(model, lora(**{option: value}))
    assert str(raised.value).startswith(f"lora.{option}: {name} is not allowed; this model ties its head")
    assert "\n" not in str(raised.value)
    # Nothing was put into the model before it was refused.
    assert not any("lora_" in key for key, _ in model.named_parameters())


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "down_proj"], r".*\.layers\.[01]\..*_proj"])
def test_tied_model_takes_adapters_elsewhere(target):
    model = add_adapters(tied_model(), lora(target_modules=target))
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted
    assert not any("lm_head" in name or "embed" in name for name in adapted)
    merged = perturb(model).merge_and_unload()
    assert is_tied(merged)


def test_untied_head_takes_an_adapter_which_inner_losses_read_but_do_not_train():
    """The frozen head is the head of now, adapter included, and no inner loss reaches any of its parts."""
    model = perturb(add_adapters(build_tiny_model(), lora(target_modules=["lm_head", "q_proj"])))
    batch = make_batch(4)
    supervision = supervise(conversion=signal(kind="logits", layer=1), thinking=signal(kind="logits", layer=3))
    terms = deep_supervision_terms(model, batch, supervision)
    (terms["conversion"].sum + terms["thinking"].sum).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    assert all(grad is None for name, grad in gradients.items() if "lm_head" in name)
    assert all(grad is not None for name, grad in gradients.items() if "layers.0" in name)
    merged = model.merge_and_unload()
    with torch.no_grad():
        expected = deep_supervision_terms(merged, batch, supervision)
    for name, term in terms.items():
        assert term.sum.item() == pytest.approx(expected[name].sum.item(), rel=1e-5)
    with torch.no_grad():
        plain = deep_supervision_terms(build_tiny_model(), batch, supervision)
    assert abs(plain["conversion"].sum.item() - expected["conversion"].sum.item()) > 1e-2


def test_unknown_module_is_one_line():
    with pytest.raises(UsageError) as raised:
        add_adapters(build_tiny_model(), lora(target_modules=["query_key_value"]))
    assert str(raised.value).startswith("lora.target_modules: ")
    assert "query_key_value" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_model_with_adapters_is_refused():
    model = add_adapters(build_tiny_model(), lora())
    with pytest.raises(UsageError, match="the model already has adapters"):
        add_adapters(model, lora())


# ---- from the configuration alone ----


def test_check_needs_no_weights(monkeypatch):
    """What is found is found on `meta` tensors, and nothing else is made."""
    made: list[torch.device] = []
    from_config = AutoModelForCausalLM.from_config

    def recorded(*args: Any, **options: Any) -> Any:
        model = from_config(*args, **options)
        made.extend(parameter.device for parameter in model.parameters())
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", recorded)
    check_adapters(LoraSettings(), tiny_config("llama", tie_word_embeddings=True))
    check_adapters(LoraSettings(target_modules=["lm_head"]), tiny_config("llama", tie_word_embeddings=False))
    assert {device.type for device in made} == {"meta"}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (["q_proj", "lm_head"], "lora.target_modules: lm_head is not allowed"),
        (".*lm_head", "lora.target_modules: lm_head is not allowed"),
        (["c_attn"], "lora.target_modules: "),
    ],
)
def test_check_finds_what_adding_would(target, message):
    config = tiny_config("llama", tie_word_embeddings=True)
    with pytest.raises(UsageError) as raised:
        check_adapters(LoraSettings(target_modules=target), config)
    assert str(raised.value).startswith(message)


def test_check_passes_for_every_family(family):
    config: Any = tiny_config(family)
    check_adapters(LoraSettings(), AutoConfig.for_model(**config.to_dict()))


def test_four_bit_base_trains_and_loads_again(tmp_path):
    """Loading, adapters, training, saving: on a CPU too, where bitsandbytes is installed."""
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    from tiny_training import QUIET, run_config, save_tiny_model, write_rows

    from pivotune.models.loading import load_model
    from pivotune.runs.execute import execute_run
    from pivotune.runs.prepare import prepare_run

    # A matrix of less than 4,096 values would stay as it is.
    save_tiny_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    write_rows(tmp_path / "rows.jsonl", 20)
    training = {**QUIET, "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    result = execute_run(prepare_run(run_config(tmp_path, quantize="4bit", lora={"r": 4}, training=training)))
    losses = [line["loss"] for line in result.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    frozen = [parameter for parameter in result.model.parameters() if not parameter.requires_grad]
    assert any(parameter.dtype == torch.uint8 for parameter in frozen)
    assert hasattr(load_model(str(result.folder)), "peft_config")
