"""Tokens and passwords are in no file of a run and in nothing that is printed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from planted import call, copy, refused, write_yaml

from pivotune.cli.main import main
from pivotune.config.yaml_text import dump_config, load_config, parse_config
from pivotune.runs.folder import claim_run_folder, environment, find_change, read_run_config
from pivotune.text.redaction import REDACTED, is_secret_name, redact, redact_command, redact_settings

# Made here, of nobody: the forms of real ones.
HUB = "hf_" + "aB3" * 12
PLAIN = "correct-horse-battery"
OTHER = "environment-5ecret-value"


def holding(folder: Path, *secrets: str) -> list[Path]:
    """Files in which a secret stands, also within pickles."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


@pytest.mark.parametrize("where", ["file", "command"])
def test_no_token_in_a_run(where, base, rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", OTHER)
    training = {"max_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "steps", "save_steps": 1}
    settings = {
        # A folder has no revisions.
        "revision": f"with {HUB}" if where == "file" else None,
        "model": str(base),
        "data": {"train": str(rows), "validation": 2},
        "method": "tft",
        "training": training,
    }
    path = tmp_path / "config" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "run")}))
    words = ["train", str(path)]
    if where == "command":
        words += ["--set", f"revision={OTHER}"]
    monkeypatch.setattr(sys, "argv", ["pivotune", *words])
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert holding(tmp_path / "run", HUB, OTHER) == []
    assert not any(secret in out + err for secret in (HUB, OTHER))
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").is_file()


def test_command_line_is_kept_without_secrets(monkeypatch):
    words = ["train", "run.yaml", "--token", PLAIN, "--set", f"training.hub_token={PLAIN}", f"--api-key={PLAIN}",
             "--set", f"training={{hub_token: {PLAIN}, max_steps: 1}}", f"data.train=https://me:{PLAIN}@host/rows",
             "--set", "training.max_steps=3"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["pivotune", *words])
    command = environment()["command"]
    assert PLAIN not in json.dumps(command)
    assert command[:3] == ["pivotune", "train", "run.yaml"]
    assert command[-1] == "training.max_steps=3"
    assert len(command) == len(words) + 1


def settings(folder: Path, **training: object) -> dict:
    data = {"train": f"https://me:{PLAIN}@host/rows.jsonl"}
    return {"model": "m", "data": data, "training": training, "output_dir": str(folder / "run")}


def test_configuration_is_written_without_secrets_and_read_back(tmp_path):
    """What is left out is read as not set: a placeholder could be taken for the token."""
    text = dump_config(parse_config(settings(tmp_path, hub_token=PLAIN, max_steps=3)))
    assert PLAIN not in text
    (tmp_path / "config.yaml").write_text(text)
    again = load_config(tmp_path / "config.yaml")
    assert again.training == {"max_steps": 3}
    assert again.data.train == f"https://{REDACTED}@host/rows.jsonl"


@pytest.mark.parametrize("token", [PLAIN, "another", None])
def test_resuming_needs_no_token_to_be_the_same_run(token, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(parse_config(settings(tmp_path, hub_token=PLAIN))))
    config = parse_config(settings(tmp_path, **({} if token is None else {"hub_token": token})))
    assert claim_run_folder(config, resume=True) == run
    assert config.training.get("hub_token") == token
    assert "hub_token" not in read_run_config(run).training


def test_sweeps_see_no_change_in_a_token(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_config(parse_config(settings(tmp_path, hub_token=PLAIN))))
    assert find_change(tmp_path, parse_config(settings(tmp_path, hub_token=OTHER)), ignored=("output_dir",)) is None
    changed = find_change(tmp_path, parse_config(settings(tmp_path, max_steps=3)), ignored=("output_dir",))
    assert changed == ("training.max_steps", None, 3)


@pytest.mark.parametrize(
    "change",
    [f"training.hub_token={{{PLAIN}", f"training.hub_token={PLAIN}", f"data.train=https://me:{PLAIN}@host/x.jsonl",
     f"data.password={PLAIN}", f"model={HUB}"],
)  # fmt: skip
def test_messages_hold_no_secrets(change, base, rows, tmp_path, capsys):
    path = write_yaml(tmp_path, model=str(base), data={"train": str(rows), "validation": 2})
    message = refused(capsys, "train", path, "--set", change)
    assert PLAIN not in message
    assert HUB not in message


