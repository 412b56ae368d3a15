"""A chat model as translator: on this machine by Transformers and vLLM, and behind an endpoint."""

from __future__ import annotations

import sys
import threading
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import build_tiny_model, build_tiny_tokenizer
from tiny_translators import serve

import pivotune.translate.chat as chat
from pivotune.errors import UsageError
from pivotune.text.languages import find_language
from pivotune.translate.chat import EndpointTranslator, check_endpoint, check_engine
from pivotune.translate.translators import prepare_translator

KEY = "key-0123456789-secret"


@pytest.fixture
def key(monkeypatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return KEY


# ---- models on this machine ----


def save_chat_model(folder: Path, **changes) -> Path:
    """Save a tiny model that reads prompts of 1,200 tokens."""
    build_tiny_model(max_position_embeddings=1200).save_pretrained(folder)
    build_tiny_tokenizer(**changes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat"))


def prompt_of(translator, text: str) -> str:
    return translator.encoder.tokenizer.decode(translator._prompt(text).ids)


def test_the_prompt_is_that_of_the_endpoint(folder, key):
    translator = prepare_translator(str(folder), "vi")()
    with serve(str) as server:
        endpoint(server.url)(["Say <b>hi</b>."])
    (system, user) = server.requests[0][2]["messages"]
    assert system["content"].startswith(
        "You are a translator. Translate the user's message from English into Vietnamese."
    )
    expected = f"<|system|>\n{system['content']}<|end|>\n<|user|>\n{user['content']}<|end|>\n<|assistant|>\n"
    assert prompt_of(translator, "Say <b>hi</b>.") == expected
    back = prepare_translator(str(folder), "en", "vi")()
    assert "message from Vietnamese into English" in prompt_of(back, "Xin chào")


def test_a_template_without_a_system_role(tmp_path):
    """Gemma's refuses it: the request stands before the text."""
    source = build_tiny_tokenizer().chat_template
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + source
    translator = prepare_translator(str(save_chat_model(tmp_path, chat_template=refusing)), "vi")()
    prompt = prompt_of(translator, "Hello")
    assert prompt.startswith("<|user|>\nYou are a translator.")
    assert prompt.endswith("as they are.\n\nHello<|end|>\n<|assistant|>\n")


def greedy(model, prompt, ends: set[int]) -> list[int]:
    """Continue a prompt token by token, without padding and cache; without the end token."""
    ids = list(prompt.ids)
    for _ in range(prompt.max_new_tokens):
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in ends:
            return ids[len(prompt.ids) : -1]
    return []


def test_batches_equal_single_prompts(folder, monkeypatch):
    """Left padding changes nothing; an answer without an end is ''."""
    monkeypatch.setattr(chat, "_ANSWER_TOKENS", 0)
    translator = prepare_translator(str(folder), "vi")()
    model, tokenizer = build_tiny_model(max_position_embeddings=1200, seed=3), translator.encoder.tokenizer
    # This random model writes it at different places.
    ends = {298}
    texts = ["One", "Which number is three?", "Asante sana, tafadhali. " * 4, "Zz"]
    translator.generate = chat._transformers_generator(model, tokenizer, translator.context, ends)
    ends |= {tokenizer.eos_token_id}
    answers = [greedy(model, translator._prompt(text), ends) for text in texts]
    expected = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    assert translator(texts) == expected
    assert len(set(expected) - {""}) == 3
    translator.generate = chat._transformers_generator(model, tokenizer, translator.context, set())
    assert translator(texts) == [""] * 4


def test_thoughts_are_left_out_and_lines_beyond_the_context_are_not_sent(folder):
    translator = prepare_translator(str(folder), "vi")()
    asked = []
    translator.generate = lambda prompts: asked.append(prompts) or ["<think>Hm</think>Một" for _ in prompts]
    assert translator(["One", "word " * 1000, "Two"]) == ["Một", "", "Một"]
    (prompts,) = asked
    tokens = [len(translator.encoder.tokenizer(text)["input_ids"]) for text in ("One", "Two")]
    assert [prompt.max_new_tokens for prompt in prompts] == [8 * count + 32 for count in tokens]
    near = translator._prompt("word " * 120)
    assert len(near.ids) + near.max_new_tokens == translator.context == 1200


def test_vllm_gets_the_same_prompts(folder, monkeypatch):
    made = {}

    class LLM:
        def __init__(self, **options):
            made.update(options)

        def generate(self, prompts, parameters, use_tqdm):
            made["calls"] = (prompts, parameters)
            ends = iter(["stop", "length"])
            return [SimpleNamespace(outputs=[SimpleNamespace(text="Một", finish_reason=next(ends))]) for _ in prompts]

    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, lambda **options: options
    monkeypatch.setitem(sys.modules, "vllm", module)
    check_engine("vllm")
    translator = prepare_translator(str(folder), "vi", engine="vllm")()
    assert translator(["One", "Two"]) == ["Một", ""]
    assert (made["model"], made["max_model_len"]) == (str(folder), 1200)
    prompts, parameters = made["calls"]
    own = [translator._prompt(text) for text in ("One", "Two")]
    assert prompts == [{"prompt_token_ids": prompt.ids} for prompt in own]
    end = translator.encoder.tokenizer.eos_token_id
    assert end in parameters[0]["stop_token_ids"]
    assert [(one["max_tokens"], one["temperature"]) for one in parameters] == [(one.max_new_tokens, 0) for one in own]


def test_engines_that_cannot_be():
    with pytest.raises(UsageError, match="--engine: 'tgi' found; allowed: hf, vllm"):
        check_engine("tgi")
    with pytest.raises(UsageError, match="--engine: vllm is not installed: pip install vllm"):
        check_engine("vllm")


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
    monkeypatch.setattr(chat, "_TIMEOUT_SECONDS", 0.05)
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
