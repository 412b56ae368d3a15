"""Each kind of damage is found in the answer, and the same signs are left alone where the row is about them."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest
from data.test_check import names_of, numbers_of, parallel_rows, with_row

from pivotune.data.check import check_rows
from pivotune.data.check.damage import find_damage, lost_number
from pivotune.data.check.language import side_texts
from pivotune.data.rows import Row

VIETNAMESE = Row(
    "Thủ đô của Việt Nam là thành phố nào?",
    "Thủ đô của Việt Nam là Hà Nội. Thành phố này nằm bên sông Hồng, ở miền Bắc.",
    "Which city is the capital of Vietnam?",
    "The capital of Vietnam is Hanoi. The city lies on the Red River, in the north.",
)
CHINESE = Row(
    "越南的首都是哪座城市？",
    "越南的首都是河内。这座城市位于北部的红河河畔。",
    VIETNAMESE.prompt_en,
    VIETNAMESE.completion_en,
)
RUSSIAN = Row(
    "Какой город является столицей Вьетнама?",
    "Столица Вьетнама - Ханой. Этот город стоит на Красной реке, на севере страны.",
    VIETNAMESE.prompt_en,
    VIETNAMESE.completion_en,
)
VI, ZH, RU = VIETNAMESE.completion, CHINESE.completion, RUSSIAN.completion


def kinds(row: Row) -> set[str]:
    return {kind for kind, _ in find_damage(*side_texts(row), row)}


@pytest.mark.parametrize("row", [VIETNAMESE, CHINESE, RUSSIAN])
def test_good_text_is_left_alone(row):
    assert kinds(row) == set()


@pytest.mark.parametrize(
    ("kind", "row", "completion"),
    [
        ("html_tags", VIETNAMESE, f"<p>{VI}</p>"),
        ("html_tags", CHINESE, f"{ZH[:9]}＜br /＞{ZH[9:]}"),
        ("html_escapes", VIETNAMESE, VI.replace(" ", "&nbsp;", 1)),
        ("html_escapes", CHINESE, f"& quot;{ZH}& quot ;"),
        ("wrong_encoding", VIETNAMESE, VI.encode().decode("cp1252", "replace")),
        ("wrong_encoding", VIETNAMESE, VI.encode().decode("latin-1")),
        ("wrong_encoding", RUSSIAN, RU.encode().decode("cp1251", "ignore")),
        ("wrong_encoding", RUSSIAN, RU.encode("cp1251").decode("latin-1")),
        ("wrong_encoding", CHINESE, "首都河内首都河内".encode().decode("gbk")),
        ("wrong_encoding", VIETNAMESE, "Isn\u00e2\u20ac\u2122t"),
        ("wrong_encoding", VIETNAMESE, VI.encode("ascii", "replace").decode()),
        ("wrong_encoding", CHINESE, ZH.encode("ascii", "replace").decode()),
        ("wrong_encoding", CHINESE, f"{ZH}\ufffd"),
        ("invisible_characters", VIETNAMESE, f"{VI[:5]}\u200b{VI[5:]}"),
        ("invisible_characters", CHINESE, f"{ZH[:5]}\u200d{ZH[5:]}"),
        ("invisible_characters", VIETNAMESE, f"\u202e{VI}"),
        ("invisible_characters", RUSSIAN, f"{RU[:5]}\u00ad{RU[5:]}\x00"),
        ("decomposed_characters", VIETNAMESE, unicodedata.normalize("NFD", VI)),
        ("decomposed_characters", VIETNAMESE, VI.replace("ố", "ô\u0301")),
        ("compatibility_characters", VIETNAMESE, VI.replace("Nam", "Ｎａｍ")),
        ("compatibility_characters", VIETNAMESE, VI.replace(".", "。")),
        ("compatibility_characters", RUSSIAN, RU.replace("Столица", "Cтoлица").replace("город", "гoрод")),
        ("control_tokens", VIETNAMESE, f"{VI[:20]}<|end|>{VI[20:]}"),
        ("control_tokens", CHINESE, f"{ZH}</s>"),
        ("control_tokens", VIETNAMESE, "▁" + VI.replace(" ", " ▁")),
        ("placeholder", VIETNAMESE, "nan"),
        ("placeholder", VIETNAMESE, "[object Object]"),
        ("placeholder", CHINESE, "Here is the translation: 河内"),
        ("literal_escapes", VIETNAMESE, VI.replace(". ", ".\\n")),
        ("literal_escapes", CHINESE, ZH.encode("ascii", "backslashreplace").decode()),
        ("literal_escapes", VIETNAMESE, VI.replace("Hồng", "H%E1%BB%93ng")),
        ("repeated_text", VIETNAMESE, f"{VI} {VI}"),
        ("repeated_text", CHINESE, ZH + "的河畔" * 40),
        ("repeated_text", RUSSIAN, RU.replace(". ", ". " + RU.split(". ")[0] + ". ", 1)),
        ("spacing", CHINESE, " ".join(ZH)),
        ("spacing", VIETNAMESE, VI.replace(".", " .").replace(",", " ,")),
        ("spacing", VIETNAMESE, 'Thủ đô của Việt Nam là "Hà Nội ."'),
        ("spacing", VIETNAMESE, VI.replace(" ", "").replace(".", "").replace(",", "")),
        ("left_in_english", VIETNAMESE, VIETNAMESE.completion_en),
        ("left_in_english", CHINESE, f"{ZH} {VIETNAMESE.completion_en}"),
    ],
)
def test_damaged_answers(kind, row, completion):
    # Bytes without a letter of their own are shown as control characters.
    others = {"invisible_characters"} if kind == "wrong_encoding" else set()
    assert kind in (found := kinds(replace(row, completion=completion)))
    assert found <= {kind} | others


def test_a_word_in_a_word_makes_no_row_about_markup():
    english = "The recycling programs keep their identities, as this manuscript describes."
    row = Row("Vì sao?", "Các chương trình tái chế<br> giữ bản sắc của chúng.", "Why?", english)
    assert kinds(row) == {"html_tags"}
    assert not kinds(replace(row, completion_en="The br tag breaks the line."))


def test_one_sentence_left_in_english():
    english = "A list has a fixed order. Stars and bright planets fill our galaxy. See The Catcher in the Rye"
    translated = "列表有固定的顺序，而集合没有固定的顺序，因此不能用索引来访问它的元素。"
    left = f"{translated} Stars and bright planets fill our galaxy."
    row = Row("有什么区别？", left, "What is the difference?", english)
    assert kinds(row) == {"left_in_english"}
    assert not kinds(replace(row, completion=left.replace("Stars", "The stars")))
    assert not kinds(replace(row, completion=f"{translated} See The Catcher in the Rye"))


@pytest.mark.parametrize(
    ("prompt_en", "target", "english"),
    [
        ("Make the sentence bold.", "<b>Hà Nội</b> là thủ đô.", "<b>Hanoi</b> is the capital."),
        ("Escape this HTML.", "Đây là kết quả: &lt;b&gt;", "This is the result: &lt;b&gt;"),
        ("Write a program.", 'print("một\\nhai")', 'print("one\\ntwo")'),
        ("Which token ends a text? Answer in code.", "x = '</s>' + y[0]; z = {}", "x = '</s>' + y[0]; z = {}"),
        ("Translate into English: Hà Nội là thủ đô.", "Hanoi is the capital of the country.",
         "Hanoi is the capital of the country."),
        ("Which link?", "Xem https://vi.wikipedia.org/wiki/H%C3%A0_N%E1%BB%99i", "See it there."),
        ("Write a refrain.", "La la la la\nLa la la la\nHà Nội ơi", "La la la la\nLa la la la\nOh Hanoi"),
        ("What does it return?", "NaN", "NaN"),
        ("Where is it?", "Bonjour ! Comment ça va ? Où est la mairie ?", "Hello! How are you? Where is the town hall?"),
        ("Where was it?", "« À côté de l’été », dit-il : “MENÜ”, „Spaß“.", "Beside the summer, he said."),
        ("Who?", "Kỹ sư CAFÉ™ ở 21°C…", "An engineer of CAFÉ™ at 21°C"),
        ("Which family?", "👨‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️", "This one."),
        ("Why is it so?", "می‌خواهم به خانه بروم \u200fو \u2067abc\u2069 ببینم", "I want to go home."),
        ("Why is it so?", "क्\u200dष और \u0958लम श्री\u200cमान", "Because of it."),
        ("Why is it so?", "ភាសា\u200bខ្មែរ และภาษา\u200bไทย", "Because of it."),
        ("Which numbers?", "１２３、４５６。", "123, 456."),
    ],
)  # fmt: skip
def test_the_same_signs_where_they_are_right(prompt_en, target, english):
    assert kinds(Row("Câu hỏi", target, prompt_en, english)) == set()


@pytest.mark.parametrize("value", ["<noinput>", "nan", "NaN", "None", "N/A", "null", "#REF!"])
def test_an_input_without_content(value):
    assert kinds(replace(VIETNAMESE, input=value, input_en=value)) == {"placeholder"}
    prompt, prompt_en = f"{VIETNAMESE.prompt}\n{value}", f"{VIETNAMESE.prompt_en}\n{value}"
    assert kinds(replace(VIETNAMESE, prompt=prompt, prompt_en=prompt_en)) == {"placeholder"}
    assert kinds(replace(VIETNAMESE, prompt_en=prompt_en)) == {"placeholder_in_english"}


def test_escapes_on_both_sides():
    both = {"completion": f"&quot;{VI}&quot;", "completion_en": f"&quot;{VIETNAMESE.completion_en}&quot;"}
    assert kinds(replace(VIETNAMESE, **both)) == {"html_escapes"}


def test_lost_line_breaks():
    row = replace(VIETNAMESE, completion="một, hai, ba, bốn", completion_en="one\ntwo\nthree\nfour")
    assert kinds(row) == {"spacing"}
    assert kinds(replace(row, completion="một\nhai\nba\nbốn")) == set()


@pytest.mark.parametrize("language", ["sw", "zh"])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
def test_cut_answers(language, kept):
    rows = parallel_rows(language, 300)
    long = [row for row in rows if row.completion_en.count(".") >= 2][:20]
    for row in long:
        rows = with_row(rows, row.number, completion=row.completion[: int(kept * len(row.completion))])
    check = check_rows(rows, language=language)
    found, planted = set(numbers_of(check, "cut_answer")), {row.number for row in long}
    assert len(found & planted) >= 19
    assert found <= planted
    assert check.flagged == len(found)


def test_a_cut_chinese_answer_that_keeps_english_names():
    # In characters the kept half is longer than a whole answer: a Chinese character stands for three letters or so.
    rows = parallel_rows("zh", 300)
    names = ["Robert Downey", "Abraham Lincoln", "Marie Curie", "Elizabeth Taylor"]
    planted = [row for row in rows if row.completion_en.count(".") == 2][:10]
    for row in planted:
        english = f"{', '.join(names)} are known. {row.completion_en}"
        rows = with_row(rows, row.number, completion=f"{'、'.join(names)}众所周知。", completion_en=english)
    assert numbers_of(check_rows(rows, language="zh"), "cut_answer") == [row.number for row in planted]


def test_answers_without_full_stops_are_not_cut():
    rows = [replace(row, completion=row.completion.rstrip(".")) for row in parallel_rows("sw", 300)]
    assert "cut_answer" not in names_of(check_rows(rows, language="sw"))


def test_a_missing_list_item_is_a_cut():
    rows = parallel_rows("sw", 100)
    english = "\n".join(f"{n}. {row.completion_en}" for n, row in enumerate(rows[:6], 1))
    whole = "\n".join(f"{n}. {row.completion}" for n, row in enumerate(rows[:6], 1))
    assert "cut_answer" not in names_of(
        check_rows(with_row(rows, 9, completion=whole, completion_en=english), language="sw")
    )
    part = whole[: whole.index("4.")] + "4. Kwa"
    check = check_rows(with_row(rows, 9, completion=part, completion_en=english), language="sw")
    assert numbers_of(check, "cut_answer") == [9]
    (finding,) = next(problem for problem in check.problems if problem.name == "cut_answer").examples
    assert finding.note.startswith("no end, fewer lines or items, ")
    marker = whole[: whole.index("4.") + 2]
    check = check_rows(with_row(rows, 9, completion=marker, completion_en=english), language="sw")
    (finding,) = next(problem for problem in check.problems if problem.name == "cut_answer").examples
    assert "open bracket, list item or comma" in finding.note


@pytest.mark.parametrize(
    ("english", "target", "lost"),
    [("In 1922 it was 1,234.5 km.", "Năm 1922 là 1.234,5 km.", ""),
     ("On 12/25/2021 at 10:45 PM", "25-12-2021 lúc 22:45", ""),
     ("200,000 of 6.9 million", "690万中的20万", ""),
     ("It has 12,345 people", "有1万2345人", ""),
     ("Zip codes 60629,60632", "60629、60632", ""),
     ("There are 25 books", "هناك ٢٥ كتابا", ""),
     ("In the 1950s", "20 世纪 50 年代", ""),
     ("3 of 10 or 400", "ba phần mười, bốn trăm", ""),
     ("In 1922 it was so.", "Năm 1932 là vậy.", "answer: no 1922"),
     ("About 47,384 of them", "Khoảng 47.385 cái", "answer: no 47,384"),
     ("5.2 on average", "Trung bình 4,4", "answer: no 5.2"),
     ("It cost 120 dollars and 15 cents", "Giá 120 đô la", "answer: no 15")],
)  # fmt: skip
def test_lost_numbers(english, target, lost):
    row = Row("Câu hỏi", target, "Question", english)
    assert lost_number(*side_texts(row)) == lost


def test_rows_with_lost_numbers_are_found():
    rows = parallel_rows("sw", 100)
    row = rows[9]
    whole = {"completion": f"{row.completion} Namba 1922.", "completion_en": f"{row.completion_en} Number 1922."}
    assert "lost_number" not in names_of(check_rows(with_row(rows, 9, **whole), language="sw"))
    lost = {**whole, "completion": f"{row.completion} Namba 1932."}
    check = check_rows(with_row(rows, 9, **lost), language="sw")
    assert numbers_of(check, "lost_number") == [9]
    (problem,) = (problem for problem in check.problems if problem.name == "lost_number")
    assert (problem.defect, problem.examples[0].note) == (True, "answer: no 1922")
    # Another defect explains it.
    check = check_rows(with_row(rows, 9, **{**lost, "completion": "nan"}), language="sw")
    assert "lost_number" not in names_of(check)
