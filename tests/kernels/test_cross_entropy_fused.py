"""The choice of Liger's fused loss and its arguments; the kernel itself needs CUDA and Triton."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, build_tiny_model

from pivotune.kernels import cross_entropy
from pivotune.kernels.chunked_linear_head import LinearHead
from pivotune.kernels.cross_entropy import cross_entropy_sum, fused_loss_fits
from pivotune.models.architecture import find_architecture


class FakeLoss:
    """Takes the arguments of Liger's class and computes the same."""

    made_with: dict | None = None

    def __init__(self, *, reduction, softcap, accum_dtype):
        type(self).made_with = {"reduction": reduction, "softcap": softcap, "accum_dtype": accum_dtype}
        self.softcap = softcap

    def __call__(self, weight, states, labels, bias):
        logits = F.linear(states, weight, bias)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits, labels, reduction="sum")


@pytest.fixture
def liger(monkeypatch):
    module = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = FakeLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(cross_entropy, "_liger_installed", lambda: True)
    monkeypatch.setattr(FakeLoss, "made_with", None)


def states_like(device="cuda", dtype=torch.float32, rows=3) -> SimpleNamespace:
    """The attributes of a tensor that the choice reads, so that no GPU is needed."""

    class Rows(SimpleNamespace):
        def __len__(self):
            return rows

    return Rows(device=torch.device(device), dtype=dtype)


def test_the_choice(liger, monkeypatch):
    head = LinearHead(torch.nn.Parameter(torch.zeros(4, 2)))
    assert fused_loss_fits(states_like(), head)
    assert not fused_loss_fits(states_like("cpu"), head)
    assert not fused_loss_fits(states_like(rows=0), head)
    assert not fused_loss_fits(states_like(dtype=torch.bfloat16), head)
    assert not fused_loss_fits(states_like(dtype=torch.float64), LinearHead(head.weight.detach().double()))
    assert not fused_loss_fits(states_like(), LinearHead(head.weight.detach()))
    with torch.no_grad():
        assert not fused_loss_fits(states_like(), head)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
        assert not fused_loss_fits(states_like(), head)
    monkeypatch.setattr(cross_entropy, "_liger_installed", lambda: False)
    assert not fused_loss_fits(states_like(), head)


@pytest.mark.parametrize("family", ["gemma2", "cohere"])
def test_soft_cap_and_logit_scale_reach_the_fused_loss(liger, monkeypatch, family):
    architecture = find_architecture(build_tiny_model(family))
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(VOCABULARY, (5,), generator=torch.Generator().manual_seed(1))
    leaves = [states, architecture.lm_head.weight]
    ours = cross_entropy_sum(architecture, states, labels, frozen_head=False)
    assert FakeLoss.made_with is None
    expected = torch.autograd.grad(ours, leaves)
    monkeypatch.setattr(cross_entropy, "fused_loss_fits", lambda states, head: True)
    fused = cross_entropy_sum(architecture, states, labels, frozen_head=False)
    assert FakeLoss.made_with == {
        "reduction": "sum",
        "softcap": architecture.softcap,
        "accum_dtype": torch.float32,
    }
    assert fused.item() == pytest.approx(ours.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(fused, leaves), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_head_is_ours(liger, monkeypatch):
    monkeypatch.setattr(cross_entropy, "fused_loss_fits", lambda states, head: True)
    architecture = find_architecture(build_tiny_model())
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cross_entropy_sum(architecture, states, torch.arange(5), frozen_head=True).backward()
    assert FakeLoss.made_with is None
    assert architecture.lm_head.weight.grad is None
