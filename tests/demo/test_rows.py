"""The demo's rows: real facts, the same on both sides, split by entity, the same on every machine."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import string
import subprocess
import sys
from collections import Counter
from importlib import resources

import pytest

pytest.importorskip("babel", reason="the demo's facts come from Babel (the extra 'demo')")

from babel import Locale

from pivotune.demo import rows as demo
from pivotune.demo.cldr import BilingualLocale, clean_text
from pivotune.demo.facts import collect_facts
from pivotune.demo.rows import (
    SUPPORTED_LANGUAGES,
    DemoData,
    build_demo_rows,
    load_wording,
    worded_facts,
    worded_rows,
    write_demo_rows,
)
from pivotune.errors import UsageError

FIELDS = {"id", "prompt", "completion", "prompt_en", "completion_en", "entity", "kind"}

# (kind, entity) -> the answer in the language, checked by hand.
GOLDEN = {
    "vi": {
        ("territory_name", "territory:JP"): "Nhật Bản",
        ("territory_currency", "territory:JP"): "Yên Nhật",
        ("language_name", "language:fr"): "Tiếng Pháp",
        ("month_quarter", "month:5"): "Quý 2",
    },
    "zh": {
        ("territory_name", "territory:DE"): "德国",
        ("currency_name", "currency:JPY"): "日元",
        ("translation", "weekday:2"): "中文叫“星期三”。",
        ("script_name", "script:Cyrl"): "西里尔文",
    },
    "ar": {
        ("translation", "month:3"): "الاسم بالعربية هو «مارس».",
        ("territory_name", "territory:EG"): "مصر",
        ("language_name", "language:en"): "الإنجليزية",
        ("relative_past", "duration:3-day"): "قبل 3 أيام",
        ("relative_past", "duration:12-day"): "قبل 12 يومًا",
    },
    "de": {
        ("currency_name", "currency:JPY"): "Japanischer Yen",
        ("territory_code", "territory:CH"): "Der Code ist CH.",
        ("territory_first_weekday", "territory:DE"): "Montag",
        ("relative_future", "duration:3-day"): "in 3 Tagen",
    },
    "es": {
        ("territory_name", "territory:DE"): "Alemania",
        ("territory_language", "territory:BR"): "portugués",
        ("month_quarter", "month:12"): "4.º trimestre",
        ("relative_past", "duration:5-hour"): "hace 5 horas",
    },
    "sw": {
        ("territory_name", "territory:US"): "Marekani",
        ("language_name", "language:sw"): "Kiswahili",
        ("translation", "month:1"): 'Kwa Kiswahili huitwa "Januari".',
        ("currency_code", "currency:KES"): "Msimbo wa sarafu ni KES.",
    },
    "fr": {
        ("territory_name", "territory:GB"): "Royaume-Uni",
        ("relative_past", "duration:2-year"): "il y a 2 ans",
        ("to_english", "language:de"): "En anglais, on dit « German ».",
    },
    "id": {
        ("territory_name", "territory:NL"): "Belanda",
        ("currency_name", "currency:JPY"): "Yen Jepang",
        ("relative_future", "duration:3-month"): "dalam 3 bulan",
    },
    "ja": {
        ("territory_name", "territory:FR"): "フランス",
        ("currency_name", "currency:JPY"): "日本円",
        ("month_quarter", "month:4"): "第2四半期",
    },
    "pt": {
        ("territory_name", "territory:ES"): "Espanha",
        ("language_name", "language:de"): "alemão",
        ("relative_past", "duration:3-week"): "há 3 semanas",
    },
}

# 2024-03-15, 1234567, 3400000 and 5 km, checked by hand. Swahili is not asked for short numbers.
FORMATS = {
    "vi": ("15 tháng 3, 2024", "1.234.567", "3,4 triệu", "5 kilômét"),
    "zh": ("2024年3月15日", "1,234,567", "340万", "5公里"),
    "ar": ("15 مارس 2024", "1,234,567", "3.4 مليون", "5 كيلومترات"),
    "de": ("15. März 2024", "1.234.567", "3,4 Millionen", "5 Kilometer"),
    "es": ("15 de marzo de 2024", "1.234.567", "3,4 millones", "5 kilómetros"),
    "fr": ("15 mars 2024", "1 234 567", "3,4 millions", "5 kilomètres"),
    "id": ("15 Maret 2024", "1.234.567", "3,4 juta", "5 kilometer"),
    "ja": ("2024年3月15日", "1,234,567", "340万", "5 キロメートル"),
    "pt": ("15 de março de 2024", "1.234.567", "3,4 milhões", "5 quilômetros"),
}


@pytest.fixture(scope="module", params=SUPPORTED_LANGUAGES)
def data(request: pytest.FixtureRequest) -> DemoData:
    return build_demo_rows(request.param)


def all_rows(data: DemoData) -> list[dict[str, str]]:
    return data.train + data.validation


def test_enough_rows_of_many_kinds(data: DemoData) -> None:
    kinds = Counter(row["kind"] for row in data.train)
    assert len(data.train) >= 2000
    assert len(kinds) >= 25
    assert max(kinds.values()) <= demo.MAX_ROWS_PER_KIND
    assert {row["kind"] for row in data.validation} == set(kinds)


def test_every_row_is_complete_and_differs_from_english(data: DemoData) -> None:
    for row in all_rows(data):
        assert set(row) == FIELDS
        assert all(value == value.strip() and value for value in row.values()), row
        assert "{" not in "".join(row.values()), row
        assert row["prompt"] != row["prompt_en"], row
        assert row["completion"] != row["completion_en"], row


def test_no_entity_and_no_prompt_is_in_both_splits_or_twice(data: DemoData) -> None:
    rows = all_rows(data)
    assert {row["entity"] for row in data.train}.isdisjoint(row["entity"] for row in data.validation)
    for field in ("id", "prompt", "prompt_en"):
        assert len({row[field] for row in rows}) == len(rows), field


def test_every_category_of_entity_is_held_out_by_the_share(data: DemoData) -> None:
    held_out = Counter(entity.split(":")[0] for entity in {row["entity"] for row in data.validation})
    entities = Counter(entity.split(":")[0] for entity in {row["entity"] for row in all_rows(data)})
    assert held_out == {category: max(1, round(0.15 * count)) for category, count in entities.items()}


def test_no_answer_dominates_its_kind(data: DemoData) -> None:
    answers = Counter((row["kind"], row["completion"]) for row in all_rows(data))
    assert max(answers.values()) <= demo.MAX_ROWS_PER_ANSWER


def test_both_sides_name_the_row_s_entity(data: DemoData) -> None:
    """The names stand in the row's text, read from Babel anew: in the question or in the answer."""
    tables = {
        "territory": "territories",
        "currency": "currencies",
        "language": "languages",
        "script": "scripts",
    }
    locales = {"": Locale.parse(data.train[0]["id"].split("-")[0]), "_en": Locale.parse("en")}
    checked = 0
    for row in all_rows(data):
        category, _, code = row["entity"].partition(":")
        if category not in tables or row["kind"] in ("currency_amount", "currency_symbol"):
            continue
        for side, locale in locales.items():
            text = row["prompt" + side] + "\n" + row["completion" + side]
            english_or_own = row["kind"] in ("translation", "to_english")
            names = [clean_text(getattr(locale, tables[category])[code])]
            if english_or_own:
                names = [clean_text(getattr(each, tables[category])[code]) for each in locales.values()]
            assert all(name in text for name in names), row
        checked += 1
    assert checked > 1000


