"""The language of answers, right and wrong, short and long."""

from __future__ import annotations

import unicodedata

import pytest

from pivotune.evaluation.metrics.answer_language import MIN_LETTERS, in_language

TEXTS = {
    "vi": "Lẽ ra anh ấy phải thận trọng hơn khi đi qua đường.",
    "en": "He should have been more careful when crossing the road.",
    "zh": "他过马路的时候应该更加小心一点才对。",
    "ar": "كان يجب عليه أن يكون أكثر حذرا عند عبور الطريق.",
    "ja": "道を渡るときはもっと気をつけるべきだった。",
    "de": "Er hätte beim Überqueren der Straße vorsichtiger sein sollen.",
    "ru": "Ему следовало быть осторожнее, когда он переходил дорогу.",
}


@pytest.mark.parametrize("asked", TEXTS)
@pytest.mark.parametrize("written", TEXTS)
def test_every_language_is_told_from_every_other(asked, written):
    assert in_language(TEXTS[written], asked) is (asked == written)


@pytest.mark.parametrize("code", ["zh_cn", "zh_hk", "zh_tw", "zho_Hans", "zho_Hant", "yue_Hant", "cmn"])
def test_all_codes_of_chinese(code):
    assert in_language(TEXTS["zh"], code) is True
    assert in_language(TEXTS["ja"], code) is False
    assert in_language(TEXTS["en"], code) is False


@pytest.mark.parametrize(("code", "text"), [("vie_Latn", "vi"), ("arb_Arab", "ar"), ("ara", "ar"), ("deu", "de")])
def test_codes_of_the_sets(code, text):
    assert in_language(TEXTS[text], code) is True
    assert in_language(TEXTS["en"], code) is False


@pytest.mark.parametrize(
    "text",
    ["", "   ", "1879", "¿?!…", "308", "Denver Broncos", "Đúng.", "北京大学", "```\nprint(1)\n``` xin chào các bạn"],
)
def test_what_is_too_short_or_has_no_language_is_not_told(text):
    assert in_language(text, "vi") is None


def test_the_shortest_text_that_is_told():
    text = "Tôi muốn đi ngủ ngay thôi"
    assert sum(map(str.isalpha, text)) == MIN_LETTERS
    assert in_language(text, "vi") is True
    assert in_language(text[:-1], "vi") is None


@pytest.mark.parametrize("code", ["ace_Latn", "min_Arab", "arb_Latn", "tum_Latn", "klingon"])
def test_languages_that_the_detector_does_not_know_are_not_told(code):
    assert in_language(TEXTS["en"], code) is None


def test_line_breaks_capitals_and_decomposed_letters_do_not_matter():
    for text in (TEXTS["vi"].replace(" ", "\n"), TEXTS["vi"].upper(), unicodedata.normalize("NFD", TEXTS["vi"])):
        assert in_language(text, "vi") is True
        assert in_language(text, "en") is False


def test_real_sentences(shared_data):
    folder = shared_data / "eval" / "tatoeba"
    for code, name in (("vi", "vie-eng.vie"), ("ar", "ara-eng.ara"), ("zh", "cmn-eng.cmn"), ("en", "vie-eng.eng")):
        lines = (folder / f"tatoeba.{name}").read_text(encoding="utf-8").splitlines()
        told = [found for line in lines if (found := in_language(line, code)) is not None]
        assert len(told) > 300
        assert sum(told) / len(told) > 0.99
        other = "en" if code == "vi" else "vi"
        wrong = [found for line in lines if (found := in_language(line, other)) is not None]
        assert sum(wrong) / len(wrong) < 0.005
