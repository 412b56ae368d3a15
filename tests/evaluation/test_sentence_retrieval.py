"""Pooled hidden states against the model's own list, and retrieval against hand-made neighbours."""

from __future__ import annotations

import pytest
import torch
from conftest import NUM_LAYERS, build_tiny_model

from pivotune.evaluation import sentence_retrieval
from pivotune.evaluation.sentence_retrieval import (
    mean_of_non_pairs,
    pooled_states,
    retrieval_success,
    tokenize,
    unit_vectors,
    without_mean,
)
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import tap

IDS = [[5, 9, 40, 41, 7, 200, 201, 99], [17], [30, 31, 32], [8, 9], [77, 5, 6, 300, 12]]


@torch.no_grad()
def naive_states(model, ids, first=1):
    """(L + 1, D) of one sentence: the model's own list, which ends normed, so the top comes from a tap."""
    architecture = find_architecture(model)
    with tap(architecture, [architecture.num_layers]) as taps:
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = (*output.hidden_states[:-1], taps.hidden_states[architecture.num_layers])
    return torch.stack([state[0, min(first, len(ids) - 1) :].float().mean(0) for state in states])


@pytest.mark.parametrize("batch_size", [2, 5])
def test_pooled_states_are_the_means_of_the_models_own(distinct_family, batch_size):
    model = build_tiny_model(distinct_family)
    pooled = pooled_states(model, IDS, batch_size=batch_size)
    expected = torch.stack([naive_states(model, ids) for ids in IDS])
    assert pooled.shape == (len(IDS), NUM_LAYERS + 1, expected.shape[-1])
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_the_first_token_counts_where_asked_for():
    model = build_tiny_model()
    pooled = pooled_states(model, IDS, batch_size=3, with_first_token=True)
    expected = torch.stack([naive_states(model, ids, first=0) for ids in IDS])
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    without = pooled_states(model, IDS, batch_size=3)
    assert torch.allclose(without[1], pooled[1], atol=1e-5)  # its only token
    assert not torch.allclose(without[2], pooled[2], atol=1e-2)


def test_the_lm_head_is_never_run_and_modes_and_hooks_are_as_before():
    model = build_tiny_model("gpt2").train()
    model.transformer.h[1].eval()

    def refuse(*args):
        raise AssertionError("the LM head ran")

    handle = model.lm_head.register_forward_hook(refuse)
    modes = [module.training for module in model.modules()]
    with torch.random.fork_rng():
        pooled_states(model, IDS, batch_size=2)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_is_off_inside():
    model = build_tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert torch.equal(pooled_states(model, IDS, batch_size=2), pooled_states(model, IDS, batch_size=2))


def test_a_half_precision_model_is_pooled_in_full_precision():
    model = build_tiny_model().to(torch.bfloat16)
    pooled = pooled_states(model, IDS, batch_size=1)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.stack([naive_states(model, ids) for ids in IDS]))
    assert not torch.equal(pooled[0], pooled[0].bfloat16().float())


def test_a_sentence_without_tokens_is_zero_and_harms_no_other():
    model = build_tiny_model()
    pooled = pooled_states(model, [[], *IDS], batch_size=3)
    assert not pooled[0].any()
    torch.testing.assert_close(pooled[1:], pooled_states(model, IDS, batch_size=6), rtol=1e-5, atol=1e-5)


def test_progress_counts_sentences():
    done = []
    pooled_states(build_tiny_model(), IDS, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]


def test_tokens_are_cut_and_counted(tokenizer):
    sentences = ["Namba moja ni ipi?", "Ni"]
    lengths = [len(tokenizer(sentence)["input_ids"]) for sentence in sentences]
    assert lengths[0] > 3 >= lengths[1]
    ids, truncated = tokenize(tokenizer, sentences, 3)
    assert ([len(one) for one in ids], truncated) == ([3, lengths[1]], 1)
    assert ids[0] == tokenizer(sentences[0])["input_ids"][:3]
    assert tokenize(tokenizer, sentences, lengths[0])[1] == 0


def test_the_nearest_is_found_and_ties_are_shared():
    queries = unit_vectors(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 0.1]]))
    # The first key is the first query's and as near to the fourth as the last; the third query's own key is far.
    keys = unit_vectors(torch.tensor([[3.0, 0.0], [0.1, 1.0], [-1.0, -1.0], [5.0, 0.0]]))
    assert retrieval_success(queries, keys).tolist() == [0.5, 1.0, 0.0, 0.5]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_change_nothing(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    keys = unit_vectors(torch.randn(20, 4, generator=generator))
    queries = unit_vectors(keys + 0.5 * torch.randn(20, 4, generator=generator))
    expected = (queries @ keys.T).argmax(1) == torch.arange(20)
    monkeypatch.setattr(sentence_retrieval, "_CHUNK", chunk)
    assert 0 < expected.sum() < 20
    assert retrieval_success(queries, keys).tolist() == expected.double().tolist()


def test_one_vector_for_everything_is_at_chance():
    vectors = unit_vectors(torch.randn(7, generator=torch.Generator().manual_seed(0)).repeat(1000, 1))
    noisy = unit_vectors(vectors.float() * torch.rand(1000, 1, generator=torch.Generator().manual_seed(1)))
    assert retrieval_success(vectors, noisy).mean().item() == pytest.approx(1 / 1000)
    assert retrieval_success(unit_vectors(torch.zeros(9, 4)), unit_vectors(torch.zeros(9, 4))).tolist() == [1 / 9] * 9


def test_near_duplicates_are_told_apart():
    """Cosines that differ by 1e-9, as in layers where all sentences are close together."""
    base = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).repeat(3, 1)
    vectors = unit_vectors(base + 1e-4 * torch.eye(3, dtype=torch.float64))
    assert retrieval_success(vectors, vectors).tolist() == [1, 1, 1]


def test_without_mean_leaves_no_noise():
    vectors = torch.tensor([[1.0, 2.0], [3.0, 2.0]], dtype=torch.float64)
    assert without_mean(vectors).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    same = torch.full((3, 2), 1000.0, dtype=torch.float64)
    same[0, 0] += 1e-4
    assert not without_mean(same).any()


def test_mean_of_non_pairs():
    generator = torch.Generator().manual_seed(0)
    a, b = (unit_vectors(torch.randn(6, 3, generator=generator)) for _ in range(2))
    similarities = a @ b.T
    expected = similarities[~torch.eye(6, dtype=torch.bool)].mean().item()
    assert mean_of_non_pairs(a, b) == pytest.approx(expected, abs=1e-12)
