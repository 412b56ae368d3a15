"""Quality filters with a second model: chrF++ of the back-translation, or similarity of sentence embeddings.

Scores are kept in a file beside the rows, by model and by the texts of the row, so that a row is scored once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pivotune.data.check import DataCheck
from pivotune.data.check.result import Finding, Problem
from pivotune.data.formats import row_name
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.data.templates import Turn
from pivotune.errors import UsageError
from pivotune.models.locating import locate, one_line_errors
from pivotune.translate.batches import rows_per_step, run_in_batches
from pivotune.translate.segments import translate_texts
from pivotune.translate.steps import append_records
from pivotune.translate.translators import Translator

Scorer = Callable[[Sequence[Row]], Sequence[float]]

# Texts of fewer characters have no chrF++ of their own: "Yes." against "Yeah." has 23.
CHRF_CHARACTERS = 40
# Tokens of a text for an encoder; longer ones are cut.
_LONGEST_TEXT = 512


@dataclass
class RowFilter:
    """Scores of rows by a model, and the least score of a row that is kept.

    Attributes:
        name: of the scores, in reports.
        load: loads the model; returns the scorer and the number of rows between two writes.
        scores: one for each row, after `score`.
    """

    name: str
    title: str
    model: str
    minimum: float
    load: Callable[[], tuple[Scorer, int]]
    scores: Sequence[float] = ()

    def score(self, path: Path, rows: Sequence[Row], progress: Callable[[int], None]) -> None:
        """Score the rows that have no score in the file `path` yet, and append their scores step by step."""
        known = _read_scores(path, self.name, self.model)
        keys = [_key(row) for row in rows]
        missing = [place for place, key in enumerate(keys) if key not in known]
        progress(len(rows) - len(missing))
        if missing:
            scorer, step = self.load()
            with path.open("ab") as file:
                file.write(b"\n")  # a line that was cut off by a kill stays alone
                for start in range(0, len(missing), step):
                    part = missing[start : start + step]
                    found = dict(
                        zip((keys[place] for place in part), scorer([rows[place] for place in part]), strict=True)
                    )
                    records = [
                        {"name": self.name, "model": self.model, "row": key, "score": found[key]} for key in found
                    ]
                    append_records(file, records)
                    known |= found
                    progress(len(rows) - len(missing) + start + len(part))
        self.scores = [known[key] for key in keys]

    def low(self) -> list[int]:
        """Return the places of the rows to leave out."""
        return [place for place, score in enumerate(self.scores) if not score >= self.minimum]

    def flag(self, found: DataCheck, rows: Rows, examples: int) -> DataCheck:
        """Add the rows to leave out, the lowest as examples, and a note on all scores."""
        low = self.low()
        numbers = [row_name(rows[place].number, rows.sources) for place in low]
        lowest = sorted(zip(low, numbers, strict=True), key=lambda entry: self.scores[entry[0]])[:examples]
        shown = [Finding(number, f"{self.scores[place]:.3g}", rows[place]) for place, number in lowest]
        title = f"{self.title} below {self.minimum:g}"
        problem = Problem(self.name, title, numbers, True, "translate again, or lower the limit", shown)
        problems = [problem, *found.problems] if low else found.problems
        flagged = {number for each in problems if each.defect for number in each.numbers}
        median, fifth = np.percentile(self.scores, [50, 5])
        note = f"{self.title}: median {median:.3g}, 5 % of the rows below {fifth:.3g} ({self.model})"
        return replace(found, problems=problems, flagged=len(flagged), notes=[*found.notes, note])


def _key(row: Row) -> str:
    return hashlib.sha256(json.dumps([_texts(turn) for turn in row.sides]).encode()).hexdigest()[:24]


def _texts(turn: Turn) -> list[str]:
    return [turn.user_text, turn.completion, *(message["content"] for message in turn.history)]


def _read_scores(path: Path, name: str, model: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            if (record["name"], record["model"]) == (name, model):
                scores[record["row"]] = float(record["score"])
        except (ValueError, TypeError, LookupError):
            continue  # cut off by a kill
    return scores


def back_translation_filter(model: str, prepared: Callable[[], Translator], minimum: float) -> RowFilter:
    """Return the filter by chrF++ (0 to 100) between the English texts and the translations, translated back.

    Args:
        prepared: loads the translator into English.

    Raises:
        UsageError: sacrebleu is not installed.
    """
    if find_spec("sacrebleu") is None:
        raise UsageError("--back-translation: chrF++ needs sacrebleu: pip install 'pivotune[eval]'")

    def load() -> tuple[Scorer, int]:
        translator = prepared()

        def score(rows: Sequence[Row]) -> list[float]:
            sides = [tuple(map(_texts, row.sides)) for row in rows]
            back = iter(translate_texts((text for target, _ in sides for text in target), translator, {}))
            return [back_translation_score([next(back) for _ in target], english) for target, english in sides]

        return score, translator.rows_per_step

    return RowFilter("back_translation", "chrF++ of the back-translation", model, minimum, load)


def back_translation_score(back: Sequence[str], english: Sequence[str]) -> float:
    """Return chrF++ of a row's texts together, or the lowest of its longer texts."""
    from pivotune.results.corpus_metrics import chrf_from_statistics, chrf_statistics

    counts = np.array([chrf_statistics(one, other) for one, other in zip(back, english, strict=True)])
    own = [count for count, text in zip(counts, english, strict=True) if len(text) >= CHRF_CHARACTERS]
    return round(float(chrf_from_statistics([counts.sum(axis=0), *own]).min()), 2)