def test_numbers_and_codes_are_the_same_on_both_sides(data: DemoData) -> None:
    """Digits carry most of the facts that are not names; a pair of different facts would differ in them."""
    for row in all_rows(data):
        if row["kind"] in ("date_iso", "number_format", "territory_code", "currency_code", "language_code"):
            digits = ["".join(filter(str.isdigit, row[f"completion{side}"])) for side in ("", "_en")]
            assert digits[0] == digits[1], row
        if row["kind"] in ("territory_code", "currency_code", "language_code"):
            code = row["entity"].split(":")[1]
            assert code in row["completion"], row
            assert code in row["completion_en"], row
        if row["kind"] in ("date_long", "date_iso", "date_month", "date_next"):
            day = datetime.date.fromisoformat(row["entity"].split(":")[1])
            assert str(day.year) in row["prompt"], row
            assert str(day.year) in row["prompt_en"], row


@pytest.mark.parametrize("language", GOLDEN)
def test_facts_checked_by_hand(language: str) -> None:
    rows = {(fact.kind, fact.entity): row["completion"] for fact, row in worded_facts(language)}
    assert {key: rows.get(key) for key in GOLDEN[language]} == GOLDEN[language]


@pytest.mark.parametrize("language", FORMATS)
def test_formats_checked_by_hand(language: str) -> None:
    locale = BilingualLocale(language)
    kilometers = locale.measurement(5, "length-kilometer")
    assert kilometers is not None
    pairs = (
        locale.long_date(datetime.date(2024, 3, 15)),
        locale.grouped_number(1234567),
        locale.compact_number(3_400_000),
        kilometers,
    )
    assert tuple(pair[0] for pair in pairs) == FORMATS[language]
    assert tuple(pair[1] for pair in pairs) == ("March 15, 2024", "1,234,567", "3.4 million", "5 kilometers")


def test_months_and_weekdays_count_on_around_the_year_and_the_week() -> None:
    facts = {(fact.kind, fact.entity, fact.variant): fact for fact in collect_facts("de")}
    november = facts["month_later", "month:11", "3"]
    assert november.slots["answer"] == ("Februar", "February")
    saturday = facts["weekday_later", "weekday:5", "9"]
    assert saturday.slots["answer"] == ("Montag", "Monday")


