"""How near a model's inner layers bring a sentence and its English translation.

For every layer k = 0..L: the share of sentences whose nearest neighbour among all sentences of the other language is their
own translation (retrieval accuracy, both directions), the same after each language's mean vector is taken off (what sets
languages apart as a whole says nothing of a sentence's meaning), and the mean cosine of translations, to be read beside the
mean cosine of sentences that are no translations: in many layers all sentences are near one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pivotune.errors import UsageError
from pivotune.evaluation.parallel import PARALLEL_SETS, Pair, ParallelText, read_parallel
from pivotune.evaluation.sources import MissingDataError, Source, missing
from pivotune.results.metrics import Metric
from pivotune.text.languages import find_language, language_name

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

METRICS = (
    Metric("retrieval_accuracy", "mean", ("retrieval",), scale=100.0),
    Metric("centered_retrieval_accuracy", "mean", ("centered_retrieval",), scale=100.0),
    Metric("cosine", "mean", ("cosine",)),
)
BENCHMARK = "alignment"
# Where no set is named: the first that is there.
_PREFERRED = ("flores", "ntrex", "tatoeba")


@dataclass(frozen=True, slots=True)
class AlignmentTask:
    """Alignment of a language and English, measured on one set of parallel text.

    Attributes:
        name: `alignment_flores_vi`, or `alignment_vi` for the first set that is there.
        language: code of the language beside English.
        read: gives the sentences; raises `UsageError` with one line.
        metrics: the first is the primary one; all are means over the layers 1..L.
    """

    name: str
    language: str
    read: Callable[[Source], ParallelText]
    metrics: Sequence[Metric] = METRICS

    @property
    def benchmark(self) -> str:
        return BENCHMARK


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """What was measured on N pairs. Lists by layer have L + 1 values, k = 0 (embeddings) .. L (before the final norm).

    Attributes:
        ids: the pairs' ids.
        retrieval: share of sentences whose nearest neighbour is their translation, mean of both directions, in 0..1;
            chance is 1/N.
        centered_retrieval: the same with each language's mean vector over the N sentences taken off.
        cosine: mean cosine of the pairs.
        cosine_of_non_pairs: mean cosine of sentences that do not belong together.
        item_retrieval: each pair's retrieval, mean over the layers 1..L.
        item_centered_retrieval: each pair's centered retrieval, mean over the layers 1..L.
        item_cosine: each pair's cosine, mean over the layers 1..L.
        truncated: sentences that were cut to the longest allowed.
    """

    ids: Sequence[str]
    retrieval: Sequence[float]
    centered_retrieval: Sequence[float]
    cosine: Sequence[float]
    cosine_of_non_pairs: Sequence[float]
    item_retrieval: Sequence[float]
    item_centered_retrieval: Sequence[float]
    item_cosine: Sequence[float]
    truncated: int

    def records(self) -> list[dict[str, Any]]:
        """One record a pair, with the fields that `METRICS` refer to."""
        names = ("item", "retrieval", "centered_retrieval", "cosine")
        columns = (self.ids, self.item_retrieval, self.item_centered_retrieval, self.item_cosine)
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    def by_layer(self) -> dict[str, Any]:
        """For `results.json`: lists over k = 0..L, retrieval in percent as the metric; and `chance`, `truncated`."""
        return {
            "retrieval_accuracy": [100 * value for value in self.retrieval],
            "centered_retrieval_accuracy": [100 * value for value in self.centered_retrieval],
            "cosine": list(self.cosine),
            "cosine_of_non_pairs": list(self.cosine_of_non_pairs),
            "chance": 100 / len(self.ids),
            "truncated": self.truncated,
        }


def measure_alignment(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    max_tokens: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Alignment:
    """Retrieval accuracy and cosine of translations, for every layer.

    A sentence is the mean of the raw hidden states (fp32) of its tokens but the first (see `pooled_states`), read without a
    template, with the begin-of-text token where the tokenizer adds one. Each different sentence is run once, so sentences
    that stand twice tie exactly. Cosines are computed in float64.

    Args:
        model: a supported causal LM, wrapped or not.
        pairs: at least two.
        batch_size: sentences at once.
        max_tokens: longer sentences are cut; they are counted in `truncated`.
        progress: called with the number of sentences done so far, two per pair.

    Raises:
        UsageError: unknown architecture, or fewer than two pairs.
    """
    from pivotune.evaluation.sentence_retrieval import pooled_states, tokenize

    if len(pairs) < 2:
        raise UsageError(f"alignment: needs at least 2 sentence pairs, found {len(pairs)}")
    sentences = list(dict.fromkeys(text for pair in pairs for text in (pair.target, pair.english)))
    token_ids, truncated = tokenize(tokenizer, sentences, max_tokens)
    pooled = pooled_states(model, token_ids, batch_size=batch_size, progress=progress)
    if progress is not None:
        progress(2 * len(pairs))
    place = {text: index for index, text in enumerate(sentences)}
    target = [place[pair.target] for pair in pairs]
    english = [place[pair.english] for pair in pairs]
    return _compare(pooled, target, english, [pair.id for pair in pairs], truncated, next(model.parameters()).device)


def _compare(
    pooled: Tensor, target: list[int], english: list[int], ids: Sequence[str], truncated: int, device: Any
) -> Alignment:
    import torch

    from pivotune.evaluation.sentence_retrieval import both_ways, mean_of_non_pairs, unit_vectors, without_mean

    device = device if device.type == "cuda" else torch.device("cpu")  # others have no float64
    layers, non_pairs = [], []
    for states in pooled.unbind(1):
        sides = [states[side].to(device).double() for side in (target, english)]
        a, b = map(unit_vectors, sides)
        centered = both_ways(*(unit_vectors(without_mean(side)) for side in sides))
        layers.append(torch.stack([both_ways(a, b), centered, (a * b).sum(-1)]).cpu())
        non_pairs.append(mean_of_non_pairs(a, b))
    figures = torch.stack(layers)  # (L + 1, 3, N)
    retrieval, centered_retrieval, cosine = figures.mean(2).T.tolist()
    item_retrieval, item_centered_retrieval, item_cosine = figures[1:].mean(0).tolist()
    return Alignment(
        ids=tuple(ids),
        retrieval=retrieval,
        centered_retrieval=centered_retrieval,
        cosine=cosine,
        cosine_of_non_pairs=non_pairs,
        item_retrieval=item_retrieval,
        item_centered_retrieval=item_centered_retrieval,
        item_cosine=item_cosine,
        truncated=truncated,
    )


def alignment_tasks(set_name: str | None, language: str) -> list[AlignmentTask]:
    """The task of a language on one set, or on the first set that is there.

    Args:
        set_name: `flores`, `ntrex`, `tatoeba`, `pairs`, or None: the user's own pairs where given, else the first published
            set in the source's folder (FLORES from the Hub).
        language: any code of `find_language`.

    Raises:
        UsageError: the language is unknown, or English.
    """
    code = find_language(language).code
    if code == "en":
        raise UsageError("alignment_en: English is one side already; name the other language: alignment_vi")
    name = "_".join(part for part in (BENCHMARK, set_name, code) if part)
    return [AlignmentTask(name, code, partial(_read, set_name, name, code))]


def _read(set_name: str | None, task: str, code: str, source: Source) -> ParallelText:
    if set_name is not None or source.pairs:
        return read_parallel(set_name or "pairs", task, source, code)
    if source.data_dir is None:
        return read_parallel(_PREFERRED[0], task, source, code)
    for name in _PREFERRED:
        try:
            return read_parallel(name, task, source, code)
        except MissingDataError:
            continue
    titles = ", ".join(PARALLEL_SETS[name].title for name in _PREFERRED)
    wanted = f"parallel text in {language_name(code)} ({titles})"
    raise missing(task, source, wanted, PARALLEL_SETS[_PREFERRED[0]].homepage)
