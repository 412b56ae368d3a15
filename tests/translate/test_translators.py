"""Language tokens of each family, sentences, and converted models."""

from __future__ import annotations

import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from tiny_translators import FAMILIES, save_tiny_translator

import pivotune.translate.batches as batches
from pivotune.errors import UsageError
from pivotune.translate.translators import find_language_token, prepare_translator


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    names = {"marian-pair": {"source_lang": "en", "target_lang": "sw"}}
    base = tmp_path_factory.mktemp("translators")
    return {family: save_tiny_translator(base / family, family, **names.get(family, {})) for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "wanted", "token"),
    [("nllb", "zh", "zho_Hans"), ("nllb", "zh-TW", "zho_Hant"), ("nllb", "vie", "vie_Latn"), ("m2m", "sw", "__sw__"),
     ("m2m", "zh-TW", None), ("madlad", "zh", "<2zh>"), ("madlad", "vi", None), ("marian", "sw", ">>swh<<"),
     ("marian", "pt", ">>por<<"), ("marian", "pt-BR", ">>pt_BR<<"), ("marian", "vi", None)],
)  # fmt: skip
def test_tokens_of_languages(family, wanted, token):
    found = find_language_token(FAMILIES[family][1], wanted)
    assert (found and found.token) == token
    assert found is None or found.is_prefix == (family in ("madlad", "marian"))


def test_tokens_of_mbart():
    assert find_language_token(["pt_XX", "en_XX", "vi_VN"], "vi") == ("vi_VN", "vi_VN", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_reads_the_tokens_of_its_family(folders, family, monkeypatch):
    translator = prepare_translator(str(folders[family]), "sw")()
    model, tokenizer = translator.model, translator.tokenizer
    calls = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: calls.append(options) or generate(**options))
    assert len(translator(["Hello you", "It"])) == 2
    (call,) = calls
    texts = tokenizer.batch_decode(call["input_ids"])
    begin = {"madlad": "<2sw>", "marian": ">>swh<<"}.get(family)
    if begin:
        assert sorted(text.replace("<pad>", "") for text in texts) == [f"{begin} Hello you", f"{begin} It"]
    forced = {"nllb": "swh_Latn", "m2m": "__sw__"}.get(family)
    assert call.get("forced_bos_token_id") == (tokenizer.convert_tokens_to_ids(forced) if forced else None)
    assert call["do_sample"] is False
    assert getattr(tokenizer, "src_lang", None) == {"nllb": "eng_Latn", "m2m": "en"}.get(family)
    assert model.generation_config.num_beams == (None if family == "madlad" else 2)


def test_forced_token_begins_the_translation(folders):
    """The model of the test above, greedy: generation starts with the target's token."""
    translator = prepare_translator(str(folders["nllb"]), "sw")()
    inputs = translator.tokenizer(["Hello"], return_tensors="pt")
    wanted = translator.tokenizer.convert_tokens_to_ids("swh_Latn")
    output = translator.model.generate(inputs["input_ids"], forced_bos_token_id=wanted, max_new_tokens=20, num_beams=1)
    translator.model.generation_config.num_beams = 1
    expected = translator.tokenizer.decode(output[0], skip_special_tokens=True).strip()
    assert translator(["Hello"])[0][: len(expected)] == expected


def test_sentences_are_translated_once_in_batches_of_similar_length(folders, monkeypatch):
    translator = prepare_translator(str(folders["nllb"]), "sw")()
    sizes = []
    monkeypatch.setattr(
        translator,
        "_generate",
        lambda texts, first: sizes.append(texts) or [f"<{text}>" if text != "Gone." else " " for text in texts],
    )
    monkeypatch.setitem(batches._LIMITS, "cpu", (40, 64))
    texts = ["Dr. No saw it at 3.5 km. Really? (Yes.) Gone.", "Really?", f"{'word ' * 150}end."]
    found = translator(texts)
    assert found[0] == "<Dr. No saw it at 3.5 km.> <Really?> <(Yes.)> Gone."
    assert found[1] == "<Really?>"
    assert found[2].replace(">", "").replace("<", "") == texts[2]
    sentences = [text for batch in sizes for text in batch]
    assert len(sentences) == len(set(sentences)) == 6
    assert max(map(len, sentences)) <= 600
    assert [len(max(batch, key=len)) for batch in sizes] == sorted((len(max(b, key=len)) for b in sizes), reverse=True)
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 40 for batch in sizes)
    translator.joint = ""
    assert translator(["Hi. Bye."]) == ["<Hi.><Bye.>"]


def test_chinese_sentences_are_joined_without_a_space(folders):
    assert prepare_translator(str(folders["nllb"]), "zh")().joint == ""
    assert prepare_translator(str(folders["nllb"]), "vi")().joint == " "


def test_a_batch_that_does_not_fit_the_memory_is_halved(folders, monkeypatch):
    translator = prepare_translator(str(folders["nllb"]), "sw")()
    sizes = []

    def generate(texts, first):
        sizes.append(len(texts))
        if len(texts) > 2:
            raise torch.cuda.OutOfMemoryError
        return list(texts)

    monkeypatch.setattr(translator, "_generate", generate)
    assert translator(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "d", "e"]
    assert sizes == [5, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [("nllb", "fr", "its tokenizer has no token of French"),
     ("marian-pair", "vi", "translates into sw and has no token of Vietnamese")],
)  # fmt: skip
def test_languages_that_the_model_lacks(folders, family, wanted, message, monkeypatch):
    monkeypatch.setattr("pivotune.translate.translators.load_on_device", None)
    with pytest.raises(UsageError, match=message):
        prepare_translator(str(folders[family]), wanted)


