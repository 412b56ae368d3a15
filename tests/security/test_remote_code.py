"""No code of a model, tokenizer, template or data set runs unless `trust_remote_code` asks for it."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
from planted import call, copy, plant_code, refused, write_yaml
from tiny_training import tiny_rows
from transformers import dynamic_module_utils

from pivotune.data.hub import parse_hub_name, read_hub
from pivotune.data.templates import Turn, load_template
from pivotune.errors import UsageError
from pivotune.evaluation.tasks.tables import read_hub_records
from pivotune.models.loading import load_tokenizer, read_config

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ lipsum.__globals__['os'].mkdir('MARK') }}",
    "{% include '/etc/passwd' %}",
    "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}",
    "{% set x = [].append %}{{ x.__self__.__class__ }}",
]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


@pytest.fixture
def model(base, tmp_path, mark) -> Path:
    """A model folder with code in it, which nothing names yet."""
    folder = copy(base, tmp_path / "model")
    plant_code(folder / "evil.py", mark)
    return folder


def calls(model: Path, rows: Path, folder: Path) -> list[list[object]]:
    run = write_yaml(folder, model=str(model), data={"train": str(rows), "validation": 2})
    return [
        ["chat", model, "--prompt", "Namba?", "--max-new-tokens", 2],
        ["train", run],
        ["analyze", "--model", model, "--data", rows],
        ["evaluate", model, "--tasks", "alignment_pairs_sw", "--pairs", rows],
    ]


def test_model_code_is_refused(model, rows, tmp_path, capsys):
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit_json(model / "config.json", model_type="evil", auto_map=auto_map)
    for words in calls(model, rows, tmp_path):
        expected = "it needs code of its own to be run; set trust_remote_code to true if you trust its author"
        assert refused(capsys, *words) == f"{model}: {expected}"


def test_model_code_beside_a_known_architecture_is_not_run(model, capsys):
    edit_json(model / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    assert call(capsys, "chat", model, "--prompt", "Namba?", "--max-new-tokens", 2)[0] == 0


def test_tokenizer_code_is_refused(model, rows, tmp_path, capsys):
    edit_json(
        model / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )
    for words in calls(model, rows, tmp_path):
        assert "trust_remote_code" in refused(capsys, *words)


def test_code_of_generation_is_not_run(model, mark, capsys):
    plant_code(model / "custom_generate" / "generate.py", mark)
    edit_json(model / "generation_config.json", custom_generate=str(model), trust_remote_code=True)
    assert call(capsys, "chat", model, "--prompt", "Namba?", "--max-new-tokens", 2)[0] in (0, 2)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_from_the_hub_are_refused(key, model, capsys):
    edit_json(model / "config.json", **{key: "somebody/kernel"})
    assert "asks for code from the Hub" in refused(capsys, "chat", model, "--prompt", "Namba?")


def test_asking_for_it_runs_it(base, tmp_path, monkeypatch):
    """The planted code does run where it is asked for: the tests above would notice it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder, place = copy(base, tmp_path / "model"), tmp_path / "ran"
    plant_code(folder / "evil.py", place)
    edit_json(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    # The class is no configuration; what counts is that its module was imported.
    with suppress(Exception):
        read_config(str(folder), trust_remote_code=True)
    assert place.is_dir()


# ---- templates ----


@pytest.mark.parametrize("escape", ESCAPES)
def test_chat_templates_are_sandboxed(escape, model, mark):
    template = escape.replace("MARK", str(mark)) + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    chat = load_template("chat", load_tokenizer(str(model)))
    with pytest.raises((UsageError, TypeError)):
        chat.render(Turn("Namba?"))


@pytest.mark.parametrize("escape", ESCAPES)
def test_template_files_are_sandboxed(escape, base, rows, tmp_path, mark, capsys):
    path = tmp_path / "template.jinja"
    path.write_text(escape.replace("MARK", str(mark)).replace("messages", "history") + "{{ prompt }} {{ completion }}")
    run = write_yaml(tmp_path, model=str(base), data={"train": str(rows), "validation": 2, "template": str(path)})
    message = refused(capsys, "train", run)
    assert message.startswith(f"template {path}")


# ---- data sets ----


def test_loading_scripts_of_data_sets_are_not_asked_for(monkeypatch):
    """`datasets` runs none any more; nothing here would ask an older one to."""
    asked = []

    def load_dataset(*names, **options):
        asked.append(options)
        return datasets.Dataset.from_list(tiny_rows(2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    name = parse_hub_name("hub:owner/name:train")
    assert name is not None
    assert len(list(read_hub(name))) == 2
    assert len(list(read_hub_records("task", "owner/name", None, "train"))) == 2
    assert len(asked) == 2
    assert all("trust_remote_code" not in options for options in asked)
