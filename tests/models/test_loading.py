from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from pivotune.errors import UsageError
from pivotune.models import locating
from pivotune.models.loading import check_model, load_model, load_on_device, load_tokenizer, read_config
from pivotune.models.locating import resolve_model
from pivotune.training.resilience.checkpoints import write_checksums

TOKENS = torch.tensor([[0, 3, 4, 5, 1]])
HUB_NAME = "somebody/tiny-llama"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama in bfloat16 with a tokenizer of ten words; never changed by a test."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = ["<s>", "</s>", "<unk>", "what", "is", "the", "capital", "of", "France", "Paris"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(autouse=True)
def _forget_hub_answers() -> None:
    locating._names_on_hub.cache_clear()


def hub_answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    """Let the Hub answer a question for a model's files with a list of names or an exception."""

    def model_info(self: object, repo_id: str, **options: object) -> SimpleNamespace:
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in answer])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)


def hub_error(kind: type[Any]) -> Exception:
    return kind("two\nlines", response=SimpleNamespace(headers={}, request=None))


def put_in_hub_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = cache / f"models--{HUB_NAME.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def refused(call: Callable[[], object], message: str) -> None:
    """Assert a UsageError of one line that contains `message`."""
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- loading -------------------------------------------------------------------------------------------------------


def test_folder_loads_with_the_stored_weights(folder: Path) -> None:
    check_model(str(folder))
    model = load_model(str(folder), attn_implementation="eager")
    stored = load_file(folder / "model.safetensors")
    assert {name: weight.dtype for name, weight in model.state_dict().items()} == dict.fromkeys(stored, torch.bfloat16)
    assert all(torch.equal(weight, stored[name]) for name, weight in model.state_dict().items())
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert read_config(str(folder)).num_hidden_layers == 2


