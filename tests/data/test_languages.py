"""Languages of the rows: which a row has, how often each is seen in an epoch, and which rows are held out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from conftest import tiny_rows

from pivotune.config.settings import EncodingConfig
from pivotune.data.datasets import balanced_places, shared_out, split_validation
from pivotune.data.languages import RowLanguages, assign_languages
from pivotune.data.sources import Rows, load_rows
from pivotune.errors import UsageError


def rows(*languages: Any) -> Rows:
    return load_rows(
        [
            row if language is None else {**row, "language": language}
            for row, language in zip(tiny_rows(len(languages)), languages, strict=True)
        ]
    )


def assign(*parts: Rows, sources: Any = (None,), **data: Any) -> RowLanguages:
    return assign_languages(parts, sources, EncodingConfig(**data))


def of_rows(found: RowLanguages) -> list[list[str]]:
    return [[row.language for row in part] for part in found.parts]


def test_a_row_has_its_own_language_else_its_sources_else_that_of_the_run():
    parts = rows("fr", None, "de"), rows(None, "fr")
    found = assign(*parts, sources=[None, "sw"], language="de")
    assert of_rows(found) == [["de" if each is None else each for each in ("fr", None, "de")], ["sw", "fr"]]
    assert [codes.tolist() for codes in found.codes] == of_rows(found)
    assert found.language == ["de", "fr", "sw"], "the run's own first, then as they come"
    assert found.notes == []
    # What a run folder holds is read as the same.
    again = assign(*parts, sources=[None, "sw"], language=found.language)
    assert (of_rows(again), again.language) == (of_rows(found), found.language)


@pytest.mark.parametrize(
    ("given", "data", "language", "note"),
    [
        ([None, None], {}, None, None),
        ([None, None], {"language": "sw"}, "sw", None),
        (["sw", "sw"], {"language": "sw"}, "sw", None),
        (["sw", None], {"language": "sw"}, "sw", None),
        (["sw", "sw"], {}, ["sw"], None),
        (["sw", None], {}, None, "row 2: names no language"),
        (["pt", "pt"], {"language": "pt_BR"}, "pt_BR", "every row names pt, and data.language is pt_BR"),
        (["python", "python"], {"language": "sw"}, "sw", "every row names python, and data.language is sw"),
        (["python", "r"], {"language": "sw"}, "sw", "row 1: language 'python' is unknown"),
        (["sw", "sql"], {"language": "sw"}, "sw", "row 2: language 'sql' is unknown"),
        (["sw", "Vietnamese"], {"language": "sw"}, "sw", "row 2: language 'Vietnamese' is unknown; Vietnamese is vi"),
        (["sw", ["vi"]], {"language": "sw"}, "sw", "row 2: language 'a list' is unknown"),
        (["en", "vi"], {"language": "sw"}, "sw", "row 1: language: en is English"),
    ],
)
def test_runs_with_one_language_keep_its_name_and_other_columns_are_told(given, data, language, note):
    found = assign(rows(*given), **data)
    assert of_rows(found) == [["", ""]], "nothing that a row's digest could see"
    assert (found.language, found.codes) == (language, [])
    assert [note in line for line in found.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("given", "data", "message"),
    [
        (
            ["sw", "python"],
            {"language": ["sw", "vi"]},
            "the given rows, row 2: language: 'python' is not a language code",
        ),
        (
            ["sw", "fr"],
            {"language": ["sw", "vi"]},
            "the given rows, row 2: language: fr found; allowed: sw, vi (data.l",
        ),
        (
            ["sw", None],
            {"language_temperature": 2},
            "the given rows, row 2: names no language; give it a key `language`",
        ),
        (["sw", "en"], {"language_temperature": 2}, "the given rows, row 2: language: en is English"),
        (["sw", "sw"], {"language": ["sw", "vi"]}, "data.language: no row to train on is in vi"),
        (["sw", "sw"], {"language_temperature": 2}, "data.language_temperature: 2 balances several languages"),
    ],
)
def test_where_several_languages_are_asked_for_every_row_has_one_of_them(given, data, message):
    with pytest.raises(UsageError) as raised:
        assign(rows(*given), **data)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_held_out_rows_need_not_have_all_languages():
    found = assign(rows("sw", "vi"), rows("vi", "vi"), language=["sw", "vi"], language_temperature=2)
    assert of_rows(found) == [["sw", "vi"], ["vi", "vi"]]
    with pytest.raises(UsageError, match="row 1: names no language"):
        assign(rows("sw", "vi"), rows(None), language_temperature=2)
    same = assign(rows(None), rows(None), rows(None), sources=["sw", "sw"])
    assert (of_rows(same), same.language) == ([[""], [""], [""]], ["sw"])


# ---- shares ----


def test_the_share_of_a_language_follows_its_rows_to_the_power_of_one_over_the_temperature():
    languages = np.array(["vi"] * 900 + ["zh"] * 100 + ["sw"] * 9, dtype=object)
    for temperature in (1, 1.5, 2, 5, 1000):
        places = balanced_places(languages, temperature, 0)
        counts = {code: len(found) for code, found in places.items()}
        powers = np.array([900, 100, 9]) ** (1 / temperature)
        assert sum(counts.values()) == 1009, "the number of rows of an epoch stays the same"
        assert list(counts.values()) == pytest.approx(1009 * powers / powers.sum(), abs=1)
        for code, found in places.items():
            assert {languages[place] for place in found} == {code}
            copies = Counter(found.tolist()).values()
            whole = len(found) // sum(languages == code)
            assert {whole, whole + 1} >= set(copies)
            assert len(copies) == min(len(found), sum(languages == code)), "a row twice only where all are taken"
    counts = {code: len(found) for code, found in balanced_places(languages, 2, 0).items()}
    assert counts == {"vi": 704, "zh": 235, "sw": 70}, "30 : 10 : 3"


def test_the_draw_depends_on_the_seed_alone():
    languages = np.array(["vi", "vi", "zh", "vi"] * 50, dtype=object)
    first, again, other = (balanced_places(languages, 3, seed) for seed in (0, 0, 1))
    assert first["vi"].tolist() == again["vi"].tolist() != other["vi"].tolist()
    assert balanced_places(languages, 1, 0)["zh"].tolist() == list(range(2, 200, 4)), "every row once"


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [(10, [90, 10], [9, 1]), (10, [97, 2, 1], [8, 1, 1]), (2, [97, 2, 1], [2, 0, 0]), (0, [3, 2], [0, 0]),
     (7, [1, 1, 1], [3, 2, 2])],
)  # fmt: skip
def test_shares_are_whole_rows(total, sizes, expected):
    assert shared_out(total, sizes).tolist() == expected


def test_every_language_has_held_out_rows_in_proportion():
    languages = np.array((["vi"] * 8 + ["zh"]) * 20 + ["sw"], dtype=object)
    train, held = split_validation(range(181), 18, 0, languages)
    assert Counter(languages[held.indices]) == {"vi": 15, "zh": 2}, "sw keeps its only row for training"
    assert sorted([*train, *held]) == list(range(181))
    assert list(held) == list(split_validation(range(181), 18, 0, languages)[1]) == sorted(held)
    assert list(held) != list(split_validation(range(181), 18, 1, languages)[1])
