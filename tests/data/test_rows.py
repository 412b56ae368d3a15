"""One record in every accepted form, and what is said about a record that cannot be used."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pivotune.data.rows import ENGLISH_KEYS, Row, RowError, answered_turns, parse_row, record_id

ALPACA = {
    "instruction": "Tafsiri sentensi hii.",
    "input": "Jua linachomoza.",
    "output": "The sun rises.",
    "instruction_en": "Translate this sentence.",
    "input_en": "The sun rises.",
    "output_en": "Jua linachomoza.",
}
PLAIN = {"prompt": "ሰላም?", "completion": "ደህና ነኝ።", "prompt_en": "How are you?", "completion_en": "I am fine."}
TURNS = [
    {"role": "system", "content": "Jibu kwa ufupi."},
    {"role": "user", "content": "Hujambo?"},
    {"role": "assistant", "content": "Sijambo."},
    {"role": "user", "content": "Mbili jumlisha mbili?"},
    {"role": "assistant", "content": "Nne."},
]
ALLOWED_ROLES = "(allowed: system, developer, user, human, assistant, gpt, bot, model)"
TURNS_EN = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}]


def parse(record, *, need_target=True, need_english=True) -> Row:
    return parse_row(record, number=4, need_target=need_target, need_english=need_english)


def problem_of(record, **needs) -> str:
    with pytest.raises(RowError) as caught:
        parse(record, **needs)
    return f"{caught.value}{caught.value.note}"


def test_plain_form():
    expected = Row("ሰላም?", "ደህና ነኝ።", "How are you?", "I am fine.", id="am-1", number=4)
    assert parse({**PLAIN, "id": "am-1", "source": "else", "score_en": 3}) == expected


def test_alpaca_form_keeps_the_input_apart():
    row = parse(ALPACA)
    assert (row.prompt, row.input, row.completion) == ("Tafsiri sentensi hii.", "Jua linachomoza.", "The sun rises.")
    assert (row.prompt_en, row.input_en, row.completion_en) == (
        "Translate this sentence.",
        "The sun rises.",
        "Jua linachomoza.",
    )


@pytest.mark.parametrize("blank", [None, "", " \n", float("nan"), "absent"])
def test_alpaca_input_is_optional(blank):
    record = {key: value for key, value in ALPACA.items() if key != "input"}
    if blank != "absent":
        record["input"] = blank
    assert parse(record).input == ""


def test_chat_form_splits_history_query_and_answer():
    row = parse({"messages": TURNS, "messages_en": TURNS_EN})
    assert (row.prompt, row.completion) == ("Mbili jumlisha mbili?", "Nne.")
    assert row.history == tuple(TURNS[:3])
    assert (row.prompt_en, row.completion_en, row.history_en) == ("Two plus two?", "Four.", ())


def test_sharegpt_names_are_read_as_chat():
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in TURNS]
    chat = parse({"messages": TURNS}, need_english=False)
    assert parse({"conversations": turns}, need_english=False) == chat


@pytest.mark.parametrize("wrap", [json.dumps, lambda turns: np.array(turns, dtype=object), tuple])
def test_chat_as_json_text_array_or_tuple(wrap):
    assert parse({"messages": wrap(TURNS)}, need_english=False).history == tuple(TURNS[:3])


@pytest.mark.parametrize("wrap", [list, np.array])
def test_history_as_list_or_array(wrap):
    row = parse({**ALPACA, "history": wrap([["Habari?", "Nzuri."], ["Jina?", "Asha."]])}, need_english=False)
    assert [turn["content"] for turn in row.history] == ["Habari?", "Nzuri.", "Jina?", "Asha."]
    assert parse({**ALPACA, "history": wrap([])}, need_english=False).history == ()


@pytest.mark.parametrize("blank", ["", " ", None])
def test_blank_system_turn_is_left_out(blank):
    turns = [{"role": "system", "content": blank}, *TURNS_EN]
    assert parse({"messages": turns}, need_english=False).history == ()


def test_prompt_and_completion_win_on_each_side_alone():
    row = parse({**ALPACA, "prompt": "Swali", "completion": "Jibu"})
    assert (row.prompt, row.input, row.completion) == ("Swali", "", "Jibu")
    assert (row.prompt_en, row.input_en) == ("Translate this sentence.", "The sun rises.")


def test_a_complete_form_wins_over_half_of_another():
    assert parse({**ALPACA, "prompt": "Swali", "completion_en": "Answer"}) == parse(ALPACA)


def test_null_columns_of_another_form_do_not_count():
    row = parse({**ALPACA, "prompt": None, "completion": None, "messages": None, "prompt_en": float("nan")})
    assert row == parse(ALPACA)


@pytest.mark.parametrize(("needs", "expected"), [
    ({"need_english": False}, Row("ሰላም?", "ደህና ነኝ።", "", "", number=4)),
    ({"need_target": False}, "`completion_en` is empty"),
])  # fmt: skip
def test_only_a_needed_side_must_be_whole(needs, expected):
    record = {**PLAIN, "completion_en": "  "}
    if isinstance(expected, str):
        assert problem_of(record, **needs) == expected
        return
    row = parse(record, **needs)
    assert row == expected
    assert [turn.is_whole for turn in row.sides] == [True, False]


def test_a_side_that_is_not_needed_is_still_read():
    row = parse(PLAIN, need_target=False, need_english=False)
    assert all(turn.is_whole for turn in row.sides)


@pytest.mark.parametrize(("change", "problem"), [
    ({"completion": None}, "`completion` is missing"),
    ({"completion": ""}, "`completion` is empty"),
    ({"completion": "\u3000\n\t"}, "`completion` is empty"),
    ({"prompt": 12}, "`prompt` is a number, not text"),
    ({"prompt": True}, "`prompt` is a truth value, not text"),
    ({"prompt": ["a"]}, "`prompt` is a list, not text"),
    ({"prompt": {"a": 1}}, "`prompt` is an object, not text"),
    ({"prompt": b"a"}, "`prompt` is bytes, not text"),
    ({"prompt_en": float("nan")}, "`prompt_en` is missing"),
    ({"prompt_en": 1.5}, "`prompt_en` is a number, not text"),
    ({"completion_en": "\ud83d"}, "`completion_en` holds half of a surrogate pair, which is no character"),
])  # fmt: skip
def test_problems_of_a_text(change, problem):
    assert problem_of({**PLAIN, **change}) == problem


@pytest.mark.parametrize(("record", "problem"), [
    ({"prompt": "Swali", "completion": "Jibu"},
     "`prompt_en` is missing (the row has `prompt`, `completion`)"),
    ({"instruction": "Swali", "output": "Jibu"},
     "`instruction_en` is missing (the row has `instruction`, `output`)"),
    ({"question": "Swali", "answer": "Jibu"}, "`prompt` is missing (the row has `question`, `answer`)"),
    ({}, "`prompt` is missing (the row has no columns)"),
    ({f"column{n}": "x" for n in range(9)},
     "`prompt` is missing (the row has `column0`, `column1`, `column2`, `column3`, `column4`, `column5`, "
     "`column6`, `column7`, ...)"),
    ({**ALPACA, "input": 7}, "`input` is a number, not text"),
    ({**ALPACA, "output_en": None}, "`output_en` is missing"),
    (["Swali", "Jibu"], "the row is a list, not an object with named texts"),
    ("Swali", "the row is text, not an object with named texts"),
    (None, "the row is NoneType, not an object with named texts"),
])  # fmt: skip
def test_problems_of_a_record(record, problem):
    assert problem_of(record) == problem


@pytest.mark.parametrize(("messages", "problem"), [
    ([], "`messages` is empty"),
    ("", "`messages` is empty"),
    ("Hujambo", "`messages` is text, not a list of messages"),
    ('{"role": "user"}', "`messages` is an object, not a list of messages"),
    (5, "`messages` is a number, not a list of messages"),
    (TURNS[:4], "`messages` does not end with the assistant's answer"),
    (TURNS[-1:], "`messages` has no user turn right before the last answer"),
    ([TURNS[0], TURNS[-1]], "`messages` has no user turn right before the last answer"),
    (["Hujambo?"], "`messages` has text where a message with role and content should be"),
    ([{"role": "tool", "content": "x"}],
     f"`messages` has a message with role 'tool' {ALLOWED_ROLES}"),
    ([{"content": "x"}],
     f"`messages` has a message with role None {ALLOWED_ROLES}"),
    ([TURNS[1], {"role": "assistant", "content": " "}], "`messages` has a message whose text is empty"),
    ([TURNS[1], {"role": "assistant"}], "`messages` has a message whose text is missing"),
    ([TURNS[1], {"role": "assistant", "content": [{"type": "text"}]}],
     "`messages` has a message with a part whose text is missing"),
    ([TURNS[1], {"role": "assistant", "content": [{"type": "image"}]}],
     "`messages` has a message with a part of type 'image' (allowed: text)"),
    ("[{'role': 'user', 'content': 'x'}]", "`messages` is a Python literal, not JSON (write it with json.dumps)"),
])  # fmt: skip
def test_problems_of_a_chat(messages, problem):
    assert problem_of({"messages": messages}, need_english=False) == problem


def test_problem_of_the_english_chat_names_its_key():
    problem = problem_of({"messages": TURNS, "messages_en": TURNS_EN[:1]})
    assert problem == "`messages_en` does not end with the assistant's answer"


@pytest.mark.parametrize(("value", "text"), [
    ("sw-1", "sw-1"), (" sw-1 ", "sw-1"), (7, "7"), (np.int64(7), "7"), (0, "0"),
    (None, ""), ("", ""), (True, ""), (1.5, ""), (float("nan"), ""),
])  # fmt: skip
def test_record_id(value, text):
    assert record_id({"id": value}) == text


def test_record_without_id():
    assert record_id({}) == ""
    assert record_id(["id"]) == ""


def test_english_keys_are_those_of_all_forms():
    assert ENGLISH_KEYS == (
        "prompt_en",
        "completion_en",
        "instruction_en",
        "output_en",
        "messages_en",
        "conversations_en",
        "input_en",
    )


# ---- turns before ----

ASKED = [("Q1", "A1"), ("Q2", "A2")]


def chat(pairs, system: str = "", suffix: str = "") -> list[dict[str, str]]:
    turns = [{"role": "system", "content": system + suffix}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question + suffix}, {"role": "assistant", "content": answer + suffix}]
    return turns


def read(**record) -> Row:
    return parse_row(record, number=1, need_target=True, need_english=False)


@pytest.mark.parametrize("wrap", [list, json.dumps])
def test_alpaca_history_and_system_are_the_turns_before(wrap):
    row = read(instruction="Q3", output="A3", system="Be brief.", history=wrap([list(pair) for pair in ASKED]))
    assert list(row.history) == chat(ASKED, "Be brief.")
    assert (row.prompt, row.completion) == ("Q3", "A3")


def test_a_system_column_stands_before_a_conversation():
    row = read(conversations=chat([*ASKED, ("Q3", "A3")]), system="Be brief.")
    assert list(row.history) == chat(ASKED, "Be brief.")
    with pytest.raises(RowError, match="stands beside a system message"):
        read(messages=chat(ASKED, "Be kind."), system="Be brief.")


@pytest.mark.parametrize("history", ["x", [["Q1"]], [["Q1", ""]], [5], [["Q1", 5]]])
def test_a_history_that_is_no_list_of_pairs(history):
    with pytest.raises(RowError, match="history"):
        read(instruction="Q3", output="A3", history=history)


def test_conversational_prompt_and_completion():
    turns = chat([*ASKED, ("Q3", "A3")], "Be brief.")
    row = read(prompt=turns[:-1], completion=turns[-1:])
    assert row == read(messages=turns)
    assert (row.prompt, row.completion) == ("Q3", "A3")


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "3"}]
    assert read(messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": "A3"}]).prompt == "Q3"


def test_every_answer_of_a_conversation_with_its_english():
    pairs = [*ASKED, ("Q3", "A3")]
    row = read(messages=chat(pairs, "S"), messages_en=chat(pairs, suffix=" en"))
    found = answered_turns(row)
    assert [(one.prompt, one.completion, one.prompt_en, one.completion_en) for one in found] == [
        (question, answer, f"{question} en", f"{answer} en") for question, answer in pairs
    ]
    assert [list(one.history) for one in found] == [chat(pairs[:place], "S") for place in range(3)]
    assert [list(one.history_en) for one in found] == [chat(pairs[:place], suffix=" en") for place in range(3)]
    assert found[-1] is row


def test_english_with_other_turns_is_parallel_in_the_last_answer_only():
    row = read(messages=chat([*ASKED, ("Q3", "A3")]), messages_en=chat([("Q3", "A3")], suffix=" en"))
    assert answered_turns(row) == [row]
    alone = read(messages=chat([*ASKED, ("Q3", "A3")]))
    assert [one.completion for one in answered_turns(alone)] == ["A1", "A2", "A3"]
    assert answered_turns(read(prompt="q", completion="a")) == [read(prompt="q", completion="a")]
