"""Measure a model's layers on parallel rows and choose the layers of the inner losses."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pivotune.data.collator import DeepSupervisionCollator
from pivotune.data.examples import Example, Pair, Side
from pivotune.errors import UsageError
from pivotune.layers.layers_json import LayerAnalysis, analysis_to_json
from pivotune.layers.profile import LayerProfile, profile_layers
from pivotune.layers.reading import measure_reading
from pivotune.layers.selection import select_by_reading, select_layers
from pivotune.lenses.base import Lens
from pivotune.lenses.logit import LogitLens
from pivotune.models.architecture import find_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# With 64 rows the standard error of the mean entropy is then a few hundredths of a nat.
TOKENS_PER_ROW = 32


def analyze_layers(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    *,
    lens: Lens | None = None,
    reading: bool = False,
    model_name: str = "",
    language: str | None = None,
    batch_size: int = 8,
    tokens_per_row: int | None = TOKENS_PER_ROW,
    progress: Callable[[int], None] | None = None,
) -> LayerAnalysis:
    """Return entropy profiles of the target side and, if rows have one, the English side; and the chosen layers.

    Tokens of query and answer are counted; the template's own words, the same in both languages, are not.

    Args:
        pairs: encoded rows; all of them are measured.
        lens: called as `lens(hidden_states, layer)` on raw states; None for the logit lens (see `profile_layers`).
            A tuned one should be fitted on other rows.
        reading: choose the layers by what they can say through the lens (`select_by_reading`), if rows have both sides; by
            the entropy otherwise.
        tokens_per_row: how many tokens of each sequence are counted, at even distances; None counts all of them. More rows
            add more information than more tokens of one text.
        progress: called with the number of sequences done so far, both languages together.

    Raises:
        UsageError: no row has a target side.
    """
    target = [pair.target for pair in pairs if pair.target is not None]
    english = [pair.english for pair in pairs if pair.english is not None]
    if not target:
        raise UsageError("the analysis needs rows with a target-language prompt and completion")
    counted = ([*side.ids[slice(*side.query)].tolist(), *side.ids[side.answer :].tolist()] for side in target)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in counted]
    vocabulary, reason = english_looking_tokens(tokenizer, texts)
    device, pad_token_id = next(model.parameters()).device, tokenizer.pad_token_id or 0
    read = None
    if reading and english:
        read_through = lens or LogitLens(find_architecture(model))
        read = measure_reading(model, pairs, read_through, pad_token_id=pad_token_id, batch_size=batch_size)

    def profile(sides: Sequence[Side], done: int) -> LayerProfile:
        return profile_layers(
            model,
            _batches(sides, batch_size, device, pad_token_id),
            lens=lens,
            english_tokens=vocabulary,
            tokens_per_sequence=tokens_per_row,
            progress=lambda count: progress(done + count) if progress else None,
        )

    target_profile = profile(target, 0)
    english_profile = profile(english, len(target)) if english else None
    if read is None:
        selection = select_layers(target_profile.entropy, target_profile.entropy_stderr)
    else:
        selection = select_by_reading(read)
    return analysis_to_json(
        selection,
        target_profile,
        english_profile,
        model=model_name,
        language=language,
        english_tokens=reason,
        lens="logit" if lens is None else "tuned",
        reading=read,
    )


def num_sequences(pairs: Sequence[Pair]) -> int:
    """Return the number of sequences that `analyze_layers` reports as done at the end."""
    return sum((pair.target is not None) + (pair.english is not None) for pair in pairs)


def _batches(
    sides: Sequence[Side], batch_size: int, device: torch.device, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    """Pad sequences of similar length together; the means do not depend on the order."""
    collate, ordered = DeepSupervisionCollator(pad_token_id), sorted(sides, key=lambda side: len(side.ids))
    for start in range(0, len(ordered), batch_size):
        batch = collate([Example(main=side) for side in ordered[start : start + batch_size]])
        batch["token_mask"] = batch["query_mask"] | (batch["labels"] >= 0)
        yield {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "token_mask")}


# --- English-looking tokens ----------------------------------------------------------------------------------------


def english_looking_tokens(
    tokenizer: PreTrainedTokenizerBase, target_texts: Iterable[str]
) -> tuple[Tensor | None, str]:
    """Return a mask of English-looking tokens, or None for a target language in Latin script, and the reason.

    This works if most letters of the target language are not Latin. A token then looks English if its own decoded text
    has at least two ASCII letters and no other letter or part of one. Special and added tokens never do.

    Args:
        target_texts: sample of the target-language texts, to find their script.

    Returns:
        A boolean vector over the tokenizer's ids, or None, and the reason as a sentence.
    """
    letters = [character for text in target_texts for character in text if character.isalpha()]
    latin = {character for character in set(letters) if "LATIN" in unicodedata.name(character, "")}
    if not letters:
        return None, "the target texts have no letters, so English-looking tokens cannot be recognized"
    latin_share = sum(character in latin for character in letters) / len(letters)
    if latin_share >= 0.5:
        share = f"{latin_share:.0%} of the target language's letters are Latin"
        return None, f"{share}, so English-looking tokens cannot be recognized"
    looks_english, _ = token_letters(tokenizer)
    share = f"{1 - latin_share:.0%} of the target language's letters are not Latin"
    return looks_english, f"{share}; {int(looks_english.sum())} tokens of ASCII letters count as English-looking"


def token_letters(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return two boolean masks over the tokenizer's ids: tokens of ASCII letters, and tokens with other letters.

    The first have at least two ASCII letters and no other letter; the second have another letter, or a part of one.
    Special and added tokens are in neither.
    """
    vocabulary = tokenizer.get_vocab()
    ascii_letters, other_letters = torch.zeros(2, 1 + max(vocabulary.values()), dtype=torch.bool)
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    for token, index in vocabulary.items():
        if index in added:
            continue
        text = tokenizer.convert_tokens_to_string([token])
        foreign = any(not c.isascii() and (c == "\ufffd" or unicodedata.category(c)[0] in "LM") for c in text)
        other_letters[index] = foreign
        ascii_letters[index] = not foreign and sum(c.isascii() and c.isalpha() for c in text) >= 2
    return ascii_letters, other_letters
