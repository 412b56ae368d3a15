"""Normalisation, F1, exact match and language of answers: by hand, by properties, and by the harness on real answers."""

from __future__ import annotations

import importlib.util
import json
import random
import unicodedata
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivotune.evaluation.metrics.answers import (
    MIN_LETTERS,
    QUESTION_ANSWERING_METRICS,
    exact_match,
    f1_score,
    in_language,
    normalize_answer,
)

NORMALISED = [
    # MLQA's rules: articles are whole words of the language, and of no other.
    ("mlqa", "en", "The Cat's a  theatre, an!", "cats theatre"),
    ("mlqa", "es", "Los niños y la «casa»", "niños y casa"),
    ("mlqa", "de", "Der Rhein, dem Lieder", "rhein lieder"),
    ("mlqa", "de", "the der", "the"),
    ("mlqa", "vi", "Những chiếc xe của là ông Lành", "xe ông lành"),
    ("mlqa", "hi", "यह एक घर है।", "यह एक घर है"),
    # "ال" goes everywhere and parts a word that has it inside: قال -> ق, مالك -> م ك.
    ("mlqa", "ar", "الجامعة العربية", "جامعة عربية"),
    ("mlqa", "ar", "قال الرئيس؟", "ق رئيس"),
    ("mlqa", "ar", "مالك، الحزين؛", "م ك حزين"),
    # Chinese: a token per Han character, words for the rest, with and without spaces between them.
    ("mlqa", "zh", "《使用Python 3》语言，", "使 用 python 3 语 言"),
    ("mlqa", "zh", "1998 年", "1998 年"),
    # U+3400 stands outside the range of the official script: part of a word, not a token of its own.
    ("mlqa", "zh", "㐀ab中", "㐀ab 中"),
    # Punctuation is Unicode's and ASCII's symbols; other symbols stay.
    ("mlqa", "en", "“3+4” – 5€ ($6) ¿7?", "34 5€ 6 7"),
    ("mlqa", "el", "Ο Αχελώος;·", "ο αχελώος"),
    ("mlqa", "ru", "«Мир», а не — война", "мир а не война"),
    ("mlqa", "tr", "A Ankara'da", "a ankarada"),
    ("mlqa", "th", "ไทย 12", "ไ ท ย 1 2"),
    ("mlqa", "ja", "東京 AB。", "東 京 a b"),
    ("mlqa", "my", "မြန် မာ", "မ ြ န ် မ ာ"),
    ("mlqa", "", "The end.", "the end"),
    # MKQA's rules: only ASCII's punctuation goes, Chinese is cut at every character.
    ("mkqa", "en", "“The” Beatles!", "“ ” beatles"),
    ("mkqa", "zh", "1998年。", "1 9 9 8 年 。"),
    ("mkqa", "zh_hk", "Q 1·", "q 1 ·"),
    ("mkqa", "km", "ទេ ០", "ទ េ ០"),
    ("mkqa", "sv", "En bil, ett hus", "bil hus"),
    ("mkqa", "no", "Ei bok, et hus", "bok hus"),
    ("mkqa", "da", "et hus ei", "hus ei"),
    ("mkqa", "nl", "De kat van het huis", "kat van huis"),
    ("mkqa", "pt-BR", "O rio e as casas", "rio e casas"),
    ("mkqa", "fi", "Se yksi talo", "talo"),
    ("mkqa", "hu", "Az egy ház", "ház"),
    # As the official pattern has it: an article at the beginning of a word goes too, and only the first that fits.
    ("mkqa", "fr", "Le lemon, les amis", "mon s amis"),
    ("mkqa", "it", "gli unici della notte", "ici la notte"),
    ("mkqa", "ko", "한국, 사람", "한국 사람"),
]


@pytest.mark.parametrize(("rules", "language", "text", "expected"), NORMALISED)
def test_normalised_text(rules, language, text, expected):
    assert normalize_answer(text, language, rules) == expected


