"""Translation from and into English: FLORES-200, NTREX-128, Tatoeba and the user's own pairs, by chrF++ and BLEU.

FLORES-200 (NLLB team 2022), devtest as usual; the paper measures COMET (`pivotune.evaluation.metrics.comet`). NTREX-128
(Federmann et al. 2022); Tatoeba (Artetxe and Schwenk 2019).
"""

from __future__ import annotations

from functools import partial

from pivotune.errors import UsageError
from pivotune.evaluation.parallel import FLORES_200, NTREX_128, OWN_PAIRS, TATOEBA_SET, Pair, ParallelSet, read_parallel
from pivotune.evaluation.sources import Source
from pivotune.evaluation.tasks.base import Benchmark, Item, Task, TaskData
from pivotune.results.corpus_metrics import (
    bleu_statistics,
    check_sacrebleu,
    chrf_from_statistics,
    chrf_statistics,
)
from pivotune.results.metrics import Metric
from pivotune.text.languages import find_language, language_name

METRICS = (Metric("chrf++", "chrf", ("chrf_stats",)), Metric("bleu", "bleu", ("bleu_stats",)))
ENGLISH = "en"
# A sentence of FLORES has 40 tokens in English and up to five times that in a script the tokenizer does not know.
_MAX_NEW_TOKENS = 256


def translation_tasks(parallel: ParallelSet, language: str) -> list[Task]:
    """Both directions: English into the language, then the language into English.

    Raises:
        UsageError: the language is unknown, or English itself.
    """
    code = find_language(language).code
    if code == ENGLISH:
        raise UsageError(
            f"{parallel.name}_en: English is one side already; name the other language: {parallel.name}_vi"
        )
    return [_task(parallel, code, ENGLISH, code), _task(parallel, code, code, ENGLISH)]


def _task(parallel: ParallelSet, language: str, source: str, target: str) -> Task:
    name = f"{parallel.name}_{source}-{target}"
    return Task(
        name=name,
        benchmark=parallel.name,
        language=language,
        kind="translation",
        metrics=METRICS,
        read=partial(_read, parallel.name, name, language, target == ENGLISH),
        answer_language=target,
        score=partial(score_translation, target),
        max_new_tokens=_MAX_NEW_TOKENS,
    )


def _read(set_name: str, task: str, language: str, into_english: bool, source: Source) -> TaskData:
    check_sacrebleu(task)
    text = read_parallel(set_name, task, source, language)
    items = [_item(pair, language, into_english) for pair in text.pairs]
    return TaskData(items, text.split, text.origin, text.left_out)


def _item(pair: Pair, language: str, into_english: bool) -> Item:
    sentence, reference = (pair.target, pair.english) if into_english else (pair.english, pair.target)
    codes = (language, ENGLISH) if into_english else (ENGLISH, language)
    source, target = map(language_name, codes)
    instruction = f"Translate the following sentence from {source} into {target}.\n"
    return Item(
        id=pair.id,
        query=f"{instruction}{sentence}",
        references=(reference,),
        delimiter="\n",
        cuttable=(len(instruction), len(instruction) + len(sentence)),
        details={"source": sentence},
    )


def score_translation(language: str, hypothesis: str, item: Item) -> dict[str, float | list[int]]:
    """The item's numbers: counts for corpus chrF++ and BLEU (`corpus_metrics`), and its own chrF++ in 0..100.

    Args:
        language: of the translation.
    """
    hypothesis, reference = hypothesis.strip(), item.references[0]
    counts = chrf_statistics(hypothesis, reference)
    return {
        "chrf_stats": counts,
        "bleu_stats": bleu_statistics(hypothesis, reference, language),
        "chrf": float(chrf_from_statistics(counts)),
    }


def _benchmark(parallel: ParallelSet) -> Benchmark:
    return Benchmark(
        name=parallel.name,
        title=parallel.title,
        languages=parallel.languages,
        tasks=partial(translation_tasks, parallel),
        homepage=parallel.homepage,
        # Its file names are made from the language's codes, so any language's files can be read.
        open_ended=True,
    )


FLORES = _benchmark(FLORES_200)
NTREX = _benchmark(NTREX_128)
TATOEBA = _benchmark(TATOEBA_SET)
PAIRS = _benchmark(OWN_PAIRS)
