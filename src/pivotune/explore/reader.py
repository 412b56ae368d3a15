"""Read a prompt and its answer through the lenses of one or two models; the result is JSON values that the page draws."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from torch import Tensor

from pivotune.config.supervision import TunedLensConfig
from pivotune.data.examples import Encoder, EncodingReport, Pair, Side
from pivotune.data.rows import Row
from pivotune.data.templates import Rendered, Turn
from pivotune.errors import UsageError
from pivotune.explore.grid import lens_grids, lens_states
from pivotune.explore.pieces import Pieces
from pivotune.layers.measure import token_letters
from pivotune.lenses.tuned import LEAST_STATES, TunedLens, count_states, lens_texts
from pivotune.models.architecture import find_architecture
from pivotune.report.page import shown
from pivotune.training.heldout import end_token_ids, generate_answers
from pivotune.training.kept_arrays import map_arrays
from pivotune.training.lens_fitting import LENS_FILE, fit_all_layers
from pivotune.training.preparation import context_length
from pivotune.training.progress import Progress, silent

# A label of a prompt in the page's list.
_LABEL = 60


class PlainText:
    """No template: prompt and answer as they are."""

    name = "none"
    adds_special_tokens = False

    def render(self, turn: Turn) -> Rendered:
        return Rendered("", turn.user_text, "", turn.completion)


@dataclass(frozen=True)
class ReadModel:
    """A loaded model and the name that the page gives it."""

    name: str
    model: Any


@dataclass
class LensReader:
    """Reads texts through every lens of every model.

    Attributes:
        models: one, or two of the same shape, of which the page shows the difference too.
        encoder: template, tokenizer and limits for all of them.
        lens: a tuned lens for all of them; None reads through the logit lens alone.
        max_tokens: longer prompts lose their end.
        max_new_tokens: limit of an answer that is generated.
        on_lens: called after each lens of each text.
    """

    models: Sequence[ReadModel]
    encoder: Encoder
    lens: TunedLens | None = None
    max_tokens: int = 96
    max_new_tokens: int = 32
    on_lens: Callable[[], object] = field(default=lambda: None)

    def read(self, row: Row, *, answered_by: int = 0, source: str = "prompt") -> dict[str, Any]:
        """Return the grids of a row as JSON values: its text, and its English parallel where it has one.

        A row without answers gets the greedy ones of the model `answered_by`.

        Raises:
            UsageError: the prompt has no tokens, or leaves no room for an answer.
        """
        self.encoder.report, whole = EncodingReport(), row
        row = replace(row, prompt=self._cut(row.prompt), prompt_en=self._cut(row.prompt_en))
        sides = (row.prompt, row.completion), (row.prompt_en, row.completion_en)
        # The encoder takes whole rows.
        filled = [answer or ("-" if prompt else "") for prompt, answer in sides]
        [pair] = self.encoder.encode([replace(row, completion=filled[0], completion_en=filled[1])], source=source)
        read = []
        for name, side, (_, answer) in zip(("text", "English"), (pair.target, pair.english), sides, strict=True):
            if side is not None:
                answered = side if answer else self._answered(side, self.models[answered_by].model)
                read.append({"name": name, **self._side(answered)})
        notes = [] if source == "prompt" else [f"{source}, row {row.number}"]
        if (row.prompt, row.prompt_en) != (whole.prompt, whole.prompt_en):
            notes.append(f"the prompt is cut to {self.max_tokens} tokens")
        if self.encoder.report.cut["answers"]:
            notes.append(f"the answer is cut to {self.encoder.limits.completion} tokens")
        if not row.completion:
            notes.append(f"answer of {self.models[answered_by].name}")
        label = " ".join(row.prompt.split())
        return {
            "label": shown(label if len(label) <= _LABEL else f"{label[:_LABEL]}…"),
            "notes": [shown(note) for note in notes],
            "sides": read,
        }

    def _cut(self, text: str) -> str:
        offsets = self.encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return text if len(offsets) <= self.max_tokens else text[: offsets[self.max_tokens - 1][1]]

    def _answered(self, side: Side, model: Any) -> Side:
        """Return the side's prompt with the model's greedy answer."""
        prompt, tokenizer = side.ids[: side.answer], self.encoder.tokenizer
        context = context_length(model.config)
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(prompt))
        if room < 1:
            raise UsageError(f"the prompt takes {len(prompt)} tokens and the model reads {context}")
        template = None if isinstance(self.encoder.template, PlainText) else self.encoder.template
        ends = end_token_ids(model, tokenizer, template)
        options: Any = {"end_ids": ends, "max_new_tokens": room, "batch_size": 1}
        [answer] = generate_answers(model, tokenizer, [prompt], **options)
        return replace(side, ids=np.array([*prompt, *answer.ids], dtype=np.int32))

    def _side(self, side: Side) -> dict[str, Any]:
        """Return the grids of one text; the template's words before the query are read and not shown."""
        start, ids = side.query[0], side.ids.tolist()
        columns, place = [], start
        for column in self._pieces.columns(ids[start:]):
            role = "query" if place < side.query[1] else "template" if place < side.answer else "answer"
            columns.append([column.text, column.span, role])
            place += column.span
        pending = self._pieces.pending(ids)[start:]
        texts: dict[str, int] = {}
        lenses: dict[str, TunedLens | None] = {"logit": None, **({"tuned": self.lens} if self.lens else {})}
        models = [each.model for each in self.models]
        grids: list[dict[str, Any]] = [{} for _ in models]
        differences = {}
        for name, lens in lenses.items():
            read = [(find_architecture(model), lens_states(model, ids, lens, start)) for model in models]
            found, change = lens_grids(read, self._letters)
            for one, grid in zip(found, grids, strict=True):
                likeliest = [
                    [texts.setdefault(self._pieces.formed(before, token), len(texts)) for token in top]
                    for layer in one.tokens.tolist()
                    for before, top in zip(pending, layer, strict=True)
                ]
                numbers = ("probabilities", "entropy", "output", "letters")
                grid[name] = {"likeliest": likeliest} | {key: _rounded(getattr(one, key)) for key in numbers}
            if change:
                differences[name] = {"kl": _rounded(change.kl), "change": _rounded(change.change)}
            self.on_lens()
        query, answer = slice(*side.query), slice(side.answer, len(ids))
        decoded = [self.encoder.tokenizer.decode(ids[part], skip_special_tokens=True) for part in (query, answer)]
        return {
            "prompt": shown(decoded[0]),
            "answer": shown(decoded[1]),
            "hidden": start,
            "rtl": _is_right_to_left(decoded[0]),
            "columns": columns,
            "positions": len(ids) - start,
            "texts": list(texts),
            "grids": grids,
            "differences": differences,
        }

    @cached_property
    def _pieces(self) -> Pieces:
        return Pieces(self.encoder.tokenizer)

    @cached_property
    def _letters(self) -> tuple[Tensor, Tensor]:
        return token_letters(self.encoder.tokenizer)


