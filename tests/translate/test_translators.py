"""Language tokens of each family, batches and sentences of local models, and requests to an endpoint."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from tiny_translators import FAMILIES, save_tiny_translator, serve

import pivotune.translate.translators as translators
from pivotune.errors import UsageError
from pivotune.text.languages import find_language
from pivotune.translate.translators import (
    EndpointTranslator,
    check_endpoint,
    find_language_token,
    load_translator,
)

KEY = "key-0123456789-secret"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    names = {"marian-pair": {"source_lang": "en", "target_lang": "sw"}}
    base = tmp_path_factory.mktemp("translators")
    return {family: save_tiny_translator(base / family, family, **names.get(family, {})) for family in FAMILIES}


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return KEY


# ---- local models ----


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
    translator = load_translator(str(folders[family]), "sw")
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
    translator = load_translator(str(folders["nllb"]), "sw")
    inputs = translator.tokenizer(["Hello"], return_tensors="pt")
    wanted = translator.tokenizer.convert_tokens_to_ids("swh_Latn")
    output = translator.model.generate(inputs["input_ids"], forced_bos_token_id=wanted, max_new_tokens=20, num_beams=1)
    translator.model.generation_config.num_beams = 1
    expected = translator.tokenizer.decode(output[0], skip_special_tokens=True).strip()
    assert translator(["Hello"])[0][: len(expected)] == expected


def test_sentences_are_translated_once_in_batches_of_similar_length(folders, monkeypatch):
    translator = load_translator(str(folders["nllb"]), "sw")
    batches = []
    monkeypatch.setattr(
        translator,
        "_generate",
        lambda texts: batches.append(texts) or [f"<{text}>" if text != "Gone." else " " for text in texts],
    )
    monkeypatch.setitem(translators._BATCH, "cpu", (40, 64))
    texts = ["Dr. No saw it at 3.5 km. Really? (Yes.) Gone.", "Really?", f"{'word ' * 150}end."]
    found = translator(texts)
    assert found[0] == "<Dr. No saw it at 3.5 km.> <Really?> <(Yes.)> Gone."
    assert found[1] == "<Really?>"
    assert found[2].replace(">", "").replace("<", "") == texts[2]
    sentences = [text for batch in batches for text in batch]
    assert len(sentences) == len(set(sentences)) == 6
    assert max(map(len, sentences)) <= 600
    assert [len(max(batch, key=len)) for batch in batches] == sorted(
        (len(max(b, key=len)) for b in batches), reverse=True
    )
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= 40 for batch in batches)
    translator.joint = ""
    assert translator(["Hi. Bye."]) == ["<Hi.><Bye.>"]


def test_chinese_sentences_are_joined_without_a_space(folders):
    assert load_translator(str(folders["nllb"]), "zh").joint == ""
    assert load_translator(str(folders["nllb"]), "vi").joint == " "


def test_a_batch_that_does_not_fit_the_memory_is_halved(folders, monkeypatch):
    translator = load_translator(str(folders["nllb"]), "sw")
    sizes = []

    def generate(texts):
        sizes.append(len(texts))
        if len(texts) > 2:
            raise torch.cuda.OutOfMemoryError
        return list(texts)

    monkeypatch.setattr(translator, "_generate_batch", generate)
    assert translator(["a", "b", "c", "d", "e"]) == ["a", "b", "c", "d", "e"]
    assert sizes == [5, 2, 3, 1, 2]


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [("nllb", "fr", "its tokenizer has no token of French"),
     ("marian-pair", "vi", "translates into sw and has no token of Vietnamese")],
)  # fmt: skip
def test_languages_that_the_model_lacks(folders, family, wanted, message, monkeypatch):
    monkeypatch.setattr(translators, "load_model", None)
    with pytest.raises(UsageError, match=message):
        load_translator(str(folders[family]), wanted)


def test_another_source_than_english(tmp_path):
    folder = save_tiny_translator(tmp_path, "marian", source_lang="de", target_lang="sw")
    with pytest.raises(UsageError, match="translates from de, not from English"):
        load_translator(str(folder), "sw")


# ---- endpoints ----


def endpoint(url: str) -> EndpointTranslator:
    return EndpointTranslator(url, "my-model", find_language("vi"), parallel=2)


def test_requests(key):
    with serve(lambda text: f"<think>Hm,\nyes.</think>\n{text.upper()}") as server:
        assert endpoint(server.url + "/")(["one", "two", "three"]) == ["\nONE", "\nTWO", "\nTHREE"]
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"]) == ("my-model", 0)
    assert "from English into Vietnamese" in body["messages"][0]["content"]
    assert sorted(body["messages"][1]["content"] for _, _, body in server.requests) == ["one", "three", "two"]


def test_no_key_no_header(key, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve(str) as server:
        endpoint(server.url)(["one"])
    assert "Authorization" not in server.requests[0][1]


def test_a_cut_answer_and_no_answer_are_none(key):
    cut = b'{"choices": [{"message": {"content": "Xin ch"}, "finish_reason": "length"}]}'
    none = b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}'
    with serve(lambda text: cut if text == "cut" else none) as server:
        assert endpoint(server.url)(["cut", "none"]) == ["", ""]


@pytest.mark.parametrize("fault", [500, 429, b"no JSON", b'{"choices": []}', b"[]"])
def test_a_temporary_fault_is_tried_three_times(key, fault):
    faults = iter([fault, fault])
    with serve(lambda text: next(faults, "Xin chào")) as server:
        assert endpoint(server.url)(["Hello"]) == ["Xin chào"]
    assert len(server.requests) == 3
    with serve(lambda text: fault) as server, pytest.raises(UsageError, match="failed 3 times: ") as caught:
        endpoint(server.url)(["Hello"])
    assert len(server.requests) == 3
    assert "translated rows are kept" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_refused_request_is_not_repeated(key):
    refused = pytest.raises(UsageError, match=r"HTTP 404 Not Found: .*no such model for .*redacted")
    with serve(lambda text: 404) as server, refused as caught:
        endpoint(server.url)(["Hello"])
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)


def test_the_key_is_not_sent_on_to_another_server(key):
    refused = pytest.raises(UsageError, match="failed 3 times: HTTP 500")
    with serve(str) as other, serve(lambda text: 302, other.url) as server, refused:
        endpoint(server.url)(["Hello"])
    assert len(server.requests) == len(other.requests) == 3
    assert all("Authorization" in headers for _, headers, _ in server.requests)
    assert not any("Authorization" in headers for _, headers, _ in other.requests)


def test_nobody_listens(key):
    with serve(str) as server:
        pass
    with pytest.raises(UsageError, match="failed 3 times: ConnectionRefusedError"):
        endpoint(server.url)(["Hello"])


def test_a_server_that_does_not_answer(key, monkeypatch):
    import threading

    monkeypatch.setattr(translators, "_TIMEOUT_SECONDS", 0.05)
    release = threading.Event()
    with serve(lambda text: "late" if release.wait(5) else "") as server:
        with pytest.raises(UsageError, match="failed 3 times: TimeoutError"):
            endpoint(server.url)(["Hello"])
        release.set()


@pytest.mark.parametrize(
    "url",
    ["localhost:8000/v1", "file:///etc/passwd", "http://", "http://[::1", "http://a b/v1", "http://host:port/v1", ""],
)
def test_addresses_that_are_none(url):
    with pytest.raises(UsageError, match=r"--endpoint: .* found; allowed: an address such as http://localhost:8000/v1"):
        check_endpoint(url)


def test_secrets_in_addresses_and_broken_keys_are_not_shown(monkeypatch):
    for url in (f"http://me:{KEY}@host/v1", f"http://host/v1?key={KEY}"):
        with pytest.raises(UsageError, match="the key comes from OPENAI_API_KEY") as caught:
            check_endpoint(url)
        assert KEY not in str(caught.value)
    for key in (f"{KEY}\n{KEY}", f"{KEY}ä"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UsageError, match="OPENAI_API_KEY: holds characters that no HTTP header may have") as caught:
            check_endpoint("http://host/v1")
        assert KEY not in str(caught.value)
