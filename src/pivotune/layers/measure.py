"""Measure a model's layers on parallel rows and choose where the inner losses go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pivotune.data.examples import Pair, Side
from pivotune.errors import UsageError
from pivotune.layers.analysis import LayerAnalysis, analysis_to_json
from pivotune.layers.profile import english_looking_tokens, profile_layers
from pivotune.layers.selection import select_layers

# With 64 rows the standard error of the mean entropy is then a few hundredths of a nat.
TOKENS_PER_ROW = 32


def analyze_layers(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    model_name: str = "",
    language: str | None = None,
    batch_size: int = 8,
    tokens_per_row: int | None = TOKENS_PER_ROW,
    progress: Callable[[int], None] | None = None,
) -> LayerAnalysis:
    """Entropy profile on the target side and, where rows have one, the English side; and the layers that follow.

    Counted are tokens of query and answer; the template's own words are the same in both languages and are not.

    Args:
        pairs: encoded rows; all of them are measured.
        tokens_per_row: how many tokens of each sequence are counted, at even distances; None counts all of them. Tokens of
            one text are alike, so more rows tell more than more tokens, and the lens costs a head product per token and
            layer.
        progress: called with the number of sequences done so far, both languages together.

    Raises:
        UsageError: no row has a target side.
    """
    target = [pair.target for pair in pairs if pair.target is not None]
    english = [pair.english for pair in pairs if pair.english is not None]
    if not target:
        raise UsageError("the analysis needs rows with a target-language prompt and completion")
    texts = [tokenizer.decode(_counted(side), skip_special_tokens=True) for side in target]
    vocabulary, how = english_looking_tokens(tokenizer, texts)

    def profile(sides: Sequence[Side], done: int) -> Any:
        batches = _batches(sides, batch_size, _device(model), tokenizer.pad_token_id or 0)
        return profile_layers(
            model,
            batches,
            english_tokens=vocabulary,
            tokens_per_sequence=tokens_per_row,
            progress=lambda count: progress(done + count) if progress else None,
        )

    target_profile = profile(target, 0)
    english_profile = profile(english, len(target)) if english else None
    return analysis_to_json(
        select_layers(target_profile.entropy),
        target_profile,
        english_profile,
        model=model_name,
        language=language,
        english_tokens=how,
    )


def num_sequences(pairs: Sequence[Pair]) -> int:
    """How many sequences `analyze_layers` will report as done."""
    return sum((pair.target is not None) + (pair.english is not None) for pair in pairs)


def _counted(side: Side) -> list[int]:
    return [*side.ids[slice(*side.query)].tolist(), *side.ids[side.answer :].tolist()]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _batches(
    sides: Sequence[Side], batch_size: int, device: torch.device, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    """Pad sequences of similar length together; the means do not depend on the order."""
    ordered = sorted(sides, key=lambda side: len(side.ids))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        shape = (len(chunk), len(chunk[-1].ids))
        input_ids = torch.full(shape, pad_token_id, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        token_mask = torch.zeros(shape, dtype=torch.bool)
        for index, side in enumerate(chunk):
            input_ids[index, : len(side.ids)] = torch.from_numpy(side.ids).long()
            attention_mask[index, : len(side.ids)] = 1
            token_mask[index, slice(*side.query)] = True
            token_mask[index, side.answer : len(side.ids)] = True
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_mask": token_mask}
        yield {name: tensor.to(device) for name, tensor in batch.items()}
