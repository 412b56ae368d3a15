from __future__ import annotations

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model

from pivotune.errors import UsageError
from pivotune.models import architecture as module
from pivotune.models.architecture import ArchitectureSpec, find_architecture, register_architecture


def test_parts_of_every_family(family):
    model = build_tiny_model(family)
    found = find_architecture(model)
    assert found.num_layers == NUM_LAYERS
    assert found.lm_head is model.get_output_embeddings()
    assert found.vocab_size == model.get_output_embeddings().weight.shape[0]


def test_wrapped_models_are_unwrapped(distinct_family):
    from peft import LoraConfig, get_peft_model

    model = build_tiny_model(distinct_family)
    blocks = find_architecture(model).blocks
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", fan_in_fan_out=distinct_family == "gpt2"))
    assert find_architecture(wrapped).blocks is blocks
    assert find_architecture(torch.nn.DataParallel(wrapped)).blocks is blocks


def test_unknown_family_says_what_to_implement():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("opt", vocab_size=64, hidden_size=16, ffn_dim=16, num_hidden_layers=1,
                                  num_attention_heads=2, word_embed_proj_dim=16)  # fmt: skip
    with pytest.raises(UsageError, match=r"^model type 'opt' is not supported.*llama.*register_architecture") as raised:
        find_architecture(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(raised.value)


def test_registered_family_works_and_wrong_path_is_named(monkeypatch):
    monkeypatch.setattr(module, "ARCHITECTURES", dict(module.ARCHITECTURES))
    model = build_tiny_model("llama")
    model.config.model_type = "newcomer"
    register_architecture("newcomer", ArchitectureSpec())
    assert find_architecture(model).num_layers == NUM_LAYERS
    register_architecture("newcomer", ArchitectureSpec(final_norm="last_norm"))
    with pytest.raises(UsageError, match=r"no module 'last_norm' in LlamaModel for its final_norm"):
        find_architecture(model)
