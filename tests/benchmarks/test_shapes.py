"""The shapes are the published ones."""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine import describe_machine
from benchmarks.shapes import SHAPES, build_config, build_model
from pivotune.models.architecture import find_architecture


# Parameters as the model cards and papers count them.
@pytest.mark.parametrize(
    ("shape", "parameters"), [("smollm2", 134_515_008), ("llama2-7b", 6_738_415_616), ("gemma2-2b", 2_614_341_888)]
)
def test_number_of_parameters(shape, parameters):
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(build_config(shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_gemma_caps_its_logits_and_attention():
    config = build_config("gemma2-2b")
    assert (config.final_logit_softcapping, config.attn_logit_softcapping) == (30.0, 50.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_layers_can_be_cut(shape):
    assert build_config(shape, num_layers=3).num_hidden_layers == 3
    assert build_config(shape).num_hidden_layers == SHAPES[shape]["num_hidden_layers"]


def test_model_has_type_layers_and_attention_asked_for_and_the_same_weights_each_time():
    model = build_model("tiny", torch.bfloat16, num_layers=2, attn_implementation="eager")
    again = build_model("tiny", torch.bfloat16, num_layers=2)
    assert find_architecture(model).num_layers == 2
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_machine_names_no_user_host_or_folder(monkeypatch):
    import getpass
    import socket

    told = str(describe_machine())
    assert socket.gethostname() not in told
    assert getpass.getuser() not in told.split("'")
    assert "/home" not in told