def test_a_row_reads_as_written() -> None:
    rows = {row["id"]: row for row in worded_rows("vi")}
    assert rows["vi-territory_language-territory-MZ"] == {
        "id": "vi-territory_language-territory-MZ",
        "prompt": "Ngôn ngữ chính thức của quốc gia hoặc vùng lãnh thổ này là gì: Mozambique?",
        "completion": "Tiếng Bồ Đào Nha",
        "prompt_en": "What is the official language of this country or territory: Mozambique?",
        "completion_en": "Portuguese",
        "entity": "territory:MZ",
        "kind": "territory_language",
    }


def test_texts_have_no_invisible_characters(data: DemoData) -> None:
    invisible = "\u00a0\u202f\u200e\u200f\u061c"
    for row in all_rows(data):
        assert not set(row["prompt"] + row["completion"]) & set(invisible), row


def test_templates_of_every_language_match_the_english_ones() -> None:
    english = load_wording("en")
    folder = resources.files("pivotune.demo") / "templates"
    assert {entry.name for entry in folder.iterdir()} == {f"{name}.yaml" for name in (*SUPPORTED_LANGUAGES, "en")}
    for language in SUPPORTED_LANGUAGES:
        wording = load_wording(language)
        assert wording["categories"].keys() == english["categories"].keys()
        assert wording["kinds"].keys() <= english["kinds"].keys()
        for kind, templates in wording["kinds"].items():
            ours = [slots(text) for text in (*templates["prompts"], templates["completion"])]
            theirs = [
                slots(text) for text in (*english["kinds"][kind]["prompts"], english["kinds"][kind]["completion"])
            ]
            assert ours == theirs, (language, kind)


def slots(template: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(template) if name} - {"target_language"}


def test_rows_caps_the_training_rows_evenly() -> None:
    everything = build_demo_rows("vi")
    capped = build_demo_rows("vi", rows=600)
    assert len(capped.train) == 600
    assert capped.validation == everything.validation
    available = Counter(row["kind"] for row in everything.train)
    taken = Counter(row["kind"] for row in capped.train)
    most = max(taken.values())
    assert all(taken[kind] in (available[kind], most - 1, most) for kind in available)
    assert {row["id"] for row in capped.train} < {row["id"] for row in build_demo_rows("vi", rows=900).train}


def test_the_seed_changes_the_split_and_nothing_else_does() -> None:
    first, second = build_demo_rows("de", seed=0), build_demo_rows("de", seed=1)
    assert first == build_demo_rows("de", seed=0)
    assert {row["id"] for row in all_rows(first)} == {row["id"] for row in all_rows(second)}
    assert {row["id"] for row in first.validation} != {row["id"] for row in second.validation}


def test_rows_do_not_depend_on_the_hash_seed_or_on_languages_built_before() -> None:
    """Babel keeps some names it resolved for one locale where the next locale finds them (its issue 1234)."""
    forwards = digests_in_a_fresh_process(SUPPORTED_LANGUAGES, hash_seed="1")
    backwards = digests_in_a_fresh_process(tuple(reversed(SUPPORTED_LANGUAGES)), hash_seed="2")
    assert forwards == backwards


def digests_in_a_fresh_process(languages: tuple[str, ...], hash_seed: str) -> dict[str, str]:
    program = (
        "import hashlib, json, sys\n"
        "from babel.dates import get_month_names\n"
        "from pivotune.demo.rows import build_demo_rows\n"
        "digests = {}\n"
        "for language in sys.argv[1:]:\n"
        "    get_month_names('wide', 'stand-alone', language)[1]\n"
        "    data = build_demo_rows(language)\n"
        "    text = json.dumps([data.train, data.validation])\n"
        "    digests[language] = hashlib.sha256(text.encode()).hexdigest()\n"
        "print(json.dumps(digests))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program, *languages],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_written_files_hold_the_rows_as_utf8(tmp_path) -> None:
    data = build_demo_rows("ar", rows=50)
    train, validation = write_demo_rows(data, tmp_path / "new" / "folder")
    assert (train.name, validation.name) == ("train.jsonl", "validation.jsonl")
    for path, rows in ((train, data.train), (validation, data.validation)):
        text = path.read_bytes().decode("utf-8")
        assert [json.loads(line) for line in text.splitlines()] == rows
        assert rows[0]["prompt"] in text


def test_the_data_names_its_sources() -> None:
    assert int(build_demo_rows("es", rows=10).cldr_version) >= 44


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"language": "xx"},
            "the demo has no language 'xx'; supported: ar, de, es, fr, id, ja, pt, sw, vi, zh",
        ),
        (
            {"language": "en"},
            "the demo has no language 'en'; supported: ar, de, es, fr, id, ja, pt, sw, vi, zh",
        ),
        ({"language": "vi", "rows": 0}, "the demo's rows: found 0, allowed 1 or more"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(arguments: dict, message: str) -> None:
    with pytest.raises(UsageError) as error:
        build_demo_rows(**arguments)
    assert str(error.value) == message


def test_without_babel_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "babel", None)
    monkeypatch.delitem(sys.modules, "pivotune.demo.cldr")
    with pytest.raises(UsageError) as error:
        importlib.import_module("pivotune.demo.cldr")
    assert str(error.value) == 'the demo needs Babel: pip install "pivotune[demo]"'
