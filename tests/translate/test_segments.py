from __future__ import annotations

import json

import pytest
from conftest import SHARED
from hypothesis import example, given
from hypothesis import strategies as st

from pivotune.translate.segments import protected_spans, split_text, translate_texts

PROTECTED = ["`x = 1`", "``a`b``", "https://example.com/a?b=c#d", "www.example.com/x", "jane.doe@example.org", "{name}",
             "{{ user.name }}", "<name>", "</b>", "%s", "%(count)d", "%.2f", "[NAME]", "[YOUR_NAME 2]"]  # fmt: skip
WORDS = [
    "Hello",
    "three tips",
    "Dr. Who said so.",
    "3.5 million",
    "50% of it",
    "Größe",
    "你好",
    "a < b",
    "{",
    "`",
    "[x]",
]
MARKERS = ["1. ", "1.", "(a) ", "iv) ", "- ", "  * ", "- [ ] ", "## ", "> ", "• ", "2) "]
BREAKS = ["\n", "\n\n", "\r\n", "\r", "\u2028", "\x85", " \n\t"]
CODE = ["```python\nprint('Hello you')\n```", "~~~\nHello you\n~~~", "```\nleft open\n", "for x in y:\n    print(x)"]
texts = st.one_of(
    st.text(max_size=60),
    st.lists(st.sampled_from([*PROTECTED, *WORDS, *MARKERS, *BREAKS, " "]), max_size=12).map("".join),
)
hostile = {
    "upper case": str.upper,
    "nothing": lambda text: "",
    "blank": lambda text: " \n\u2028",
    "reversed": lambda text: text[::-1],
    "another": lambda text: "See https://evil.example, `rm` and {other} or %d\nat [END] \ud800",
    "line breaks": lambda text: f"{text}\n\r\n\u2028\x85and {text.split()[0]}\ud800",
    "without marks": lambda text: "".join(c for c in text if c.isalnum()),
    "twice": lambda text: f"{text} {text}",
}


def translate(text: str, change) -> str:
    (translated,) = translate_texts([text], lambda units: [change(unit) for unit in units], {})
    return translated


@given(texts)
@example("x = 1;\n\n" * 3)
@example("```\n``` \n```")
def test_pieces_and_an_identical_translation_give_the_text_back(text):
    assert "".join(piece.text for piece in split_text(text)) == text
    assert translate(text, lambda unit: unit).encode(errors="replace") == text.encode(errors="replace")


@pytest.mark.parametrize("change", hostile.values(), ids=hostile)
@given(marker=st.sampled_from(["", *MARKERS]), spans=st.lists(st.sampled_from(PROTECTED), max_size=4), data=st.data())
def test_protected_spans_survive_every_translator(change, marker, spans, data):
    words = [data.draw(st.sampled_from(["Hello", "three tips", "is it?"])) for _ in range(len(spans) + 1)]
    line = " ".join([words[0], *(part for pair in zip(spans, words[1:], strict=True) for part in pair)])
    line_break, code = data.draw(st.sampled_from(BREAKS)), data.draw(st.sampled_from(CODE))
    translated = translate(f"{marker}{line}{line_break}{marker}Hello\n{code}", change)
    assert translated.startswith(marker)
    assert protected_spans(translated.removesuffix(code)) == sorted(spans)
    assert translated.endswith(f"\n{code}")
    assert translated.count(line_break) == (2 if line_break == "\n" else 1) + code.count(line_break)
    assert translated.encode()  # no half of a surrogate pair


def test_a_line_is_translated_whole_where_its_spans_survive():
    seen = []

    def swap(units):
        seen.extend(units)
        return [unit.replace("Mail {name} at", "An {name} schreiben:") for unit in units]

    assert translate_texts(["1. Mail {name} at x@y.org "], swap, {}) == ["1. An {name} schreiben: x@y.org "]
    assert seen == ["Mail {name} at x@y.org"]


def test_a_line_whose_spans_are_lost_is_translated_between_them():
    seen = []

    def lose(units):
        seen.extend(units)
        return [unit.upper() for unit in units]

    assert translate_texts(["Mail {name} at x@y.org."], lose, {}) == ["MAIL {name} AT x@y.org."]
    assert seen == ["Mail {name} at x@y.org.", "Mail", "at"]


def test_each_line_is_translated_once():
    seen, known = [], {}

    def mark(units):
        seen.extend(units)
        return [f"<{unit}" for unit in units]

    first = translate_texts(["Hello\nHello", "- Hello\nBye"], mark, known)
    assert translate_texts(["Bye"], mark, known) == ["<Bye"]
    assert first == ["<Hello\n<Hello", "- <Hello\n<Bye"]
    assert seen == ["Hello", "Bye"]


@pytest.mark.parametrize(
    "text",
    ["def f(x):\n    return x + 1\n\nprint(f(2))", "SELECT name FROM users;", "let x = [1, 2];\nx.sort()", "12 + 3 = 15",
     "<ul>\n  <li>One</li>\n</ul>", "https://example.com/a", "import numpy as np\n# a comment\nx = np.zeros(3)", "A" * 300],
)  # fmt: skip
def test_code_and_texts_without_words_are_not_translated(text):
    assert translate(text, lambda unit: "X") == text


@pytest.mark.parametrize(
    "text",
    ["For example: apples; pears;", "from the beginning", "Class is over.", "If it rains (often), stay.", "A. Lincoln",
     "The speed = distance over time", "3.5 million people", "return to sender"],
)  # fmt: skip
def test_english_that_looks_like_code_is_translated(text):
    assert "X" in translate(text, lambda unit: "X")


def test_real_rows_come_back_whole():
    path = SHARED / "data" / "train" / "zh.jsonl.gz"
    if not path.exists():
        pytest.skip("shared/data is absent")
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(1000), file, strict=False)]
    texts = [row[key] for row in rows for key in ("prompt_en", "completion_en")]
    assert translate_texts(texts, list, {}) == texts