@pytest.mark.parametrize(("stored", "expected"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_cpu_computes_float16_in_float32(original, tmp_path, monkeypatch, stored, expected):
    LlamaForCausalLM.from_pretrained(original, dtype=stored).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_on_device(str(tmp_path), gpu_dtype="bfloat16").dtype == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_option(folder: Path, dtype: Any) -> None:
    assert load_model(str(folder), dtype=dtype).dtype == getattr(torch, dtype)


def test_saved_and_loaded_again_gives_equal_logits(folder: Path, tmp_path: Path) -> None:
    model = load_model(str(folder), dtype="float32")
    model.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")(TOKENS).logits
        torch.testing.assert_close(again, model(TOKENS).logits, rtol=0, atol=0)


def test_tokenizer_pads_on_the_right_with_end_of_text_when_it_has_no_padding_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("</s>", "right")
    batch = tokenizer(["what is", "the capital of France"], padding=True)
    assert batch.input_ids[0] == [3, 4, 1, 1]
    assert batch.attention_mask[0] == [1, 1, 0, 0]


def test_tokenizer_keeps_its_own_padding_token(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token="<unk>")
    assert load_tokenizer(str(folder)).pad_token == "<unk>"


def test_run_folder_stands_for_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    (run / "config.yaml").touch()
    assert resolve_model(str(run)) == str(run / "model")
    assert load_tokenizer(str(run)).eos_token == "</s>"
    assert torch.equal(load_model(str(run)).lm_head.weight, load_model(str(folder)).lm_head.weight)


def test_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/tiny") == str(folder)


def test_bundled_name_is_resolved_to_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locating, "bundled_model_folder", lambda name: folder if name == "bundled:tiny" else None)
    assert resolve_model("bundled:tiny") == str(folder)


@pytest.mark.parametrize("name", ["gpt2", HUB_NAME, "HuggingFaceTB/SmolLM2-135M"])
def test_hub_name_is_left_as_it_is(name: str) -> None:
    assert resolve_model(name) == name


def test_adapter_loads_frozen_on_its_base(adapter: Path, folder: Path) -> None:
    check_model(str(adapter))
    assert read_config(str(adapter)).model_type == "llama"
    model = load_model(str(adapter), dtype="float32")
    assert isinstance(model, PeftModel)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        adapted = model(TOKENS).logits
        with model.disable_adapter():
            base = model(TOKENS).logits
        torch.testing.assert_close(base, load_model(str(folder), dtype="float32")(TOKENS).logits, rtol=0, atol=0)
    assert (adapted - base).abs().max() > 1e-4


def test_adapter_without_a_tokenizer_uses_that_of_its_base(adapter: Path, folder: Path) -> None:
    assert load_tokenizer(str(adapter)).eos_token == "</s>"
    shutil.copy(folder / "tokenizer.json", adapter)
    shutil.copy(folder / "tokenizer_config.json", adapter)
    edit_json(adapter / "tokenizer_config.json", eos_token="<unk>")
    assert load_tokenizer(str(adapter)).eos_token == "<unk>"


def test_hub_name_is_read_from_the_hub_cache_when_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_in_hub_cache(folder, tmp_path / "hub", monkeypatch)
    hub_answers(monkeypatch, huggingface_hub.errors.OfflineModeIsEnabled("two\nlines"))
    check_model(HUB_NAME)
    # Without this the Hub client would try each file for half a minute.
    assert locating.locate(HUB_NAME, None).arguments == {"local_files_only": True}
    assert load_tokenizer(HUB_NAME).eos_token == "</s>"
    assert torch.equal(load_model(HUB_NAME).lm_head.weight, load_model(str(folder)).lm_head.weight)


def test_loading_prints_nothing_and_puts_the_logging_of_transformers_back(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    load_model(str(folder))
    load_tokenizer(str(folder))
    (folder / "model.safetensors").write_bytes(b"damaged")
    refused(lambda: load_model(str(folder)), "the model cannot be loaded")
    assert transformers_logging.get_verbosity() == transformers_logging.WARNING
    assert transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(verbosity)
    assert capfd.readouterr() == ("", "")


# --- folders that are no models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./runs/vi", "/no/such/folder", "runs/vi/model", "..", "two words", ""])
def test_neither_folder_nor_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    expected = "not a model" if name == ".." else "no such folder; allowed: a model folder, a run folder, a Hub name"
    refused(lambda: resolve_model(name), expected)


def test_file_instead_of_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    refused(lambda: resolve_model(str(path)), f"{path}: this is a file; allowed: a model folder")


def test_folder_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(lambda: resolve_model(str(folder)), f"{folder}: not a model: neither config.json nor adapter_config.json")


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = f"{folder}: no weights; looked for model.safetensors or model.safetensors.index.json"
    refused(lambda: check_model(str(folder)), message)
    # Trainer's own pickle is not a model's weights.
    (folder / "training_args.bin").touch()
    refused(lambda: check_model(str(folder)), message)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "weights.pt"])
def test_pickled_weights(folder: Path, pickle: str) -> None:
    (folder / "model.safetensors").rename(folder / pickle)
    refused(lambda: check_model(str(folder)), f"only safetensors are read and the weights are a pickle ({pickle})")
    refused(lambda: check_model(str(folder)), f"from_pretrained('{folder}').save_pretrained(")


def test_missing_shard(folder: Path) -> None:
    model = load_model(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=2000)
    shards = sorted(folder.glob("model-*.safetensors"))
    check_model(str(folder))
    shards[1].unlink()
    refused(
        lambda: check_model(str(folder)),
        f"{folder}: 1 of {len(shards)} weight files are missing, first {shards[1].name}",
    )


def test_unreadable_list_of_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(lambda: check_model(str(folder)), "model.safetensors.index.json: not a readable list of shards")


