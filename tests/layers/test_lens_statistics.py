"""Statistics block by block against whole rows of logits."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VOCABULARY, build_tiny_model
from peak_bytes import peak

from pivotune.layers.profile import BlockSize, default_block, lens_statistics, profile_layers
from pivotune.lenses.logit import lens_logits
from pivotune.models.architecture import find_architecture
from pivotune.models.head import chunk_rows, plain_head

ENGLISH = (torch.arange(VOCABULARY) % 3 == 0).float()


def states(rows=23, width=32, scale=3.0):
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(5))


def whole_rows(architecture, hidden_states):
    """Entropy, most probable token, English share in float64 from whole rows of float32 logits."""
    with torch.no_grad():
        p = lens_logits(architecture, hidden_states).double().softmax(-1)
    return torch.special.entr(p).sum(-1), p.argmax(-1), p @ ENGLISH.double()


@pytest.mark.parametrize("block", [BlockSize(5, 64), BlockSize(23, 383), BlockSize(100, VOCABULARY), None])
def test_equals_whole_rows(family, block):
    architecture = find_architecture(build_tiny_model(family))
    entropy, top, english = whole_rows(architecture, states())
    found = lens_statistics(architecture, states(), ENGLISH, block)
    assert found.entropy.dtype == found.english.dtype == torch.float32
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.english.double(), english, rtol=2e-6, atol=1e-7)
    assert torch.equal(found.top, top)
    assert entropy.std() > 1e-4  # rows differ, so a row in another's place would be seen


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_nothing_cancels_where_all_logits_are_large(shift):
    """The entropy does not change with a constant added to the logits; float32 then holds each to 0.002 only."""
    model = build_tiny_model("gpt_neox")
    logits = torch.randint(-8, 8, (VOCABULARY,)).float()
    model.lm_head = torch.nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(logits + shift)
    found = lens_statistics(find_architecture(model), states(3), ENGLISH, BlockSize(2, 50))
    p = logits.double().softmax(0)
    assert found.entropy.tolist() == pytest.approx([torch.special.entr(p).sum().item()] * 3, rel=2e-6)
    assert found.top.tolist() == [int(logits.argmax())] * 3


def test_a_block_without_probability_is_harmless():
    model = build_tiny_model("gpt_neox")
    model.lm_head = torch.nn.Linear(32, VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-torch.inf)
        model.lm_head.bias[[70, 200]] = 0.0
    found = lens_statistics(find_architecture(model), states(4), ENGLISH, BlockSize(4, 64))
    assert found.entropy.tolist() == pytest.approx([math.log(2)] * 4)
    assert found.english.tolist() == pytest.approx([0.5 * float(ENGLISH[70] + ENGLISH[200])] * 4)


@pytest.mark.parametrize("columns", [64, VOCABULARY])
def test_of_equal_logits_the_first_token_is_the_top(columns):
    model = build_tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert lens_statistics(find_architecture(model), states(2), None, BlockSize(2, columns)).top.tolist() == [0, 0]


def test_no_rows_give_no_values():
    found = lens_statistics(find_architecture(build_tiny_model()), states(0), ENGLISH)
    assert [len(values) for values in found] == [0, 0, 0]


def test_no_gradient_is_recorded():
    hidden_states = states(2).requires_grad_()
    assert not lens_statistics(find_architecture(build_tiny_model()), hidden_states).entropy.requires_grad


class OtherLinear(torch.nn.Linear):
    """Stands for a quantized or adapted head, which computes something else than its weight."""

    def forward(self, states):
        return 2.0 * super().forward(states)


def test_a_head_that_is_no_plain_matrix_is_called_as_a_module():
    model = build_tiny_model()
    model.lm_head = OtherLinear(32, VOCABULARY)
    architecture = find_architecture(model)
    assert plain_head(architecture) is None
    assert default_block(architecture, torch.device("cpu")).columns == VOCABULARY
    entropy, top, _ = whole_rows(architecture, states())
    found = lens_statistics(architecture, states(), None, BlockSize(5, 64))
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=2e-6, atol=1e-6)
    assert torch.equal(found.top, top)


def test_a_hooked_head_is_called_as_a_module():
    model = build_tiny_model()
    architecture = find_architecture(model)
    plain = lens_statistics(architecture, states(4)).entropy
    handle = model.lm_head.register_forward_hook(lambda module, args, output: 0.0 * output)
    assert plain_head(architecture) is None
    assert lens_statistics(architecture, states(4)).entropy.tolist() == pytest.approx([math.log(VOCABULARY)] * 4)
    handle.remove()
    assert torch.equal(lens_statistics(architecture, states(4)).entropy, plain)


def test_logits_of_a_bf16_model_are_rounded_as_its_own():
    architecture = find_architecture(build_tiny_model("gemma2").bfloat16())
    hidden_states = states().bfloat16()
    entropy, _, english = whole_rows(architecture, hidden_states)
    found = lens_statistics(architecture, hidden_states, ENGLISH, BlockSize(9, 100))
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.english.double(), english, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("vocab_size", "device", "rows"),
    [(49152, "cpu", 128), (256000, "cpu", 64), (384, "cpu", 4096), (49152, "cuda", 1365), (256000, "cuda", 262)],
)
def test_rows_of_a_chunk_follow_the_byte_budget(vocab_size, device, rows):
    assert chunk_rows(vocab_size, torch.device(device)) == rows


@pytest.mark.parametrize(("num_layers", "tokens"), [(2, 90), (8, 30)])
def test_a_large_vocabulary_costs_one_block_whatever_the_layers_and_tokens(num_layers, tokens):
    """With 262,144 tokens one row of logits is 1 MiB, and here are 540 rows."""
    vocab_size = 262144
    model = build_tiny_model("llama", vocab_size=vocab_size, hidden_size=16, num_hidden_layers=num_layers)
    input_ids = torch.randint(vocab_size, (2, tokens))
    ones = torch.ones_like(input_ids)
    batch = {"input_ids": input_ids, "attention_mask": ones, "token_mask": ones}
    few = {**batch, "token_mask": ones.cumsum(1) == 1}
    profile_layers(model, [few])  # caches
    tokens_seen = []
    taken = peak(lambda: tokens_seen.append(profile_layers(model, [batch]).tokens))
    assert tokens_seen == [2 * tokens]
    assert taken < 96 * 2**20
