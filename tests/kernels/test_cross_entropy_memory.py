"""Peak memory does not grow with tokens times vocabulary, for a vocabulary of 256k."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_model
from peak_bytes import peak
from tiny_batches import signal, supervise
from torch import Tensor

from pivotune.data.examples import Example, Side
from pivotune.kernels.cross_entropy import cross_entropies, cross_entropy_sum, score_labels
from pivotune.models.architecture import find_architecture
from pivotune.objectives.deep_supervision import deep_supervision_terms
from pivotune.training.heldout import score_answers

VOCABULARY = 262_144
WIDTH = 16
# One chunk of 128 rows, and three.
FEW, MANY = 128, 384
# What all logits of the rows added would take in float32.
LOGITS = (MANY - FEW) * VOCABULARY * 4


@pytest.fixture(scope="module")
def model():
    """Two blocks under a large vocabulary."""
    size = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return build_tiny_model(vocab_size=VOCABULARY, num_key_value_heads=1, max_position_embeddings=1024, **size)


def test_the_measure_sees_what_naive_takes():
    """All logits, their log-softmax and their gradient, at a smaller vocabulary."""
    weight = torch.randn(4096, WIDTH)

    def naive(rows: int) -> None:
        states = torch.randn(rows, WIDTH, requires_grad=True)
        F.cross_entropy(states @ weight.T, torch.zeros(rows, dtype=torch.long)).backward()

    growth = peak(lambda: naive(200)) - peak(lambda: naive(100))
    assert 2 <= growth / (100 * 4096 * 4) < 3.5


@pytest.mark.parametrize("loss", ["frozen", "trained", "score"])
def test_loss_and_gradient(model, loss):
    architecture = find_architecture(model)

    def run(rows: int) -> None:
        states = torch.randn(rows, WIDTH, requires_grad=True)
        labels = torch.arange(rows)
        if loss == "score":
            score_labels(architecture, states, labels)
        elif loss == "frozen":
            cross_entropies(architecture, states, labels).sum().backward()
        else:
            cross_entropy_sum(architecture, states, labels, frozen_head=False).backward()
        model.zero_grad()

    few, many = peak(lambda: run(FEW)), peak(lambda: run(MANY))
    assert many - few < 0.01 * LOGITS
    assert many < 1.4 * FEW * VOCABULARY * 4


def large_batch(tokens: int) -> dict[str, Tensor]:
    """One row that asks for `tokens` tokens in every loss."""
    prompt = torch.arange(3, 7)
    text = torch.arange(100, 100 + tokens)
    target = torch.cat([prompt, text])
    labels = torch.cat([torch.full((4,), -100), text])
    half = tokens // 2
    places = torch.arange(tokens)
    batch = {
        "input_ids": target,
        "attention_mask": torch.ones_like(target),
        "labels": labels,
        "query_mask": torch.arange(len(target)) < 4,
        "english_input_ids": text,
        "english_attention_mask": torch.ones_like(text),
        "english_query_mask": places < half,
        "english_answer_mask": places >= half,
    }
    return {name: tensor[None] for name, tensor in batch.items()}


@pytest.mark.parametrize("kind", ["none", "logits"])
def test_training_step(model, kind):
    """Forward, backward and optimizer, of plain fine-tuning and of the logits signal."""
    supervision = supervise(conversion=signal(kind=kind, layer=1), thinking=signal(kind=kind, layer=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run(tokens: int) -> None:
        terms = deep_supervision_terms(model, large_batch(tokens), supervision)
        assert sum(int(term.count) for term in terms.values()) == tokens * (2 if kind == "logits" else 1)
        torch.stack([term.sum for term in terms.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    few, many = peak(lambda: run(FEW)), peak(lambda: run(MANY))
    assert many - few < 0.01 * LOGITS


def test_scoring_of_held_out_rows(model):
    def run(tokens: int) -> None:
        side = Side(ids=np.arange(tokens + 4, dtype=np.int32), query=(0, 4), answer=4, characters=1)
        (score,) = score_answers(model, [Example(main=side, parallel=None)], pad_token_id=0)
        assert score.tokens == tokens

    few, many = peak(lambda: run(FEW)), peak(lambda: run(MANY))
    assert many - few < 0.01 * LOGITS
