"""Score held-out rows: likelihood of the gold answer, and greedy answers, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.datasets import main_lengths
from pivotune.data.examples import Example
from pivotune.data.templates import Template, end_of_answer
from pivotune.forward.passes import PassRequest, choose_passes
from pivotune.kernels.cross_entropy import cross_entropies, shifted
from pivotune.models.architecture import find_architecture
from pivotune.models.taps import evaluation_mode
from pivotune.training.batching import blank_like
from pivotune.training.distributed import ranks


class RowScore(NamedTuple):
    """One held-out row: negative log-likelihood of its gold answer in nats, and what it sums over."""

    nll: float
    tokens: int
    characters: int


class Summary(NamedTuple):
    """Mean over all answer tokens, its standard error over rows, and the mean over characters."""

    nll: float
    stderr: float
    nll_per_character: float
    rows: int


@torch.no_grad()
def score_answers(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_token_id: int,
    batch_size: int = 16,
    autocast: bool = False,
    progress: Callable[[int], None] | None = None,
    shared_out: bool = False,
) -> list[RowScore]:
    """Return the score of every row's gold answer, in the order given.

    Args:
        examples: rows whose `main` side is scored.
        autocast: run in bfloat16 autocast, as training may.
        progress: called with the number of rows done so far.
        shared_out: every rank scores a part and gets all scores; all ranks must call this. A sharded model needs it.
    """
    architecture = find_architecture(model)
    device = architecture.device
    run_passes = choose_passes(model)
    scores: dict[int, RowScore] = {}
    with evaluation_mode(model):
        for done, indices, batch in _batches(examples, pad_token_id, batch_size, device, shared_out=shared_out):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                passes = run_passes(model, batch, PassRequest())
                assert passes.main.final is not None
                states, labels = shifted(passes.main.final, batch["labels"])
                losses = cross_entropies(architecture, states, labels)
            tokens = (batch["labels"][:, 1:] >= 0).sum(dim=1)
            sums = [part.sum().item() for part in losses.split(tokens.tolist())]
            # A rank without rows reads a blank row, which has no index.
            for index, nll, count in zip(indices, sums, tokens.tolist(), strict=False):
                scores[index] = RowScore(nll, count, examples[index].main.characters)
            if progress:
                progress(done)
    parts = ranks.gather_objects(scores) if shared_out else [scores]
    found = {index: score for part in parts for index, score in part.items()}
    return [found[index] for index in range(len(examples))]


class Answer(NamedTuple):
    """A generated answer without special tokens, stripped; whether it ended before the limit; its tokens with the end."""

    text: str
    ended: bool
    ids: Sequence[int] = ()


def greedy_answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    autocast: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Return greedy answers to the prompts of these rows, stripped, in the order given."""
    answers = generate_answers(
        model,
        tokenizer,
        [example.main.ids[: example.main.answer] for example in examples],
        end_ids=end_token_ids(model, tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        autocast=autocast,
        progress=progress,
    )
    return [answer.text for answer in answers]


@torch.no_grad()
def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    autocast: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Return greedy answers to tokenized prompts, in the order given; batches hold prompts of similar length.

    Args:
        end_ids: tokens that end an answer.
    """
    device = next(model.parameters()).device
    answers = [Answer("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with evaluation_mode(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            ids = [torch.as_tensor(prompts[index]).long() for index in indices]
            pad = partial(pad_sequence, batch_first=True, padding_side="left")
            input_ids = pad(ids, padding_value=tokenizer.pad_token_id)
            attention_mask = pad([torch.ones_like(each) for each in ids])
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                output = model.generate(
                    input_ids=input_ids.to(device),
                    attention_mask=attention_mask.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=list(end_ids),
                )
            for index, tokens in zip(indices, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((place for place, token in enumerate(tokens) if token in end_ids), None)
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
                answers[index] = Answer(text.strip(), end is not None, tokens if end is None else tokens[: end + 1])
            if progress:
                progress(start + len(indices))
    return answers


def end_token_ids(model: Any, tokenizer: Any, template: Template | None = None) -> list[int]:
    """Return the tokens that end an answer, sorted: end-of-text, those of the generation settings, and the template's.

    Args:
        model: its `generation_config.eos_token_id` may be one id, a list of ids, or None.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if own is None else own if isinstance(own, list) else [own]
    return sorted({*ids, tokenizer.eos_token_id, *([end_of_answer(template, tokenizer)] if template else [])})


def summarize(scores: Sequence[RowScore]) -> Summary:
    """Return the mean NLL over all tokens; its standard error treats rows as independent (ratio estimator)."""
    nll, tokens = sum(score.nll for score in scores), sum(score.tokens for score in scores)
    mean = nll / tokens
    residuals = [score.nll - mean * score.tokens for score in scores]
    spread = stdev(residuals) if len(residuals) > 1 else math.nan
    stderr = spread / (fmean(score.tokens for score in scores) * math.sqrt(len(scores)))
    return Summary(mean, stderr, nll / sum(score.characters for score in scores), len(scores))


def _batches(
    examples: Sequence[Example], pad_token_id: int, batch_size: int, device: torch.device, *, shared_out: bool
) -> Iterator[tuple[int, list[int], dict[str, Tensor]]]:
    """Yield batches of similar length: (rows done after this batch, their indices, batch); with `shared_out` a rank's own.

    A rank with fewer batches than another ends with a batch without rows.
    """
    collate = DeepSupervisionCollator(pad_token_id)
    order = main_lengths(examples).argsort(kind="stable").tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done, num_ranks = 0, ranks.world_size() if shared_out else 1
    for indices in ranks.share_out(batches, []) if shared_out else batches:
        batch = collate([examples[index] for index in indices] or [blank_like(examples[0])])
        done = min(done + num_ranks * len(indices), len(examples))
        yield done, indices, {name: tensor.to(device) for name, tensor in batch.items()}