def find_lens(
    read: ReadModel, folder: Path, pairs: Sequence[Pair], source: str, progress: Progress = silent
) -> tuple[TunedLens | None, str]:
    """Return a tuned lens with a map for every layer, or None, and a sentence about it for the page.

    Args:
        folder: of the run, whose `lens.safetensors` is used if it has all the layers.
        pairs: rows to fit a lens on otherwise.
        source: their name.
    """
    architecture, path = find_architecture(read.model), folder / LENS_FILE
    if path.is_file():
        lens = TunedLens(architecture)
        try:
            lens.set_arrays(map_arrays(path))
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            reason = f"not a readable lens ({type(error).__name__})"
            raise UsageError(f"{path}: {reason}; leave it out with --lens logit") from error
        if set(lens.maps) >= set(range(architecture.num_layers)):
            return lens, f"The tuned lens is that of {path}, fitted on the starting model of the run."
    config = TunedLensConfig(text="both")
    states, width = count_states(lens_texts(pairs, config.text)), architecture.head_weight.shape[1]
    # With fewer states than its width a map can repeat them all.
    needed = max(LEAST_STATES, width)
    if states < needed:
        has = f"{source} has {states} token states beside the texts shown, and {needed} are needed"
        few = has if source else "no rows"
        return None, f"Logit lens only: {few} to fit a tuned one on. Middle layers are hard to read through it."
    lens = fit_all_layers(read.model, pairs, config, progress)
    return lens, f"The tuned lens was fitted on {read.name} with {len(pairs)} rows of {source}, by regression alone."


def _rounded(values: Tensor) -> list[float]:
    """Return three significant digits, which are more than colours show."""
    return [float(f"{value:.3g}") for value in values.flatten().tolist()]


def _is_right_to_left(text: str) -> bool:
    strong = (unicodedata.bidirectional(character) for character in text)
    return next((kind in ("R", "AL") for kind in strong if kind in ("L", "R", "AL")), False)