# Tokens of the prediction, tokens of the gold answer, common ones, and F1 = 2 * common / (prediction + gold).
WORKED = [
    # thủ đô hà nội việt nam (6: "là" is an article), thủ đô việt nam (4: "của" is one), 4 common: 8 / 10
    ("mlqa", "vi", "Thủ đô là Hà Nội, Việt Nam.", "thủ đô của Việt Nam", 0.8),
    # hà nội (2), hà nội việt nam (4), 2 common: P = 1, R = 1/2: 4 / 6
    ("mlqa", "vi", "Hà Nội", "Hà Nội (Việt Nam)", 2 / 3),
    # جامعة دول عربية (3), جامعة عربية (2), 2 common: 4 / 5
    ("mlqa", "ar", "جامعة الدول العربية", "الجامعة العربية", 0.8),
    # ق رئيس (2), رئيس (1), 1 common: 2 / 3; a rule for beginnings of words only has the same count here ...
    ("mlqa", "ar", "قال الرئيس", "الرئيس", 2 / 3),
    # ... but not here: م ك (2), م (1), 1 common: 2 / 3, where whole words have nothing in common
    ("mlqa", "ar", "مالك", "مال", 2 / 3),
    # 在 1998 年 (3), 1998 年 (2), 2 common: 4 / 5
    ("mlqa", "zh", "在1998年。", "1998年", 0.8),
    # 1999 年 (2), 1998 年 (2), 1 common: 2 / 4
    ("mlqa", "zh", "1999年", "1998年", 0.5),
    # 北 京 大 学 (4), 大 北 京 (3), 3 common in any order: 6 / 7
    ("mlqa", "zh", "北京大学", "大北京", 6 / 7),
    # am rhein fluss (3: "dem" is an article), rhein (1), 1 common: 2 / 4
    ("mlqa", "de", "am Rhein, dem Fluss", "der Rhein", 0.5),
    # neue neue welt (3), neue welt neue neue (4), 3 common, "neue" twice: 6 / 7
    ("mlqa", "de", "Die neue, neue Welt", "neue Welt: neue! neue?", 6 / 7),
    # 1 9 9 9 年 (5), 1 9 9 8 年 (5), common 1 9 9 年 (4): 8 / 10
    ("mkqa", "zh", "1999年", "1998年", 0.8),
    # ร ั ก (3), ร ั ก ไ ท ย (6), 3 common: 6 / 9
    ("mkqa", "th", "รัก", "รักไทย", 2 / 3),
    ("mlqa", "vi", "Sài Gòn", "Hà Nội", 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "language", "prediction", "gold", "expected"), WORKED)
def test_f1_worked_by_hand(rules, language, prediction, gold, expected):
    assert f1_score(prediction, [gold], language, rules) == pytest.approx(expected, abs=1e-12)


def test_the_best_gold_answer_counts():
    golds = ["Paris", "die Stadt Berlin", "Berlin"]
    # stadt berlin (2) against berlin hauptstadt (2) is 1/2; berlin (1) is 2/3.
    assert f1_score("Hauptstadt Berlin", golds, "de") == pytest.approx(2 / 3)
    assert exact_match("das Berlin.", golds, "de") == 1.0
    assert exact_match("Berlin Stadt", golds, "de") == 0.0


@pytest.mark.parametrize("prediction", ["", "  \n", "...", "the"])
def test_an_answer_without_tokens_scores_nothing_unless_none_is_right(prediction):
    assert f1_score(prediction, ["Berlin"], "en") == exact_match(prediction, ["Berlin"], "en") == 0.0
    assert f1_score(prediction, ["Berlin", ""], "en", "mkqa") == exact_match(prediction, ["", "x"], "en", "mkqa") == 1.0
    # MLQA's script counts common tokens first and finds none, for any gold answer.
    assert f1_score(prediction, ["A."], "en") == 0.0
    assert exact_match(prediction, ["A."], "en") == 1.0
    assert f1_score("Berlin", [""], "en", "mkqa") == 0.0


def test_there_must_be_a_gold_answer():
    with pytest.raises(ValueError, match="empty"):
        f1_score("x", [], "en")
    with pytest.raises(ValueError, match="empty"):
        exact_match("x", [], "en")


def test_metrics_are_percentages_of_what_is_scored():
    assert [(metric.name, metric.form, metric.fields, metric.scale) for metric in QUESTION_ANSWERING_METRICS] == [
        ("f1", "mean", ("f1",), 100.0),
        ("exact_match", "mean", ("exact_match",), 100.0),
    ]


def test_long_answers_take_linear_time():
    text = "la 中" * 200_000
    for rules in ("mlqa", "mkqa"):
        for language in ("es", "zh", "fr", "th"):
            assert f1_score(text, [text], language, rules) == 1.0


