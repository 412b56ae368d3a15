"""Tiny random translation models with the tokens of their families, and a chat endpoint on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_rows
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

_SIZES = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 1,
}  # fmt: skip
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
       "decoder_start_token_id": 0}  # fmt: skip
FAMILIES = {
    "nllb": ("m2m_100", ["eng_Latn", "swh_Latn", "vie_Latn", "zho_Hans", "zho_Hant"]),
    "m2m": ("m2m_100", ["__en__", "__sw__", "__zh__"]),
    "madlad": ("t5", ["<2en>", "<2sw>", "<2zh>", "<2zh_Latn>"]),
    "marian": ("marian", [">>swh<<", ">>por<<", ">>pt_BR<<", ">>vie_Hani<<"]),
    "marian-pair": ("marian", []),
}


def save_tiny_translator(folder: Path, family: str, **names: str) -> Path:
    """Save a random model whose tokenizer reads bytes; `names` go into the tokenizer's configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model_type, language_tokens = FAMILIES[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<unk>", *language_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for row in tiny_rows(8) for text in row.values()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64, **names
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=len(fast), **(_T5 if model_type == "t5" else _SIZES))
    model = AutoModelForSeq2SeqLM.from_config(config)
    if model_type != "t5":
        model.generation_config.max_length, model.generation_config.num_beams = 20, 2
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


class Endpoint:
    """The requests that a served endpoint got: (path, headers, body)."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []


@contextmanager
def serve(answer: Callable[[str], Any], location: str = "") -> Iterator[Endpoint]:
    """Serve chat completions: `answer(text)` is the translation, an HTTP status, or the bytes of the whole body.

    `location` is the address that a status such as 302 names.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.requests.append((self.path, dict(self.headers), body))
            found = answer(body["messages"][-1]["content"])
            # Some servers show the key that they refuse.
            refused = json.dumps({"error": {"message": f"no such model for {self.headers['Authorization']}"}}).encode()
            status, content = (found, refused) if isinstance(found, int) else (200, found)
            if isinstance(content, str):
                message = {"role": "assistant", "content": content}
                content = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
            self.send_response(status)
            self.send_header("Location", location)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            endpoint.requests.append((self.path, dict(self.headers), {}))
            self.send_error(500)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda request, address: None  # a client that has gone
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
