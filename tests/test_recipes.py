"""Recipes load, have the paper's settings, and the commands in their comments make every run of the paper."""

from __future__ import annotations

import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from pivotune.config.yaml_text import load_config
from pivotune.models.architecture import ARCHITECTURES
from pivotune.training.arguments import build_arguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
MODELS = {"llama2-7b": "meta-llama/Llama-2-7b-hf", "gemma2-2b": "google/gemma-2-2b"}
LAYERS = {"llama2-7b": (2, 15), "gemma2-2b": ("auto", "auto")}
METHODS = {"sft": "english-only", "tft": "tft", "logits": "deep-supervision", "feature": "deep-supervision"}
PAPER = [(model, language, kind) for model in MODELS for language in ("vi", "ar", "zh") for kind in METHODS]
SMALL = sorted((RECIPES / "small").glob("*.yaml"))


@cache
def runs_of_the_comment(model):
    """Configurations by output folder: the commands of the comment, run by a shell in which `pivotune` prints its words."""
    lines = (RECIPES / "paper" / f"{model}.yaml").read_text(encoding="utf-8").splitlines()
    script = [line.removeprefix("#") for line in lines if line.startswith("#   ")]
    printing = 'pivotune() { printf "%q " "$@"; echo; }'
    result = subprocess.run(
        ["bash", "-euc", "\n".join([printing, *script])], capture_output=True, text=True, check=True
    )
    configs = {}
    for line in result.stdout.splitlines():
        verb, path, *options = shlex.split(line)
        assert verb == "train"
        assert set(options[::2]) == {"--set"}
        config = load_config(ROOT / path, options[1::2])
        configs[config.output_dir] = config
    return configs


def paper(model, language, kind):
    return runs_of_the_comment(model)[f"runs/{model}-{language}-{kind}"]


@pytest.mark.parametrize("model", MODELS)
def test_the_commands_are_all_runs_of_the_paper(model):
    expected = {f"runs/{name}-{language}-{kind}" for name, language, kind in PAPER if name == model}
    assert set(runs_of_the_comment(model)) == expected
    assert load_config(RECIPES / "paper" / f"{model}.yaml") == paper(model, "vi", "logits")


@pytest.mark.parametrize(("model", "language", "kind"), PAPER)
def test_paper_settings(model, language, kind):
    config = paper(model, language, kind)
    assert (config.model, config.method, config.data.language) == (MODELS[model], METHODS[kind], language)
    assert config.data.train == f"data/alpaca-{language}.jsonl"
    assert (config.data.template, config.data.english_ratio, config.lora) == ("alpaca", 0.0, None)
    args = build_arguments(config)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert (args.num_train_epochs, args.learning_rate) == (3, 2e-5)
    if config.method == "deep-supervision":
        supervision = config.supervision
        assert supervision.schedule == "constant"
        assert (config.preset, supervision.lens, supervision.logits.gradient) == ("paper", "logit", "all")
        for term, layer in zip((supervision.conversion, supervision.thinking), LAYERS[model], strict=True):
            assert (term.signal, term.weight, term.layer) == (kind, 1.0, layer)


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.name)
def test_small_recipes_have_the_recommended_preset(path):
    config = load_config(path)
    build_arguments(config)
    assert config.data.english_ratio == 0.25
    assert (config.method == "tft") == path.name.endswith("-tft.yaml")
    if config.method == "deep-supervision":
        supervision = config.supervision
        assert (supervision.conversion.weight, supervision.thinking.weight) == (0.3, 0.3)
        assert supervision.schedule == "linear"
        assert (supervision.lens, supervision.logits.gradient) == ("tuned", "prompt")


def test_small_recipes_of_one_model_differ_only_in_method():
    tft, logits, feature = (
        load_config(RECIPES / "small" / f"smollm2-135m-{kind}.yaml").model_dump()
        for kind in ("tft", "logits", "feature")
    )
    assert _differences(logits, feature) == {"supervision.thinking.signal", "output_dir"}
    assert _differences(logits, tft) == {"supervision.thinking.layer", "method", "output_dir"}


def test_readme_names_recipes_that_are_there():
    text = (RECIPES / "README.md").read_text(encoding="utf-8")
    for name in ("small/", "cpu.yaml", "gemma2-2b-lora.yaml", "recipes/paper/llama2-7b.yaml"):
        assert name in text
    assert {path.name for path in SMALL} >= {"cpu.yaml", "gemma2-2b-lora.yaml"}


def test_families_of_the_recipes_are_supported():
    assert {"llama", "gemma2"} <= set(ARCHITECTURES)


def _keys(settings, prefix=""):
    keys = {}
    for name, value in settings.items():
        keys |= _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return keys


def _differences(one, other):
    one, other = _keys(one), _keys(other)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