def test_words_that_typer_refuses_hold_no_secrets(capsys):
    assert main(["train", "run.yaml", f"--api-token={PLAIN}"]) == 2
    captured = capsys.readouterr()
    assert PLAIN not in captured.out + captured.err


def test_environment_is_not_written(monkeypatch, stopped):
    """What a run keeps of its machine is versions and hardware."""
    content = json.loads((stopped / "run" / "environment.json").read_text())
    assert content.keys() == {"python", "platform", "cpu_cores", "cpu_capability", "devices", "libraries", "command"}
    values = [value for value in os.environ.values() if len(value) > 20]
    assert not any(value in json.dumps(content) for value in values)


# ---- what is a secret ----


@pytest.mark.parametrize("name", ["token", "hub_token", "HF_TOKEN", "training.hub_token", "password", "api_key", "apiKey",
                                  "AWS_SECRET_ACCESS_KEY", "client-secret", "private_key", "credentials"])  # fmt: skip
def test_secret_names(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "max_prompt_tokens", "tokenizer", "keyboard", "seed",
                                  "include_num_input_tokens_seen", "push_to_hub", "metric_key", "image_token"])  # fmt: skip
def test_other_names(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "text",
    ["the token limit: 5", "pad_token=<|pad|>", "hf_datasets", "sk-learn", "me@example.org", "runs/vi/checkpoint-4",
     "https://huggingface.co/owner/model", "see https://host/x, or write to me@example.org", "a basic understanding",
     "authorization: required", "--hub-token together with --resume", "--pad-token <|padding|>",
     "give --hub-token, or log in", "glpat-form", "AIzawa", "no end-of-text token, so no answer could end"],
)  # fmt: skip
def test_texts_that_stay(text):
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [HUB, "sk-proj-" + "a1" * 20, "ghp_" + "a1B2" * 9, "AKIA" + "A1B2" * 4, f"https://a:{HUB}@h/x",
     f"Authorization: Bearer {HUB}", f'{{"hub_token": "{HUB}"}}'],
)  # fmt: skip
def test_texts_that_go(text):
    assert REDACTED in redact(text)
    assert HUB not in redact(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:p@ss@host/x?a=1", f"https://{REDACTED}@host/x?a=1"),
        ("https:/user:p@s@s@host and me@example.org", f"https:/{REDACTED}@host and me@example.org"),
        ("Authorization: Basic dXNlcjpwYXNz, x", f"Authorization: Basic {REDACTED}, x"),
        ("{'Authorization': 'Basic dXNlcjpwYXNz'}", f"{{'Authorization': 'Basic {REDACTED}'}}"),
        (f"a glpat-{'a1-B_' * 4} z", f"a {REDACTED} z"),
        (f"key AIza{'a1-B_' * 7}.", f"key {REDACTED}."),
        ("started with --hub-token abCDefgh, which", f"started with --hub-token {REDACTED}, which"),
        (f"train --api-key {PLAIN} now", f"train --api-key {REDACTED} now"),
        ("{'password': 'ab''cdef', 'x': 'y'}", f"{{'password': {REDACTED}, 'x': 'y'}}"),
        ('{"token": "ab\\"cdef", "x": ""}', f'{{"token": {REDACTED}, "x": ""}}'),
        ("{'token': '', 'x': ''}", f"{{'token': {REDACTED}, 'x': ''}}"),
        ("token='abc", f"token={REDACTED}"),
    ],
)
def test_no_part_of_a_secret_stays(text, left):
    assert redact(text) == left


VALUES = st.none() | st.booleans() | st.integers() | st.sampled_from(["", "a", "pad_token: x", "größer"])


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner)))
def test_settings_without_secrets_stay(value):
    assert redact_settings(value) == value


def test_values_behind_options():
    assert redact_command(["--token", "x", "y"]) == ["--token", REDACTED, "y"]
    assert redact_command(["--pad-token", "x"]) == ["--pad-token", "x"]


def test_copies_of_a_run_hold_no_more(stopped, tmp_path):
    """A model folder that is handed on has no arguments in it."""
    model = copy(stopped / "run" / "model", tmp_path / "model")
    assert {path.suffix for path in model.iterdir()} <= {".json", ".safetensors", ".jinja"}
