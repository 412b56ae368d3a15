from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

import pivotune.methods.word_alignment as alignment
from pivotune.data.lazy import Mapped
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError
from pivotune.methods.word_alignment import align_words, read_dictionary
from pivotune.text.words import WORD


def a_row(english: str, target: str) -> SimpleNamespace:
    return SimpleNamespace(prompt_en=english, prompt=target)


def corpus(count: int, *, words: int = 30) -> list[SimpleNamespace]:
    """Sentences of English words `ea`..., translated word by word (`ea` -> `ta`), in another order, some words left out."""
    random = np.random.default_rng(0)
    names = [chr(97 + place // 26) + chr(97 + place % 26) for place in range(words)]
    rows = []
    for _ in range(count):
        chosen = random.choice(names, size=random.integers(2, 9), p=np.arange(words, 0, -1) / sum(range(words + 1)))
        target = [f"t{name}" for name in random.permutation(chosen) if random.random() < 0.9] or ["tq"]
        rows.append(a_row(" ".join(f"e{name}" for name in chosen), " ".join(target)))
    return rows


def naive_probabilities(texts: list[tuple[list[str], list[str]]]) -> tuple[dict, dict]:
    """t(f|e) and expected counts of IBM Model 1 as in the textbook, in dictionaries."""
    probability = defaultdict(lambda: 1.0)
    for _ in range(5):
        counts, totals = defaultdict(float), defaultdict(float)
        for given, words in texts:
            for word in words:
                whole = sum(probability[word, other] for other in given)
                for other in given:
                    counts[word, other] += probability[word, other] / whole
                    totals[other] += probability[word, other] / whole
        probability = defaultdict(float, {pair: count / totals[pair[1]] for pair, count in counts.items()})
    return probability, counts


def test_counterparts_are_those_of_the_textbook():
    rows = corpus(120)
    texts = [(WORD.findall(row.prompt_en), WORD.findall(row.prompt)) for row in rows]
    forward, counts = naive_probabilities(texts)
    backward, _ = naive_probabilities([(target, english) for english, target in texts])
    best_target, best_english = defaultdict(float), defaultdict(float)
    for target, english in forward:
        best_target[english] = max(best_target[english], forward[target, english])
        best_english[target] = max(best_english[target], backward[english, target])
    expected = {
        english: target
        for target, english in forward
        if counts[target, english] >= 3
        and forward[target, english] == pytest.approx(best_target[english], rel=1e-12)
        and backward[english, target] == pytest.approx(best_english[target], rel=1e-12)
        and min(forward[target, english], backward[english, target]) >= 0.3
    }
    found = align_words(rows)
    assert found.to_target == expected
    assert found.to_english == {target: english for english, target in expected.items()}
    assert {english: f"t{english[1:]}" for english in expected} == expected
    assert len(expected) >= 20


def test_a_long_file_is_sampled_and_long_prompts_are_cut(monkeypatch):
    monkeypatch.setattr(alignment, "_ROWS", 100)
    monkeypatch.setattr(alignment, "_WORDS", 4)
    read = []
    rows = Mapped(corpus(250), lambda place, row: read.append(place) or row)
    found = align_words(rows)
    assert read == list(range(0, 250, 3))
    first = [a_row(*(" ".join(text.split()[:4]) for text in (row.prompt_en, row.prompt))) for row in corpus(250)[::3]]
    assert found == align_words(first)


def test_real_rows(shared_data):
    rows = load_rows(shared_data / "train" / "vi.jsonl.gz", limit=1000)
    found = align_words(rows)
    assert {"water": "nước", "three": "ba", "movie": "phim", "is": "là"}.items() <= found.to_target.items()
    assert found.to_english["nước"] == "water"
    assert len(found.to_target) > 100
    with pytest.raises(UsageError, match=r"words of a script without spaces cannot be aligned; set sdrrl\.code_swi"):
        align_words(load_rows(shared_data / "train" / "zh.jsonl.gz", limit=50))


@pytest.mark.parametrize("texts", [("a b", "a b"), ("one two", "moja mbili"), ("1", "2")])
def test_rows_without_counterparts_are_refused(texts):
    """The same word on both sides, words that are seen together too rarely to be told apart, and no words."""
    with pytest.raises(UsageError, match="the prompts of 2 rows give no pair of words; set"):
        align_words([a_row(*texts)] * 2)


def test_a_dictionary(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_bytes("\ufeffCat\tpaka\r\ndog\tmbwa\ncat\tPaka shume\npuppy\tmbwa\n".encode())
    found = read_dictionary(path)
    assert found.to_target == {"cat": "paka", "dog": "mbwa", "puppy": "mbwa"}
    assert found.to_english == {"paka": "Cat", "mbwa": "dog", "paka shume": "cat"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"cat\tpaka\ndog mbwa\n", r"words\.tsv, line 2: 'dog mbwa' found; allowed: English word, TAB, word"),
     (b"cat\tpaka\n\ndog\tmbwa\n", r"line 2: '' found"), (b"cat\t \n", "line 1: 'cat' found"),
     (b"a\tb\tc\n", "line 1"), (b"", "holds no line"), (b"cat\t\xff\n", "cannot be read: 'utf-8' codec"),
     (None, r"sdrrl\.code_switching\.dictionary: .*words\.tsv: cannot be read: No such file")],
)  # fmt: skip
def test_a_broken_dictionary_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "words.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_dictionary(path)
