"""English that the model keeps: KL(p_start || p) on the answers of the rows replayed in English, at the top of the model.

    KL = sum_v q_v (log q_v - log p_v)

over the K likeliest tokens v of the starting model q, and all others as one. So it is a lower bound of the KL over all
tokens, and 0 where the model predicts as the starting model does (to the rounding of q).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pivotune.forward.passes import Batch
from pivotune.kernels.chunked_linear_head import even_chunks
from pivotune.models.architecture import Architecture
from pivotune.models.head import chunk_rows
from pivotune.models.sharding import call_gathered
from pivotune.objectives.base import LossTerm, no_loss


def english_kl(architecture: Architecture, final_states: Tensor, batch: Batch) -> LossTerm:
    """Return the sum of the KL in nats, and its number of answer tokens; with gradient to the states and the head.

    Args:
        final_states: output of the final norm, (B, T, width).
        batch: with `start_tokens` and `start_log_probabilities` (see `pivotune.data.collator`).
    """
    kept = _kept(batch)
    states = final_states[:, :-1][kept]
    if not len(states):
        return no_loss(batch)
    # A row's answer is contiguous: its n-th predicted token has the n-th entry.
    places = torch.arange(batch["start_tokens"].shape[1], device=kept.device) < kept.sum(dim=1, keepdim=True)
    tokens, log_probabilities = batch["start_tokens"][places], batch["start_log_probabilities"][places]
    total = states.new_zeros((), dtype=torch.float32)
    # The first dimension of a packed 4-bit weight is not the vocabulary.
    vocab_size = getattr(architecture.lm_head, "out_features", None) or architecture.vocab_size
    for rows in even_chunks(len(states), chunk_rows(vocab_size, states.device)):
        # Each chunk's logits are computed again in the backward pass, so that one chunk's exist at a time.
        part = checkpoint(
            _chunk_kl, architecture, states[rows], tokens[rows], log_probabilities[rows], use_reentrant=False
        )
        assert isinstance(part, Tensor)
        total = total + part
    return LossTerm(total, torch.tensor(len(states), device=total.device))


def count_kept(batch: Batch) -> Tensor:
    """Return the number of answer tokens of the rows replayed in English: English answer, no English parallel."""
    return _kept(batch).sum()


def top_log_probabilities(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` likeliest tokens (N, K), and their log-probabilities with that of all others last (N, K + 1)."""
    log_probabilities = logits.float().log_softmax(dim=1)
    tokens = log_probabilities.topk(count, dim=1).indices
    return tokens, _gathered(log_probabilities, tokens)


def _kept(batch: Batch) -> Tensor:
    """Return True at the places whose next token counts, bool (B, T - 1)."""
    replayed = batch["english_answer"] & ~batch["english_attention_mask"].any(dim=1)
    return (batch["labels"][:, 1:] >= 0) & replayed[:, None]


def _chunk_kl(architecture: Architecture, states: Tensor, tokens: Tensor, start: Tensor) -> Tensor:
    logits = architecture.transform_logits(call_gathered(architecture.lm_head, states))
    found = _gathered(logits.float().log_softmax(dim=1), tokens)
    # Probabilities that were rounded on disk sum to 1 again.
    return F.kl_div(found, start.log_softmax(dim=1), log_target=True, reduction="sum")


def _gathered(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    others = log_probabilities.scatter(1, tokens, -math.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probabilities.gather(1, tokens), others], dim=1)