def test_unfinished_run(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    message = f"{run}: a run folder without model/: the run has not finished"
    refused(lambda: resolve_model(str(run)), f"{message} (its checkpoints: none yet)")
    shutil.copytree(folder, run / "checkpoint-20")
    refused(lambda: resolve_model(str(run)), f"{message} (its checkpoints: checkpoint-20)")
    assert resolve_model(str(run / "checkpoint-20")) == str(run / "checkpoint-20")


def test_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    refused(lambda: check_model(str(folder)), f"{folder}: no tokenizer beside the model; looked for tokenizer.json")
    refused(lambda: load_tokenizer(str(folder)), f"{folder}: no tokenizer beside the model")


def test_tokenizer_with_tokens_that_the_model_does_not_embed(folder: Path) -> None:
    """The model has 16 rows; a special token beyond them, which no text becomes, is that of a place of an image."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"word{place}" for place in range(10, 16)])
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).convert_tokens_to_ids("<|image|>") == 16
    tokenizer.add_tokens(["habari"])
    tokenizer.save_pretrained(folder)
    sizes = "the tokenizer has 18 tokens, 'habari' among them, and the model's embedding 16 rows"
    refused(lambda: load_tokenizer(str(folder)), f"{folder}: {sizes}; use the model's own tokenizer")


def test_tokenizer_without_end_of_text(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    refused(lambda: load_tokenizer(str(folder)), f"{folder}: the tokenizer has no end-of-text token")


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    refused(lambda: load_tokenizer(str(folder)), f"{folder}: the tokenizer cannot be loaded: ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-type"}'])
def test_damaged_configuration(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(lambda: check_model(str(folder)), f"{folder}: the configuration cannot be loaded: ")


def test_damaged_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    refused(lambda: load_model(str(folder)), f"{folder}: the model cannot be loaded: ")


def test_weights_that_the_files_lack_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_model(str(folder)), f"{folder}: 2 weights are not in the files, first lm_head.weight")


def test_weights_of_another_shape(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=20)
    refused(
        lambda: load_model(str(folder)),
        f"{folder}: 2 weights have another shape than config.json says, first lm_head.weight: "
        "(16, 16) found, (20, 16) expected",
    )


# --- models of another kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "architecture", "message"),
    [
        ("t5", "T5ForConditionalGeneration", "t5 is an encoder-decoder"),
        ("bart", "BartForConditionalGeneration", "bart is an encoder-decoder"),
        ("vit", "ViTForImageClassification", "vit is not a causal language model"),
        ("bert", "BertForMaskedLM", "the weights are of BertForMaskedLM, not of a causal language model"),
        (
            "llama",
            "LlamaForSequenceClassification",
            "the weights are of LlamaForSequenceClassification, not of a causal",
        ),
        (
            "llama",
            "LlamaModel",
            "the weights are of LlamaModel, not of a causal language model such as LlamaForCausalLM",
        ),
    ],
)
def test_other_kinds_of_models(folder: Path, model_type: str, architecture: str, message: str) -> None:
    AutoConfig.for_model(model_type, architectures=[architecture]).save_pretrained(folder)
    refused(lambda: check_model(str(folder)), f"{folder}: {message}")
    refused(lambda: load_model(str(folder)), f"{folder}: {message}")


@pytest.mark.parametrize("architectures", [None, ["LLaMAForCausalLM"], ["LlamaForCausalLM"]])
def test_spellings_of_causal_models_are_accepted(folder: Path, architectures: list[str] | None) -> None:
    edit_json(folder / "config.json", architectures=architectures)
    check_model(str(folder))


def test_code_of_its_own_needs_permission(folder: Path) -> None:
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    refused(lambda: check_model(str(folder)), f"{folder}: it needs code of its own to be run; set trust_remote_code")


# --- adapters ------------------------------------------------------------------------------------------------------


def test_adapter_whose_base_is_gone(adapter: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    message = f"{adapter}: its base model: {folder}: no such folder"
    refused(lambda: check_model(str(adapter)), message)
    refused(lambda: load_model(str(adapter)), message)
    refused(lambda: load_tokenizer(str(adapter)), message)


def test_adapter_without_a_base_or_weights(adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused(lambda: check_model(str(adapter)), f"{adapter}: adapter_config.json does not name the base model")
    (adapter / "adapter_config.json").write_text("{")
    refused(lambda: check_model(str(adapter)), f"{adapter}: the adapter_config.json cannot be loaded: ")
    (adapter / "adapter_model.safetensors").unlink()
    refused(lambda: check_model(str(adapter)), f"{adapter}: no weights; looked for adapter_model.safetensors")


# --- the Hub -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ConnectionError("x"), huggingface_hub.errors.OfflineModeIsEnabled("two\nlines")])
def test_hub_out_of_reach(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_answers(monkeypatch, error)
    message = (
        f"{HUB_NAME}: no such folder, and the Hugging Face Hub is out of reach (offline?) and its cache here does "
        "not hold this model; bundled:smollm2-135m-instruct needs no network"
    )
    for call in (check_model, read_config, load_model, load_tokenizer):
        refused(lambda call=call: call(HUB_NAME), message)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (RepositoryNotFoundError, "no such folder, and no such model on the Hugging Face Hub (a private one needs"),
        (RevisionNotFoundError, "the Hugging Face Hub has no such revision of this model"),
        (GatedRepoError, "a gated model: accept its terms on its Hub page, then log in with `hf auth login`"),
    ],
)
def test_hub_refuses(kind: type[Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, hub_error(kind))
    refused(lambda: check_model(HUB_NAME), f"{HUB_NAME}: {message}")


def test_gated_hub_model_lists_its_files_but_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        # Transformers wraps the Hub's error in an OSError of several lines.
        raise OSError("You are trying to access a gated repo.\nMake sure...") from hub_error(GatedRepoError)

    hub_answers(monkeypatch, ["config.json", "model.safetensors", "tokenizer.json"])
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    refused(lambda: check_model(HUB_NAME), f"{HUB_NAME}: a gated model: accept its terms")


def test_hub_model_with_pickled_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_answers(monkeypatch, ["config.json", "pytorch_model.bin", "tokenizer.json"])
    refused(lambda: check_model(HUB_NAME), f"{HUB_NAME}: only safetensors are read")


def test_pickled_translation_models_on_the_hub_need_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """NLLB's main branch holds a pickle; the pull request of the Hub's conversion bot holds safetensors as well."""
    hub_answers(monkeypatch, ["config.json", "pytorch_model.bin", "tokenizer.json"])
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args, **options: AutoConfig.for_model("m2m_100"))
    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> tuple[str, dict[str, list[str]]]:
        asked.update(options, name=name)
        return "the model", {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(AutoModelForSeq2SeqLM, "from_pretrained", from_pretrained)
    hint = "name a revision that has safetensors \\(such as refs/pr/N\\), or convert them"
    with pytest.raises(UsageError, match=f"the weights are a pickle \\(pytorch_model.bin\\); {hint}") as caught:
        load_model(HUB_NAME, translates=True)
    assert "\n" not in str(caught.value)
    assert not asked
    hub_answers(monkeypatch, ["config.json", "pytorch_model.bin", "model.safetensors", "tokenizer.json"])
    assert load_model(HUB_NAME, translates=True, revision="refs/pr/2") == "the model"
    assert (asked["name"], asked["use_safetensors"], asked["revision"]) == (HUB_NAME, True, "refs/pr/2")


def test_pickled_translation_models_in_a_folder_are_refused(folder: Path) -> None:
    AutoConfig.for_model("m2m_100").save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(lambda: load_model(str(folder), translates=True), "a translation model with AutoModelForSeq2SeqLM")


# --- options -------------------------------------------------------------------------------------------------------


def test_unknown_options(folder: Path) -> None:
    wrong: Any = "float16"
    refused(lambda: load_model(str(folder), dtype=wrong), "dtype: 'float16' found; allowed: auto, float32, bfloat16")
    wrong = "8bit"
    refused(lambda: load_model(str(folder), quantize=wrong), "quantize: '8bit' found; allowed: 4bit")
    refused(
        lambda: load_model(str(folder), attn_implementation="nonsense"),
        f'{folder}: the model cannot be loaded: Specified `attn_implementation="nonsense"`',
    )


def test_four_bits_need_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(lambda: load_model(str(folder), quantize="4bit"), "4bit needs the package bitsandbytes: pip install")


def test_weights_of_a_run_that_were_cut_short_are_refused(tmp_path):
    """By their size alone, which costs nothing; files that a user may edit are not checked."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("0123456789")
    write_checksums(folder)
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder)) == str(folder)
    (folder / "model.safetensors").write_text("01234")
    refused(
        lambda: resolve_model(str(folder)), f"{folder / 'model.safetensors'}: damaged, 5 bytes where 10 were written"
    )
    for text in ("[]", "{", '{"model.safetensors": 5}'):
        (folder / "checksums.json").write_text(text)
        assert resolve_model(str(folder)) == str(folder)
