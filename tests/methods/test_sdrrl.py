from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from cli_runs import set_options, write_config, write_jsonl
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.cli.main import main
from pivotune.config.registry import METHODS
from pivotune.config.settings import EncodingConfig, SdrrlConfig
from pivotune.config.yaml_text import parse_config
from pivotune.data.datasets import training_examples
from pivotune.data.rows import Row
from pivotune.errors import UsageError
from pivotune.methods.base import required_sides
from pivotune.methods.sdrrl import WordSwitcher, complete_answer
from pivotune.training.arguments import DeepSupervisionConfig
from pivotune.training.preparation import encode_dataset, rewritten

ROW = Row("Nne ni namba?", "Ndiyo, ni namba.", "Is four a number?", "Yes, it is a number.", "nne", "four")
WEIGHTS = ("target_target", "target_english", "english_target", "english_english", "translation", "completion")
KINDS = {
    ("Nne ni namba?", "Ndiyo, ni namba."): "target_target",
    ("Nne ni namba?\n\nAnswer in English.", "Yes, it is a number."): "target_english",
    ("Is four a number?\n\nAnswer in Swahili.", "Ndiyo, ni namba."): "english_target",
    ("Is four a number?", "Yes, it is a number."): "english_english",
    ("Translate into English:\n\nNdiyo, ni namba.", "Yes, it is a number."): "into English",
    ("Translate into Swahili:\n\nYes, it is a number.", "Ndiyo, ni namba."): "into Swahili",
    ("Complete the following text:\n\nNdiyo, ni", "namba."): "completion",
}


def rows_of(count: int, *, seed: int = 0, language: str | None = "sw", row: Row = ROW, **own) -> list[Row]:
    own = {"code_switching": {"share": 0}, **own}
    settings = SimpleNamespace(
        method="sdrrl", sdrrl=SdrrlConfig(**own), seed=seed, data=EncodingConfig(language=language)
    )
    return list(rewritten([row] * count, settings))


def kinds(count: int, **own) -> list[str]:
    found = []
    for row in rows_of(count, **own):
        kind = KINDS[row.prompt, row.completion]
        assert row.input == {"target": "nne", "englis": "four"}.get(kind[:6], "")
        found.append(kind)
    return found


def only(*names: str, **weights: float) -> dict[str, float]:
    return {**dict.fromkeys(WEIGHTS, 0.0), **dict.fromkeys(names, 1.0), **weights}


def test_every_kind_by_its_weight():
    found = kinds(120)
    assert Counter(found) == {
        **dict.fromkeys(WEIGHTS[:4], 20),
        "into English": 10,
        "into Swahili": 10,
        "completion": 20,
    }
    assert kinds(120) == found
    assert kinds(120, seed=1) != found
    # Shuffled: the first rows hold more than one kind.
    assert len(set(found[:10])) > 2
    assert Counter(kinds(80, **only("translation", completion=3))) == {
        "into English": 10, "into Swahili": 10, "completion": 60,
    }  # fmt: skip


def test_the_language_of_an_answer_can_stay_unnamed():
    weights = only("target_english", "english_target")
    assert {(row.prompt, row.completion) for row in rows_of(8, name_language=False, language=None, **weights)} == {
        ("Nne ni namba?", "Yes, it is a number."), ("Is four a number?", "Ndiyo, ni namba."),
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), [("translation", "translation"), ("english_target", "name_language")])
def test_prompts_that_name_the_language_need_it(kind, key):
    with pytest.raises(UsageError, match=rf"^sdrrl\.{key}: prompts name the language; set data\.language$"):
        rows_of(4, language=None, **only(kind))
    assert len(rows_of(4, language=None, **only("target_english", "completion"))) == 4


@pytest.fixture
def dictionary(tmp_path) -> str:
    (tmp_path / "words.tsv").write_text("four\tnne\nnumber\tnamba\n", encoding="utf-8")
    return str(tmp_path / "words.tsv")


def test_code_switching_replaces_words_of_prompts(dictionary):
    switching = {"share": 1, "probability": 1, "dictionary": dictionary}
    found = {(row.prompt, row.input, row.completion) for row in rows_of(120, code_switching=switching)}
    assert found == {
        ("Four ni number?", "four", "Ndiyo, ni namba."),
        ("Four ni number?\n\nAnswer in English.", "four", "Yes, it is a number."),
        ("Is nne a namba?\n\nAnswer in Swahili.", "nne", "Ndiyo, ni namba."),
        ("Is nne a namba?", "nne", "Yes, it is a number."),
        *((*prompt_and_answer[:1], "", prompt_and_answer[1]) for prompt_and_answer, kind in KINDS.items()
          if kind not in WEIGHTS[:4] or kind == "completion"),
    }  # fmt: skip


def test_share_and_probability_of_code_switching(dictionary):
    weights = only("target_target")
    half = rows_of(400, code_switching={"share": 0.5, "probability": 1, "dictionary": dictionary}, **weights)
    assert Counter(row.prompt for row in half) == {"Four ni number?": 200, "Nne ni namba?": 200}
    words = rows_of(400, code_switching={"share": 1, "probability": 0.25, "dictionary": dictionary}, **weights)
    replaced = sum(
        word in ("Four", "number", "four") for row in words for word in (*row.prompt[:-1].split(), row.input)
    )
    # 1,200 words with a counterpart; the standard deviation is 15.
    assert 240 < replaced < 360
    again = rows_of(400, code_switching={"share": 1, "probability": 0.25, "dictionary": dictionary}, **weights)
    assert again == words