def similarity_filter(model: str, minimum: float) -> RowFilter:
    """Return the filter by the cosine between embeddings of a row's texts and of their English, the lowest of the row.

    An embedding is the mean of the encoder's last hidden states over the tokens of a text.

    Raises:
        UsageError: as `locate`; a model that is no encoder.
    """
    files = locate(model, None)
    from transformers import AutoConfig, AutoTokenizer

    with one_line_errors(model, "tokenizer"):
        config = AutoConfig.from_pretrained(files.location, **files.arguments)
        tokenizer = AutoTokenizer.from_pretrained(files.location, **files.arguments)
    if config.is_encoder_decoder or any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        raise UsageError(f"--similarity: {model} is no encoder; allowed: one such as intfloat/multilingual-e5-base")

    def load() -> tuple[Scorer, int]:
        encoder = _load_encoder(model, files.location, files.arguments)

        def score(rows: Sequence[Row]) -> list[float]:
            sides = [list(map(_texts, row.sides)) for row in rows]
            texts = dict.fromkeys(text for row in sides for side in row for text in side)
            vectors = dict(zip(texts, embed(encoder, tokenizer, list(texts)), strict=True))
            cosines = [[float(vectors[one] @ vectors[two]) for one, two in zip(*row, strict=True)] for row in sides]
            return [round(min(row), 4) for row in cosines]

        return score, rows_per_step(encoder.device.type)

    return RowFilter("similarity", "similarity of the embeddings", model, minimum, load)


def embed(encoder: Any, tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Return unit vectors, float32 (width,): the mean of the last hidden states over the tokens of each text."""
    import torch

    def run(batch: Sequence[str]) -> list[np.ndarray]:
        limit = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", _LONGEST_TEXT))
        options = {"padding": True, "truncation": True, "max_length": min(limit, _LONGEST_TEXT)}
        inputs = tokenizer(list(batch), return_tensors="pt", **options).to(encoder.device)
        mask = inputs["attention_mask"]
        with torch.inference_mode():
            states = encoder(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state.float()
        sums = (states * mask.unsqueeze(-1)).sum(dim=1)
        return list(torch.nn.functional.normalize(sums, dim=-1).cpu().numpy())

    return run_in_batches(texts, run, encoder.device.type)


def _load_encoder(name: str, location: str, arguments: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModel

    on_gpu = torch.cuda.is_available()
    options = {"use_safetensors": True, "output_loading_info": True, "dtype": "bfloat16" if on_gpu else "float32"}
    with one_line_errors(name, "model"):
        model, report = AutoModel.from_pretrained(location, **options, **arguments)
    # The pooler is not read, and masked language models have none.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise UsageError(f"{name}: {len(missing)} weights are not in the files, first {missing[0]}")
    return model.to("cuda") if on_gpu else model
