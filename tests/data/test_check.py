"""Planted defects must be found, and good rows left alone: the figures in the asserts are the least we accept."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from conftest import build_tiny_tokenizer

from pivotune.data.check import DataCheck, check_rows
from pivotune.data.check.language import base_language
from pivotune.data.examples import Encoder, Limits
from pivotune.data.rows import Row
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template
from pivotune.errors import UsageError

# Words in English, Swahili, Chinese.
THINGS = [
    ("teacher", "mwalimu", "老师"), ("doctor", "daktari", "医生"), ("farmer", "mkulima", "农民"),
    ("child", "mtoto", "孩子"),
    ("lion", "simba", "狮子"), ("elephant", "tembo", "大象"), ("river", "mto", "河流"), ("mountain", "mlima", "高山"),
    ("house", "nyumba", "房子"), ("school", "shule", "学校"), ("market", "soko", "市场"), ("book", "kitabu", "书本"),
    ("bread", "mkate", "面包"), ("water", "maji", "清水"), ("milk", "maziwa", "牛奶"), ("tree", "mti", "树木"),
    ("bird", "ndege", "小鸟"), ("fish", "samaki", "鲜鱼"), ("road", "barabara", "道路"), ("ship", "meli", "轮船"),
    ("friend", "rafiki", "朋友"), ("mother", "mama", "母亲"), ("king", "mfalme", "国王"), ("rain", "mvua", "雨水"),
    ("table", "meza", "桌子"), ("chair", "kiti", "椅子"), ("door", "mlango", "大门"), ("window", "dirisha", "窗户"),
    ("field", "shamba", "田地"), ("forest", "msitu", "森林"), ("island", "kisiwa", "岛屿"), ("city", "mji", "城市"),
    ("salt", "chumvi", "食盐"), ("sugar", "sukari", "白糖"), ("egg", "yai", "鸡蛋"), ("meat", "nyama", "牛肉"),
    ("goat", "mbuzi", "山羊"), ("dog", "mbwa", "小狗"), ("cat", "paka", "花猫"), ("horse", "farasi", "骏马"),
    ("shirt", "shati", "衬衫"), ("shoe", "kiatu", "鞋子"), ("hat", "kofia", "帽子"), ("knife", "kisu", "刀子"),
    ("moon", "mwezi", "月亮"), ("star", "nyota", "星星"), ("sun", "jua", "太阳"), ("wind", "upepo", "大风"),
    ("letter", "barua", "信件"), ("money", "pesa", "金钱"), ("medicine", "dawa", "药物"), ("flower", "ua", "花朵"),
    ("stone", "jiwe", "石头"), ("fire", "moto", "火焰"), ("boat", "mashua", "小船"), ("car", "gari", "汽车"),
    ("bed", "kitanda", "床铺"), ("lamp", "taa", "电灯"), ("soap", "sabuni", "肥皂"), ("clock", "saa", "时钟"),
]  # fmt: skip
ACTS = [
    ("sees", "anaona", "看见"), ("loves", "anapenda", "喜爱"), ("buys", "ananunua", "购买"), ("sells", "anauza", "出售"),
    ("carries", "anabeba", "搬运"), ("needs", "anahitaji", "需要"), ("finds", "anapata", "找到"),
    ("sends", "anatuma", "寄送"),
]  # fmt: skip
TIMES = [
    ("in the morning", "asubuhi", "早上"), ("in the evening", "jioni", "晚上"), ("every day", "kila siku", "每天"),
    ("tomorrow", "kesho", "明天"), ("yesterday", "jana", "昨天"), ("today", "leo", "今天"),
]  # fmt: skip
LANGUAGES = ("sw", "zh")


def parallel_rows(language: str, count: int, seed: int = 0) -> list[Row]:
    """Different questions and answers of one to four sentences, translated word by word."""
    generator = random.Random(seed)
    rows = []
    for number in range(1, count + 1):
        who, what, act, time = (generator.choice(words) for words in (THINGS, THINGS, ACTS, TIMES))
        sentences = [
            [generator.choice(words) for words in (TIMES, THINGS, ACTS, THINGS, THINGS)]
            for _ in range(generator.randint(1, 4))
        ]
        if language == "sw":
            prompt = f"Kwa nini {who[1]} {act[1]} {what[1]} {time[1]} katika nchi hii?"
            answer = " ".join(
                f"Kwa sababu {t[1]} {a[1]} {v[1]} {b[1]} na {c[1]} pamoja nao." for t, a, v, b, c in sentences
            )
        else:
            prompt = f"为什么{who[2]}{time[2]}要{act[2]}{what[2]}呢？请说明。"
            answer = "".join(f"因为{a[2]}{t[2]}总是{v[2]}{b[2]}和{c[2]}。" for t, a, v, b, c in sentences)
        english = f"Why does the {who[0]} in this country say that he {act[0]} the {what[0]} {time[0]}?"
        answer_en = " ".join(
            f"Because {t[0]} the {a[0]} {v[0]} the {b[0]} and the {c[0]}." for t, a, v, b, c in sentences
        )
        rows.append(Row(prompt, answer, english, answer_en, id=f"{language}-{number}", number=number))
    return rows


def numbers_of(check: DataCheck, name: str) -> list[int]:
    return next((problem.numbers for problem in check.problems if problem.name == name), [])


def names_of(check: DataCheck) -> set[str]:
    return {problem.name for problem in check.problems}


def with_row(rows: list[Row], number: int, **changes: str) -> list[Row]:
    """The rows with the texts of one of them changed."""
    return [replace(row, **changes) if row.number == number else row for row in rows]


@pytest.mark.parametrize("language", LANGUAGES)
def test_good_rows_are_left_alone(language):
    check = check_rows(parallel_rows(language, 600), language=language)
    assert check.flagged <= 6
    assert check.shifts == []
    assert check.notes == []
    assert names_of(check) <= {"misaligned", "same_prompt"}
    assert check.verdict.startswith(f"{600 - check.flagged} of 600 rows look good")


# --- copies, languages, repetitions --------------------------------------------------------------------------------


def test_rows_copied_from_english():
    rows = parallel_rows("sw", 40)
    rows = with_row(rows, 3, prompt=rows[2].prompt_en, completion=rows[2].completion_en)
    rows = with_row(rows, 7, prompt=rows[6].prompt_en.upper().replace("WHY", "HOW"))
    rows = with_row(rows, 9, completion=rows[8].completion_en + " Asante.")
    check = check_rows(rows, language="sw")
    assert numbers_of(check, "untranslated") == [3, 7]
    notes = {finding.number: finding.note for problem in check.problems for finding in problem.examples}
    assert (notes[3], notes[7]) == ("prompt and answer", "the prompt")
    assert numbers_of(check, "left_in_english") == [9]
    assert check.flagged == 3


@pytest.mark.parametrize(
    "same",
    [
        "Barack Obama",
        "Nairobi, Mombasa, Kisumu, Nakuru, Eldoret, Thika",
        "def area(r):\n    return 3.14 * (r ** 2)",
        "42",
    ],
)
def test_names_numbers_and_code_may_be_the_same(same):
    rows = with_row(parallel_rows("sw", 40), 5, completion=same, completion_en=same)
    check = check_rows(rows, language="sw")
    assert not {5} & {number for problem in check.problems for number in problem.numbers}


GERMAN = "Weil der Lehrer am Morgen immer frisches Brot kauft und es seinen Kindern in die Schule bringt."
ENGLISH = "Nobody knows exactly why, although several explanations have been proposed by historians over the years."


@pytest.mark.parametrize(
    ("text", "label"),
    [(GERMAN, "de"), (ENGLISH, "en"), ("因为老师每天早上都会去市场购买新鲜的面包和牛奶，然后带到学校。", "zh")],
)
def test_an_answer_in_another_language(text, label):
    rows = with_row(parallel_rows("sw", 40), 11, completion=text)
    check = check_rows(rows, language="sw")
    assert numbers_of(check, "wrong_language") == [11]
    problem = next(problem for problem in check.problems if problem.name == "wrong_language")
    assert problem.examples[0].note == f"answer looks like {label}"


def test_quotes_and_terms_of_the_english_text_do_not_make_another_language():
    quoted = 'Tafsiri sentensi hii kwa Kiswahili: "The quick brown fox jumps over the lazy dog every single morning."'
    english = 'Translate into Swahili: "The quick brown fox jumps over the lazy dog every single morning."'
    check = check_rows(with_row(parallel_rows("sw", 40), 4, prompt=quoted, prompt_en=english), language="sw")
    assert numbers_of(check, "wrong_language") == []


INDONESIAN = [
    ("Mengapa guru membeli roti segar setiap pagi di pasar?", "Karena anak-anaknya suka makan roti sebelum sekolah."),
    ("Apa ibu kota negara tetangga kita di sebelah utara?", "Ibu kotanya adalah sebuah kota besar di tepi sungai."),
    ("Bagaimana cara menyimpan air hujan untuk musim kemarau?", "Air hujan dapat disimpan dalam tangki di belakang rumah."),
    ("Siapa yang menulis buku tentang sejarah kapal itu?", "Buku tersebut ditulis oleh seorang pelaut yang sudah pensiun."),
]  # fmt: skip


@pytest.mark.parametrize("language", ["id", "ms", "id-ID"])
def test_near_relatives_are_accepted(language):
    rows = [Row(*texts, f"What about {n}?", f"It is about {n}.", number=n) for n, texts in enumerate(INDONESIAN, 1)]
    check = check_rows(rows, language=language)
    assert numbers_of(check, "wrong_language") == []
    assert check.notes == []


def test_the_wrong_language_code_is_suspected():
    rows = [Row(*texts, f"What about {n}?", f"It is about {n}.", number=n) for n, texts in enumerate(INDONESIAN, 1)]
    (note,) = check_rows(rows, language="vi").notes
    assert note == "6 of 8 texts look like id, not vi: is the language code right?"


def test_a_language_that_the_detector_does_not_know_is_said_to_be_unchecked():
    check = check_rows(parallel_rows("sw", 20), language="zu")
    assert check.notes == ["the language detector does not know zu: the language of the target side was not checked"]
    assert "wrong_language" not in names_of(check)


@pytest.mark.parametrize(
    ("code", "base"),
    [("zh-Hans", "zh"), ("zh_TW", "zh"), ("vie_Latn", "vi"), ("PT-br", "pt"), ("nb", "no"), ("sw", "sw")],
)
def test_base_language(code, base):
    assert base_language(code) == base


def test_an_english_side_that_is_not_english():
    rows = parallel_rows("sw", 40)
    question, answer = INDONESIAN[2]
    rows = with_row(rows, 5, prompt_en=question, completion_en=answer)
    rows = with_row(rows, 6, prompt_en=rows[5].prompt)
    question = "Translate this sentence into Spanish: The bakery is closed on Sundays."
    spanish = "La panadería está cerrada los domingos y también los días festivos."
    rows = with_row(rows, 8, prompt_en=question, completion_en=spanish, completion=spanish)
    check = check_rows(rows, language="sw")
    assert numbers_of(check, "english_not_english") == [5, 6], "an answer in a third language is what row 8 asks for"


def test_repetitions_are_told_apart():
    rows = parallel_rows("sw", 30)
    first = rows[0]
    rows = with_row(rows, 10, prompt=first.prompt, completion=first.completion)
    rows = with_row(rows, 20, prompt=first.prompt)
    rows = with_row(rows, 25, prompt_en=first.prompt_en, completion_en=first.completion_en)
    check = check_rows(rows, language="sw")
    assert numbers_of(check, "duplicate_rows") == [10]
    assert numbers_of(check, "same_prompt") == [20]
    assert numbers_of(check, "duplicate_english") == [25]
    notes = {finding.note for problem in check.problems for finding in problem.examples}
    assert {"same as row 1", "prompt of row 1", "English of row 1"} <= notes


# --- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_shuffled_pairs_are_found_by_the_lexicon(language):
    rows = parallel_rows(language, 800)
    places = random.Random(1).sample(range(800), 40)
    shuffled = list(rows)
    for place, other in zip(places, places[1:] + places[:1], strict=True):
        source = rows[other]
        shuffled[place] = replace(rows[place], prompt_en=source.prompt_en, completion_en=source.completion_en)
    check = check_rows(shuffled, language=language)
    flagged, planted = set(numbers_of(check, "misaligned")), {place + 1 for place in places}
    assert len(flagged & planted) >= 30
    assert len(flagged - planted) <= 12
    assert check.shifts == []


def test_a_small_file_is_judged_by_signals_that_come_together():
    rows = parallel_rows("sw", 30)
    listed = "1. Simba 12 wakubwa\n2. Tembo 30 wadogo\n3. Ndege 45 weupe"
    rows = with_row(rows, 6, completion=listed, completion_en="There were 7 ships and 19 friends at the market.")
    # One signal alone is common in good rows: here the numbers of the list items only.
    rows = with_row(rows, 9, completion="Walikuwa 500 wakati huo.", completion_en="They were half a thousand, in 1990.")
    check = check_rows(rows, language="sw")
    assert numbers_of(check, "misaligned") == [6]
    note = next(problem for problem in check.problems if problem.name == "misaligned").examples[0].note
    assert note == "numbers 12, 30, 45 against 7, 19; 3 list items against 0"


@pytest.mark.parametrize(
    ("target", "english"), [("1.234,5 na ٤٢", "1,234.5 and 42"), ("tano", "5"), ("1. mto 8", "1. river 8")]
)
def test_numbers_agree_whatever_their_script_and_separators(target, english):
    rows = with_row(parallel_rows("sw", 30), 6, completion=target, completion_en=english)
    rows = with_row(rows, 6, prompt="Ngapi?", prompt_en="How many.")  # the one signal that is there
    assert numbers_of(check_rows(rows, language="sw"), "misaligned") == []


def test_length_ratio_outliers():
    rows = parallel_rows("sw", 300)
    padded = " ".join(row.completion for row in rows[100:110])
    check = check_rows(with_row(rows, 7, completion=padded), language="sw")
    assert numbers_of(check, "length_ratio") == [7]
    assert not check.problems[-1].defect


def test_code_is_as_long_in_both_languages():
    code = "".join(f"values[{n}] = (n * {n}) + lines[{n}]; print(values[{n}])\n" for n in range(20))
    rows = parallel_rows("zh", 300)
    padded = "".join(row.completion for row in rows[100:120])
    rows = with_row(rows, 7, completion=code, completion_en=code)
    rows = with_row(rows, 9, completion=padded)
    assert numbers_of(check_rows(rows, language="zh"), "length_ratio") == [9]


def shifted(rows: list[Row], start: int, by: int) -> list[Row]:
    """From the row at index `start` on, the English of a row stands `by` rows further down."""
    result = list(rows)
    for index in range(start, len(rows)):
        if 0 <= index - by < len(rows):
            source = rows[index - by]
            result[index] = replace(rows[index], prompt_en=source.prompt_en, completion_en=source.completion_en)
    return result


@pytest.mark.parametrize("by", [-2, -1, 1, 2])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_shifted_english_side(language, by):
    check = check_rows(shifted(parallel_rows(language, 300), 100, by), language=language)
    assert [shift.by for shift in check.shifts] == [by]
    (shift,) = check.shifts
    assert abs(shift.first - 101) <= 3
    assert 297 <= shift.last <= 300
    assert len(numbers_of(check, "shifted")) == shift.rows == shift.last - shift.first + 1
    direction = "further down" if by > 0 else "further up"
    assert f"from row {shift.first} to row {shift.last}" in str(shift)
    assert str(shift).endswith(direction)
    assert "realign the English side" in check.verdict


def test_a_stretch_that_slips_and_comes_back():
    rows = parallel_rows("sw", 300)
    check = check_rows([*shifted(rows, 100, 1)[:200], *rows[200:]], language="sw")
    (shift,) = check.shifts
    assert (shift.by, abs(shift.first - 101) <= 3, abs(shift.last - 200) <= 3) == (1, True, True)


def test_rows_of_one_mould_are_not_taken_for_shifted():
    rows = [
        Row(
            f"Namba {n} ni ipi katika orodha?",
            f"Ni namba ya {n}.",
            f"Which number is {n}?",
            f"It is number {n}.",
            number=n,
        )
        for n in range(1, 200)
    ]
    assert check_rows(rows, language="sw").shifts == []


def test_numbers_reveal_a_shift_where_lengths_do_not():
    rows = [
        Row(
            f"Namba {n} ni ipi katika orodha?",
            f"Ni namba ya {n}.",
            f"Which number is {n}?",
            f"It is number {n}.",
            number=n,
        )
        for n in range(1001, 1201)
    ]
    (shift,) = check_rows(shifted(rows, 100, 1), language="sw").shifts
    assert (shift.first, shift.last, shift.by) == (1101, 1200, 1)


# --- lengths, result, errors ---------------------------------------------------------------------------------------


def test_lengths_in_characters():
    rows = [Row("ab" * n, "c" * n, "d", "efg", input="xy", number=n) for n in range(1, 102)]
    check = check_rows(rows, language="sw")
    assert check.unit == "characters"
    assert check.cut is None
    # The input counts as part of the query, after an empty line.
    assert (check.lengths["prompt"].median, check.lengths["prompt"].max) == (2 * 51 + 4, 2 * 101 + 4)
    assert (check.lengths["completion"].p95, check.lengths["completion_en"].max) == (96, 3)


def test_lengths_in_tokens_and_cuts_are_those_of_training(rows):
    tokenizer = build_tiny_tokenizer()
    template = load_template("chat", tokenizer)
    loaded = load_rows(rows)
    whole = Encoder(tokenizer, template, Limits(10_000, 10_000)).encode(loaded)
    limits = Limits(prompt=12, completion=8)
    training = Encoder(tokenizer, template, limits)
    training.encode(loaded, on_bad_row="skip")
    check = check_rows(loaded, language="sw", encoder=Encoder(tokenizer, template, limits))
    assert check.unit == "tokens"
    assert check.lengths["prompt"].max == max(pair.target.answer for pair in whole)
    assert check.lengths["completion_en"].max == max(pair.english.num_answer_tokens for pair in whole)
    assert training.report.cut["prompts"] > 0
    assert 0 < training.report.cut["answers"] < len(loaded)
    assert check.cut == {**training.report.cut, "max_prompt_tokens": 12, "max_completion_tokens": 8}


def test_tokens_of_long_files_are_counted_on_rows_spread_over_them(monkeypatch):
    monkeypatch.setattr("pivotune.data.check.run.TOKENIZED_ROWS", 400)
    rows = [Row("swali", "a" * (1 + n // 8), "question", "b" * (1 + n // 8), number=n) for n in range(1200)]
    tokenizer = build_tiny_tokenizer()
    encoder = Encoder(tokenizer, load_template("chat", tokenizer), Limits(100, 4000))
    check = check_rows(rows, language="sw", encoder=encoder)
    assert check.measured == 400
    every_third = Encoder(tokenizer, encoder.template, encoder.limits).encode(rows[::3])
    lengths = sorted(pair.target.num_answer_tokens for pair in every_third)
    assert check.lengths["completion"].median == (lengths[199] + lengths[200]) / 2
    assert check.lengths["completion"].max == lengths[-1]


def test_rows_that_training_would_leave_out(rows):
    tokenizer = build_tiny_tokenizer()
    encoder = Encoder(tokenizer, load_template("chat", tokenizer), Limits(prompt=3, completion=30))
    check = check_rows(load_rows(rows), language="sw", encoder=encoder)
    (reason,) = check.too_long
    assert "the template alone takes" in reason
    assert check.too_long[reason] == len(rows)
    assert check.verdict.endswith("16 of 16 do not fit this template or these limits")


def test_unusable_rows_are_counted_and_the_verdict_says_what_to_do(rows):
    rows[3]["completion_en"] = " "
    rows[5]["prompt"] = rows[6]["prompt"] = None
    loaded = load_rows(rows, on_bad_row="skip")
    check = check_rows(loaded, language="sw")
    assert (check.total, check.usable) == (16, 13)
    assert check.skipped == {"`completion_en` is empty": 1, "`prompt` is missing": 2}
    assert set(check.skipped_at.values()) == {"the given rows, row 4", "the given rows, row 6"}
    assert "3 cannot be used: train with --set data.on_bad_row=skip" in check.verdict


def test_the_result_is_plain_json():
    rows = parallel_rows("sw", 120)
    rows = shifted(with_row(rows, 3, prompt=rows[2].prompt_en, completion=rows[2].completion_en), 60, 1)
    check = check_rows(rows, language="sw", examples=1)
    plain = json.loads(json.dumps(check.to_dict()))
    by_name = {problem["name"]: problem for problem in plain["problems"]}
    assert by_name["untranslated"]["numbers"] == [3]
    assert by_name["untranslated"]["count"] == 1
    example = by_name["untranslated"]["examples"][0]
    assert (example["number"], example["prompt"], example["prompt_en"]) == (3, rows[2].prompt, rows[2].prompt_en)
    assert len(by_name["shifted"]["examples"]) == 1
    assert plain["shifts"][0]["message"] == str(check.shifts[0])
    assert plain["lengths"]["prompt"]["max"] == max(len(row.prompt) for row in rows)


def test_numbers_are_places_in_the_source():
    rows = [replace(row, number=row.number * 10) for row in parallel_rows("sw", 40)]
    rows = with_row(rows, 50, prompt=rows[4].prompt_en)
    assert numbers_of(check_rows(rows, language="sw"), "untranslated") == [50]


def test_progress_reaches_the_end():
    done = []
    check_rows(parallel_rows("sw", 1200), language="sw", progress=done.append)
    assert done == [512, 1024, 1200]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_rows_is_enough(count):
    assert check_rows(parallel_rows("sw", count), language="sw").usable == count


def test_mistakes_are_one_line():
    with pytest.raises(UsageError, match="there are no rows"):
        check_rows([], language="sw")
    with pytest.raises(UsageError, match="row 7 lacks a text"):
        check_rows([Row("a", "b", "c", "", number=7)], language="sw")
    with pytest.raises(UsageError, match="eng_Latn is English"):
        check_rows(parallel_rows("sw", 2), language="eng_Latn")


# --- real data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["vi", "zh"])
def test_planted_defects_in_real_data(shared_data, language):
    rows = list(load_rows(shared_data / "train" / f"{language}.jsonl.gz", limit=3000))
    clean = check_rows(rows, language=language)
    # Some rows are damaged: HTML escapes, zero-width characters, NFD and placeholders, by reading.
    damaged = ("html_escapes", "invisible_characters", "decomposed_characters", "placeholder")
    truly = {number for name in damaged for number in numbers_of(clean, name)}
    assert clean.flagged - len(truly) <= 15
    assert clean.shifts == []
    places = random.Random(0).sample(range(len(rows)), 240)
    shuffled, copied = places[:150], places[150:]
    planted = list(rows)
    for place, other in zip(shuffled, shuffled[1:] + shuffled[:1], strict=True):
        source = rows[other]
        planted[place] = replace(rows[place], prompt_en=source.prompt_en, completion_en=source.completion_en)
    for place in copied:
        planted[place] = replace(
            rows[place], prompt=rows[place].prompt_en, completion=rows[place].completion_en, input=""
        )
    check = check_rows(planted, language=language)
    misaligned = set(numbers_of(check, "misaligned"))
    truly = {rows[place].number for place in shuffled}
    assert len(misaligned & truly) >= 0.6 * len(truly)
    assert len(misaligned - truly) <= 0.3 * len(truly)
    untranslated = {rows[place].number for place in copied} & set(numbers_of(check, "untranslated"))
    assert len(untranslated) >= 0.9 * len(copied)