def test_another_source_than_english(tmp_path):
    folder = save_tiny_translator(tmp_path, "marian", source_lang="de", target_lang="sw")
    with pytest.raises(UsageError, match="translates from de, not from English"):
        prepare_translator(str(folder), "sw")()


# ---- other directions ----


def test_the_same_model_translates_back(folders):
    """Source and target are exchanged; an English-only pair is refused."""
    back = prepare_translator(str(folders["nllb"]), "en", "sw")()
    assert (back.tokenizer.src_lang, back.target.token, back.joint) == ("swh_Latn", "eng_Latn", " ")
    assert prepare_translator(str(folders["madlad"]), "en", "sw")().target.token == "<2en>"
    with pytest.raises(UsageError, match="marian-pair: translates from en, not from Swahili"):
        prepare_translator(str(folders["marian-pair"]), "en", "sw")
    with pytest.raises(UsageError, match="nllb: its tokenizer has no token of French, the source language"):
        prepare_translator(str(folders["nllb"]), "en", "fr")


def test_a_group_of_languages_is_accepted_as_source(tmp_path):
    folder = save_tiny_translator(tmp_path, "marian-pair", source_lang="mul", target_lang="en")
    assert prepare_translator(str(folder), "en", "sw")().target is None


def test_sentences_of_other_languages(folders, monkeypatch):
    """Full stops of East Asia need no space, and letters beyond ASCII may begin a sentence."""
    translator = prepare_translator(str(folders["nllb"]), "en", "zh")()
    monkeypatch.setattr(translator, "_generate", lambda texts, first: [f"<{text}>" for text in texts])
    assert translator(["他说：“好。”他走了。再见！"]) == ["<他说：“好。”他走了。> <再见！>"]
    assert translator(["Một. Đây là hai. ba"]) == ["<Một.> <Đây là hai. ba>"]


# ---- CTranslate2 ----


class StandIn:
    """`ctranslate2.Translator`: each translation is its prefix and the reversed words, with an end token."""

    def __init__(self, folder: str, device: str) -> None:
        if not Path(folder, "model.bin").read_bytes():
            raise RuntimeError("File model.bin is incomplete")
        self.device, self.calls = device, []

    def translate_batch(self, source, target_prefix=None, max_decoding_length=256):
        self.calls.append((source, target_prefix, max_decoding_length))
        prefixes = target_prefix or [[]] * len(source)
        return [
            SimpleNamespace(hypotheses=[[*prefix, *[token for token in text if token[0] not in "<_"][::-1], "</s>"]])
            for text, prefix in zip(source, prefixes, strict=True)
        ]


@pytest.fixture
def ctranslate2(monkeypatch):
    module = ModuleType("ctranslate2")
    module.__spec__ = ModuleSpec("ctranslate2", None)
    module.Translator, module.get_cuda_device_count = StandIn, lambda: 0
    monkeypatch.setitem(sys.modules, "ctranslate2", module)


def save_converted(folder: Path, family: str, tokenizer: Path | None) -> Path:
    """Write the files of a model that was converted for CTranslate2, with a copy of the tokenizer or without."""
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"weights")
    (folder / "config.json").write_text('{"add_source_eos": false, "bos_token": "<s>", "layer_norm_epsilon": null}')
    (folder / "shared_vocabulary.json").write_text("[]")
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.mark.parametrize("beside", [True, False])
def test_a_converted_model(folders, tmp_path, ctranslate2, beside):
    folder = save_converted(tmp_path / "ct2", "nllb", folders["nllb"] if beside else None)
    options = {} if beside else {"tokenizer": str(folders["nllb"])}
    translator = prepare_translator(str(folder), "sw", **options)()
    assert translator(["ab", "c"]) == ["ba", "c"]
    ((source, prefixes, longest),) = translator.model.calls
    expected = [
        translator.tokenizer.convert_ids_to_tokens(translator.tokenizer(text)["input_ids"]) for text in ("c", "ab")
    ]
    assert sorted(source) == sorted(expected)
    assert prefixes == [["swh_Latn"]] * 2
    assert longest == 3 * max(map(len, expected)) + 32
    assert translator.tokenizer.src_lang == "eng_Latn"


def test_a_converted_model_with_a_token_before_the_text(folders, tmp_path, ctranslate2):
    translator = prepare_translator(str(save_converted(tmp_path / "ct2", "madlad", folders["madlad"])), "sw")()
    translator(["ab"])
    ((source, prefixes, _),) = translator.model.calls
    assert (source[0][0], prefixes) == ("<2sw>", None)


def test_mistakes_with_converted_models(folders, tmp_path, ctranslate2, monkeypatch):
    folder = save_converted(tmp_path / "ct2", "nllb", None)
    with pytest.raises(UsageError, match=r"ct2: the tokenizer cannot be loaded: "):
        prepare_translator(str(folder), "sw")
    with pytest.raises(UsageError, match=r"--engine: vllm runs chat models, and .*ct2 is an encoder-decoder"):
        prepare_translator(str(folder), "sw", engine="vllm")
    with pytest.raises(UsageError, match=r"--tokenizer: goes with a model .*nllb has no model.bin"):
        prepare_translator(str(folders["nllb"]), "sw", tokenizer=str(folders["nllb"]))
    (folder / "model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"ct2: the model cannot be loaded: File model.bin is incomplete"):
        prepare_translator(str(folder), "sw", tokenizer=str(folders["nllb"]))()
    monkeypatch.delitem(sys.modules, "ctranslate2")
    with pytest.raises(UsageError, match=r"CTranslate2, which is not installed: pip install ctranslate2"):
        prepare_translator(str(folder), "sw")