LETTERS = st.text("abcdefhijklmnoprstuvwz áđộ中文国年1234 الجدمن")
LANGUAGES = st.sampled_from(["en", "es", "hi", "vi", "de", "ar", "zh", "ru", "th", "ja", "fr", "it", "zh_tw"])
RULES = st.sampled_from(["mlqa", "mkqa"])


@given(LETTERS, LETTERS, LANGUAGES, RULES)
def test_f1_is_symmetric_and_bounded_and_one_exactly_for_the_same_bag_of_tokens(one, other, language, rules):
    f1 = f1_score(one, [other], language, rules)
    assert 0.0 <= f1 <= 1.0
    assert f1 == f1_score(other, [one], language, rules)
    bags = [sorted(normalize_answer(text, language, rules).split()) for text in (one, other)]
    if any(bags):
        assert (f1 == 1.0) == (bags[0] == bags[1])
        assert f1 >= exact_match(one, [other], language, rules)


@given(st.text(), LANGUAGES, RULES)
def test_any_text_is_scored_and_copying_the_gold_answer_is_perfect(text, language, rules):
    assert exact_match(text, [text], language, rules) == 1.0
    tokens = normalize_answer(text, language, rules)
    assert f1_score(text, [text], language, rules) == (1.0 if tokens or rules == "mkqa" else 0.0)
    assert tokens == " ".join(tokens.split())


@given(LETTERS, LANGUAGES, st.randoms(use_true_random=False))
def test_case_punctuation_and_more_white_space_change_nothing(text, language, rng: random.Random):
    marked = "".join(rng.choice(["", "!", "，", "؟", "—", "'"]) + character for character in text.upper())
    assert normalize_answer(f"\n{marked.replace(' ', '  ')}。", language) == normalize_answer(text, language)


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """lm-evaluation-harness's own port of MLQA's script."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm-eval is not installed")
    path = Path(found.origin).parent / "tasks" / "mlqa" / "utils.py"
    spec = importlib.util.spec_from_file_location("harness_mlqa", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gold_answers(path: Path) -> list[str]:
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [
        answer["text"]
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
        for answer in question["answers"]
    ]


def worsened(answer: str, other: str, rng: random.Random) -> str:
    """Something a model might say: part of the answer, in other case, with another answer's beginning and a mark."""
    start = rng.randrange(len(answer))
    return (
        f"{answer[start:].upper() if rng.random() < 0.5 else answer} {other[: rng.randrange(12)]}{rng.choice('.。, ')}"
    )


# Arabic is not among them: the harness takes "ال" from beginnings of words only, the official script everywhere.
@pytest.mark.parametrize("language", ["vi", "zh", "en"])
def test_agrees_with_the_harness_on_real_answers(language, harness, shared_data):
    rng = random.Random(0)
    xquad = gold_answers(shared_data / "eval" / "xquad" / f"xquad.{language}.json")
    mlqa = gold_answers(shared_data / "eval" / "mlqa" / f"dev-context-{language}-question-{language}.json")
    answers = [*xquad, *mlqa]
    scores = []
    for answer in answers:
        prediction = worsened(answer, rng.choice(answers), rng)
        assert normalize_answer(prediction, language) == harness.normalize_answer(prediction, language)
        scores.append(f1_score(prediction, [answer], language))
        assert scores[-1] == pytest.approx(harness.f1_score(prediction, answer, language), abs=1e-12)
        matches = harness.exact_match_score(prediction, answer, language)
        assert exact_match(prediction, [answer], language) == matches
    assert 0.3 < sum(scores) / len(scores) < 0.95  # some right, some wrong, most between


@given(
    text=st.text("abcdeinrstDASEIN ,.-„“áñ中文«»$+ الل"), language=st.sampled_from(["de", "es", "hi", "en", "vi", "zh"])
)
def test_agrees_with_the_harness_on_any_text(text, language, harness):
    assert normalize_answer(text, language) == harness.normalize_answer(text, language)


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
def test_short_texts_and_texts_without_a_language_are_undecided(text):
    assert in_language(text, "vi") is None


def test_the_shortest_decided_text():
    text = "Tôi muốn đi ngủ ngay thôi"
    assert sum(map(str.isalpha, text)) == MIN_LETTERS
    assert in_language(text, "vi") is True
    assert in_language(text[:-1], "vi") is None


@pytest.mark.parametrize("code", ["ace_Latn", "min_Arab", "arb_Latn", "tum_Latn", "klingon"])
def test_languages_unknown_to_the_detector_are_undecided(code):
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
