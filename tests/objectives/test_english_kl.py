from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, build_tiny_model
from tiny_batches import collate, gradients, make_examples, relative_difference
from torch import Tensor, nn

import pivotune.objectives.english_kl as english_kl_module
from pivotune.forward.passes import PassRequest, separate_passes
from pivotune.models.architecture import find_architecture
from pivotune.objectives.base import LossTerm
from pivotune.objectives.english_kl import count_kept, english_kl, top_log_probabilities

TOP = 5
# Of the 8 examples the third and the sixth are replayed.
REPLAYED = (2, 5)


def with_predictions(start: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """The batch with predictions that are looked up one by one, and all log-probabilities of each replayed answer."""
    whole: dict[int, Tensor] = {}
    longest = max(int((batch["labels"][row] >= 0).sum()) for row in REPLAYED)
    tokens = torch.zeros(len(batch["labels"]), longest, TOP, dtype=torch.long)
    log_probabilities = torch.zeros(len(batch["labels"]), longest, TOP + 1)
    for row in REPLAYED:
        length, answer = int(batch["attention_mask"][row].sum()), int((batch["labels"][row] >= 0).nonzero()[0])
        with torch.no_grad():
            logits = start(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0, answer - 1 : length - 1]
        whole[row] = logits.double().log_softmax(dim=-1)
        for place, of_token in enumerate(whole[row]):
            best = sorted(range(VOCABULARY), key=lambda token, found=of_token: -found[token].item())[:TOP]
            tokens[row, place] = torch.tensor(best)
            others = 1 - of_token[best].exp().sum()
            log_probabilities[row, place] = torch.tensor([*of_token[best].tolist(), others.log().item()])
    return {**batch, "start_tokens": tokens, "start_log_probabilities": log_probabilities}, whole


def by_hand(model: nn.Module, batch: dict[str, Tensor], whole: dict[int, Tensor]) -> tuple[Tensor, int]:
    """KL from the model's own logits, row by row and token by token."""
    parts = []
    for row in REPLAYED:
        length, answer = int(batch["attention_mask"][row].sum()), int((batch["labels"][row] >= 0).nonzero()[0])
        found = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits[0].double().log_softmax(dim=-1)
        for place, of_token in enumerate(whole[row]):
            best = of_token.topk(TOP).indices
            q, p = of_token[best].exp(), found[answer - 1 + place][best].exp()
            q_rest, p_rest = 1 - q.sum(), 1 - p.sum()
            parts.append((q * (q / p).log()).sum() + q_rest * (q_rest / p_rest).log())
    return torch.stack(parts).sum(), len(parts)


def term_of(model: nn.Module, batch: dict[str, Tensor]) -> LossTerm:
    final = separate_passes(model, batch, PassRequest()).main.final
    assert final is not None
    return english_kl(find_architecture(model), final, batch)


@pytest.mark.parametrize("rows_at_once", [2, 1000])
def test_value_and_gradient_by_hand(distinct_family, monkeypatch, rows_at_once):
    """The head has a gradient too, and no more than a chunk's rows of logits exist at once."""
    start, model = build_tiny_model(distinct_family), build_tiny_model(distinct_family, seed=1)
    batch, whole = with_predictions(start, collate(make_examples(8)))
    monkeypatch.setattr(english_kl_module, "chunk_rows", lambda vocab_size, device: rows_at_once)
    term = term_of(model, batch)
    expected, count = by_hand(model, batch, whole)
    assert expected > 1e-3
    assert (term.sum.item(), term.count.item()) == (pytest.approx(expected.item(), rel=1e-4, abs=2e-6), count)
    assert count_kept(batch) == count == 8
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(len(output)))
    found = gradients(model, term_of(model, batch).sum)
    handle.remove()
    # A chunk is computed again in the backward pass; the pass itself projects one position a row.
    assert seen == [8, *([2] * 8 if rows_at_once == 2 else [8, 8])]
    assert relative_difference(found, gradients(model, by_hand(model, batch, whole)[0])) < 1e-4
    head = model.get_output_embeddings().weight
    assert any(p is head for n, p in model.named_parameters() if n in found)


def test_no_divergence_from_the_model_itself():
    model = build_tiny_model()
    batch, _ = with_predictions(model, collate(make_examples(8)))
    assert term_of(model, batch).sum.item() == pytest.approx(0, abs=1e-5)


def test_only_replayed_rows_count():
    """English answers with an English parallel, and English prompts with other answers, do not."""
    examples = make_examples(8)
    mixed = [
        examples[0],
        replace(examples[1], english_answer=True),
        replace(examples[2], english_answer=False),
        examples[5],
    ]
    batch = collate(mixed)
    assert count_kept(batch) == 3
    none = term_of(build_tiny_model(), {**collate(mixed[:3])})
    assert (none.sum.item(), none.count.item()) == (0.0, 0)


def test_likeliest_tokens_and_all_others():
    logits = torch.tensor([[0.0, 2.0, 1.0, -200.0], [3.0, 0.0, 0.0, 3.5]])
    tokens, found = top_log_probabilities(logits, 2)
    assert tokens.tolist() == [[1, 2], [3, 0]]
    expected = logits.double().softmax(dim=1)
    assert found.double().exp()[0].tolist() == pytest.approx(
        [*expected[0, [1, 2]].tolist(), expected[0, [0, 3]].sum().item()]
    )
    assert found.double().exp()[1].tolist() == pytest.approx(
        [*expected[1, [3, 0]].tolist(), expected[1, [1, 2]].sum().item()]
    )