def test_several_languages_have_names_and_words_of_their_own(dictionary):
    swahili = Row("Nne ni namba", "Ndiyo", "Four is a number", "Yes", language="sw")
    german = Row("Vier sind nett", "Ja", "Four is a number", "Yes", language="de")
    settings = SimpleNamespace(
        method="sdrrl",
        sdrrl=SdrrlConfig(**only("english_target"), code_switching={"share": 1, "probability": 1}),
        seed=0,
        data=EncodingConfig(language=["sw", "de"]),
    )
    words = {"sw": ("Nne", "ni", "namba"), "de": ("Vier", "sind", "nett")}
    other = [Row(f"{words[code][0]} {code}x", "Ndiyo", "Four only", "Yes", language=code) for code in ("sw", "de")]
    rows = list(rewritten([swahili, german, *other] * 8, settings))
    assert {row.prompt for row in rows[::4]} == {"Nne is a number\n\nAnswer in Swahili."}
    assert {row.prompt for row in rows[1::4]} == {"Vier is a number\n\nAnswer in German."}
    settings.sdrrl = SdrrlConfig(code_switching={"dictionary": dictionary})
    with pytest.raises(UsageError, match=r"dictionary: it has one language, and the rows have sw, de; leave it out"):
        rewritten(rows, settings)


def test_words_of_a_script_without_spaces_are_the_longest_known_ones():
    switcher = WordSwitcher({"水": "water", "水果": "fruit", "我": "I", "apple": "苹果"}, 1.0)
    generator = np.random.default_rng(0)
    assert switcher.switch("我我喜欢水果和水, Apple", generator) == "I I 喜欢 fruit 和 water, 苹果"
    assert switcher.switch("水 http", generator) == "water http"


@pytest.mark.parametrize(
    ("answer", "beginning", "rest"),
    [("one two three four", "one two", "three four"), (" first line\nsecond line ", "first line", "second line"),
     ("ก่อนที่ดี", "ก่อน", "ที่ดี"), ("我喜欢水果。", "我喜欢", "水果。"), ("Ja bitte sehr", "Ja bitte", "sehr")],
)  # fmt: skip
def test_an_answer_is_cut_near_its_middle(answer, beginning, rest):
    row = complete_answer(Row("q", answer, "q", "a", "input"))
    assert (row.prompt, row.completion) == (f"Complete the following text:\n\n{beginning}", rest)
    assert (row.input, row.prompt_en, row.completion_en) == ("", "q", "a")


def test_an_answer_of_one_word_stays_with_its_question():
    row = Row("q", "Ndiyo.", "q", "Yes.")
    assert complete_answer(row) is row


@pytest.mark.parametrize(
    ("own", "message"),
    [(only(), "sdrrl: all weights are 0; allowed: at least one above 0"),
     ({"translation": -1}, r"sdrrl\.translation: -1 is not allowed; allowed: at least 0"),
     ({"code_switching": {"share": 0, "dictionary": "a.tsv"}}, "share: 0 does not use the dictionary"),
     ({"code_switching": {"probability": 0}}, r"sdrrl\.code_switching\.probability: 0 is not allowed"),
     ({"code_switch": {}}, r"unknown key sdrrl\.code_switch; did you mean sdrrl\.code_switching\?")],
)  # fmt: skip
def test_settings_without_effect_are_refused(own, message):
    config = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "run", "sdrrl": own}
    with pytest.raises(UsageError, match=message):
        parse_config(config)


def test_the_trainer_trains_the_rewritten_rows_without_replay(tmp_path):
    tokenizer, model = build_tiny_tokenizer(), build_tiny_model()
    args = DeepSupervisionConfig(
        output_dir=str(tmp_path),
        method="sdrrl",
        sdrrl={**only("english_target"), "name_language": False, "code_switching": {"share": 0}},
        report_to="none",
    )
    rows = tiny_rows(6)
    pairs = encode_dataset(rows, args, tokenizer, model.config)
    plain = encode_dataset(
        rows,
        DeepSupervisionConfig(output_dir=str(tmp_path), method="cross-lingual"),
        tokenizer,
        model.config,
        heldout=True,
    )
    examples = training_examples(pairs, METHODS["sdrrl"], english_ratio=0.25, seed=0)
    for example, pair in zip(examples, plain, strict=True):
        start = example.main.answer
        assert example.main.ids[:start].tolist() == pair.english.ids[: pair.english.answer].tolist()
        assert example.main.ids[start:].tolist() == pair.target.ids[pair.target.answer :].tolist()
        assert example.parallel is None
    sides = required_sides(METHODS["sdrrl"], 0.25, heldout=True)
    assert (sides.target, sides.english) == (True, False)


def test_trained_from_yaml(tmp_path, dictionary, capsys):
    build_tiny_model().save_pretrained(tmp_path / "model")
    build_tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", tiny_rows(24))
    config = write_config(tmp_path, tmp_path / "model", rows, method="sdrrl", seed=1)
    capsys.readouterr()
    missing = set_options(["sdrrl.code_switching.dictionary=no.tsv"])
    assert main(["train", str(config), *missing]) == 2
    error = capsys.readouterr().err
    assert (
        error == "pivotune: error: sdrrl.code_switching.dictionary: no.tsv: cannot be read: No such file or directory\n"
    )
    assert not (tmp_path / "run").exists()
    given = set_options([f"sdrrl.code_switching.dictionary={dictionary}", "sdrrl.translation=0"])
    assert main(["train", str(config), *given]) == 0
    assert "method   sdrrl" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "SDRRL (our reading)" in card
    assert "rows are their English" not in card
