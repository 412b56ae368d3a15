from __future__ import annotations

import re
import sys

import pytest

from pivotune.cli.init import render
from pivotune.cli.main import main
from pivotune.config.registry import METHODS
from pivotune.config.yaml_text import apply_changes, load_config, parse_config

ODD = ["dữ liệu/cặp câu.jsonl", "ዳታ.csv", "C: pairs.jsonl", "rows #2.jsonl", "a {b} c", "no", "null", "12", "1e5",
       "2026-01-31", "- rows", "'quoted'", ' "double" ', "hub:owner/name:train[:10]", "*.jsonl", "long name " * 30 + "end",
       "two\nlines"]  # fmt: skip


def read(text: str, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def training() -> dict:
    return {
        "num_train_epochs": 3,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "save_strategy": "epoch",
        "save_total_limit": 2,
    }


@pytest.mark.parametrize("method", list(METHODS))
def test_what_is_printed_says_what_was_asked_for(method, tmp_path, capsys):
    words = ["--method", method, "--model", "runs/base", "--data", "sw.csv.gz", "--language", "sw"]
    assert main(["init", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    ratio = 0 if method == "english-only" else 0.25
    assert read(captured.out, tmp_path) == parse_config(
        {
            "model": "runs/base",
            "method": method,
            "data": {"train": "sw.csv.gz", "language": "sw", "english_ratio": ratio},
            "training": training(),
            "output_dir": f"runs/sw-{method}",
        }
    )


@pytest.mark.parametrize("language", ["../x", "", "vi/..", "vi vn", "zh_../x", "vi\n", "vn", "vn-Latn", "vietnamese"])
def test_a_language_that_is_no_code_is_refused(language, capsys):
    assert main(["init", "--lang", language]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"pivotune: error: --lang: {language!r} is not a language code; ")
    assert captured.err.rstrip().endswith(
        ("Vietnamese is vi", "allowed: ISO 639-1 codes (vi) and FLORES codes (vie_Latn)")
    )


@pytest.mark.parametrize("language", ["sw", "pt-BR", "vie_Latn", "nah", "zh-Hant-TW", "sr-Latn", "se", "KM"])
def test_language_codes(language, capsys):
    assert main(["init", "--lang", language]) == 0
    assert f"language: {language} " in capsys.readouterr().out


def test_the_defaults(tmp_path, capsys):
    assert main(["init"]) == 0
    config = read(capsys.readouterr().out, tmp_path)
    assert (config.model, config.method) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "deep-supervision")
    assert (config.data.train, config.data.language) == ("pairs.jsonl", "vi")
    assert config.output_dir == "runs/vi-deep-supervision"


def test_the_trainer_takes_what_is_printed(tmp_path):
    from pivotune.training.arguments import build_arguments

    for method in METHODS:
        config = read(render(method, model="m", data="d.csv", language="sw"), tmp_path)
        args = build_arguments(config)
        assert (args.method, args.learning_rate, args.warmup_steps) == (method, 2e-5, 0.03)


@pytest.mark.parametrize("value", ODD)
def test_odd_values_are_quoted(value, tmp_path):
    config = read(render("tft", model=value, data=value, language="no"), tmp_path)
    assert (config.model, config.data.train, config.data.language) == (value, value, "no")
    assert config.output_dir == "runs/no-tft"


def test_only_deep_supervision_prints_its_section():
    assert "supervision:" in render("deep-supervision", model="m", data="d", language="vi")
    for method in ("sft", "tft"):
        assert "\nsupervision:" not in render(method, model="m", data="d", language="vi")


def test_unknown_method(capsys):
    assert main(["init", "--method", "dft"]) == 2
    allowed = "english-only, tft, deep-supervision, cross-lingual, plug"
    expected = f"pivotune: error: --method: 'dft' is not allowed; allowed: {allowed}\n"
    assert capsys.readouterr() == ("", expected)


def alternatives() -> list[tuple[str, str]]:
    """(key, value) of every alternative that a comment offers: `a | b | c` behind a key, `;` between keys."""
    found, section = [], ""
    for line in render("deep-supervision", model="m", data="d", language="vi").splitlines():
        line = re.sub(r"^( +)# (?=\w+: )", r"\1", line)  # a key that is offered commented out
        setting, _, comment = line.partition("# ")
        key = setting.strip().partition(":")[0]
        if setting and not setting.startswith(" "):
            section = key
        keys = re.findall(r"[{,] ?(\w+):", setting) or [""]
        groups = [group for group in comment.split(":")[-1].split(";") if "|" in group]
        for name, group in zip(keys, groups, strict=False):
            path = ".".join(part for part in (section if section != key else "", key, name) if part)
            found += [(path, re.split(r"[,(]", value)[0].strip()) for value in group.split(" | ")]
    return found


def test_the_alternatives_are_found():
    keys = {key for key, _ in alternatives()}
    assert keys == {
        "method",
        "data.on_bad_row",
        "data.template",
        "supervision.thinking.signal",
        "supervision.schedule",
        "supervision.lens",
        "supervision.layers",
        "supervision.balance.mode",
        "supervision.logits.gradient",
        "supervision.feature.pooling",
        "supervision.feature.span",
        "supervision.feature.english",
        "faults.nonfinite",
    }


@pytest.mark.parametrize(("key", "value"), alternatives())
def test_every_alternative_in_a_comment_is_allowed(key, value, tmp_path):
    config = read(render("deep-supervision", model="m", data="d", language="vi"), tmp_path)
    changed = parse_config(apply_changes(config.model_dump(), [f"{key}={value}"])).model_dump()
    for part in key.split("."):
        changed = changed[part]
    assert changed == value


def test_lora_as_its_comment_says(tmp_path):
    text = render("tft", model="m", data="d", language="vi")
    offered = re.search(r"^lora: null +# or (\{.*\})$", text, flags=re.MULTILINE)
    assert offered
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    lora = load_config(path, [f"lora={offered[1]}"]).lora
    assert lora == load_config(path, ["lora={}"]).lora


def test_no_torch_is_loaded_for_it():
    import subprocess

    script = (
        "import sys; from pivotune.cli.main import main; main(['init']); "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_a_preset_fills_what_the_file_leaves_out(tmp_path):
    text = render("deep-supervision", model="m", data="d", language="vi")
    paper = read(text.replace("preset: recommended", "preset: paper      "), tmp_path)
    supervision = paper.supervision
    assert (supervision.thinking.weight, supervision.schedule, supervision.lens) == (1.0, "constant", "logit")
    assert (supervision.logits.gradient, paper.data.english_ratio) == ("all", 0.0)
