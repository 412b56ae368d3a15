from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from pivotune.config.registry import METHODS
from pivotune.config.settings import DataConfig, RunConfig
from pivotune.config.yaml_text import apply_changes, dump_config, load_config, parse_config, to_yaml
from pivotune.errors import UsageError
from pivotune.methods.base import required_sides

SMALLEST = {"model": "m", "data": {"train": "pairs.jsonl"}, "output_dir": "runs/vi"}
ROOT_KEYS = (
    "model, preset, method, data, supervision, cross_lingual, sdrrl, training, faults, ema, interpolate, lora, quantize, "
    "dtype, revision, trust_remote_code, output_dir, seed"
)


def changed(*changes: str) -> RunConfig:
    return parse_config(apply_changes(SMALLEST, changes), where="run.yaml")


def message(*changes: str) -> str:
    with pytest.raises(UsageError) as caught:
        changed(*changes)
    text = str(caught.value)
    assert "\n" not in text
    return text


def file_message(path) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.fixture
def write(tmp_path):
    def write_file(text: str | bytes):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_file


def test_every_default():
    signal = {"signal": "logits", "layer": "auto", "weight": 0.3}
    assert parse_config(SMALLEST).model_dump() == {
        "model": "m",
        "preset": "recommended",
        "method": "deep-supervision",
        "data": {
            "train": "pairs.jsonl",
            "english": None,
            "validation": 0.05,
            "validation_english": None,
            "limit": None,
            "language": None,
            "language_temperature": 1.0,
            "template": None,
            "turns": "all",
            "fold_system": False,
            "english_ratio": 0.25,
            "max_prompt_tokens": 256,
            "max_completion_tokens": 256,
            "token_budget": None,
            "on_bad_row": "error",
        },
        "supervision": {
            "conversion": {**signal, "signal": "none"},
            "thinking": signal,
            "schedule": "linear",
            "alternate": False,
            "phase": {"steps": 0, "task": False, "learning_rate": None},
            "keep_english": {"kl": 0.0, "top": 32},
            "lens": "tuned",
            "logits": {"mode": "autoregressive", "norm": "final", "gradient": "prompt", "forward": "auto"},
            "feature": {"pooling": "mean", "span": "query", "english": "detached", "english_norm": "final"},
            "contrastive": {"span": "query", "english": "detached", "temperature": 0.1},
            "cka": {"span": "query", "english": "detached"},
            "tuned": {"text": "english", "states": 10_000, "steps": 60, "refit": 0},
            "balance": {"mode": "none", "every": 100, "max_share": 0.5},
            "layers": "reading",
            "profile_rows": 64,
        },
        "training": {},
        "cross_lingual": {"english_answers": 1 / 3, "english_prompts": 0.0, "translations": 0.0},
        "sdrrl": {
            "target_target": 1.0,
            "target_english": 1.0,
            "english_target": 1.0,
            "english_english": 1.0,
            "translation": 1.0,
            "completion": 1.0,
            "name_language": True,
            "code_switching": {"share": 0.5, "probability": 0.3, "dictionary": None},
        },
        "faults": {"nonfinite": "stop", "skip_limit": 10, "hang_timeout": 1800.0},
        "ema": None,
        "interpolate": 1.0,
        "lora": None,
        "quantize": None,
        "dtype": "auto",
        "revision": None,
        "trust_remote_code": False,
        "output_dir": "runs/vi",
        "seed": 0,
    }
    assert changed("lora={}").lora.model_dump() == {
        "r": 16,
        "alpha": 32,
        "dropout": 0.05,
        "target_modules": "all-linear",
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("methods=tft", "unknown key methods; did you mean method?"),
        ("data.lang=vi", "unknown key data.lang; did you mean data.language?"),
        ("supervision.schedul=linear", "unknown key supervision.schedul; did you mean supervision.schedule?"),
        (
            "supervision.conversion.wieght=1",
            "unknown key supervision.conversion.wieght; did you mean supervision.conversion.weight?",
        ),
        ("supervision.logits.moed=x", "unknown key supervision.logits.moed; did you mean supervision.logits.mode?"),
        ("supervision.logits={zzz: 1}", "unknown key supervision.logits.zzz; known keys: mode, norm, gradient, forward"),
        ("lora.rank_=8", "unknown key lora.rank_; known keys: r, alpha, dropout, target_modules"),
        ("zzz=1", f"unknown key zzz; known keys: {ROOT_KEYS}"),
        ("int=1", f"unknown key int; known keys: {ROOT_KEYS}"),
        ("lora.str=1", "unknown key lora.str; known keys: r, alpha, dropout, target_modules"),
        ("supervision.logits={1: 2}", "unknown key supervision.logits.1; known keys: mode, norm, gradient, forward"),
    ],
)  # fmt: skip
def test_unknown_key_names_the_nearest_valid_one(change, expected):
    assert message(change) == f"run.yaml: {expected}"


def test_an_unknown_language_code_is_refused():
    assert message("data.language=vn") == "run.yaml: data.language: 'vn' is not a language code; Vietnamese is vi"


def test_several_files_with_weights():
    data = changed("data.train=[{path: a.jsonl, weight: 2, english: en.jsonl}, b.jsonl, 'owner/name:train']").data
    assert [(source.path, source.english, source.weight) for source in data.sources] == [
        ("a.jsonl", "en.jsonl", 2.0), ("b.jsonl", None, 1.0), ("owner/name:train", None, 1.0),
    ]  # fmt: skip
    one = changed("data.english=en.jsonl").data
    assert [(source.path, source.english, source.weight) for source in one.sources] == [
        ("pairs.jsonl", "en.jsonl", 1.0)
    ]
    config = changed("data.train=[{path: a.jsonl, weight: 0.5}, b.jsonl]")
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("language=[vi, vn]", "data.language: 'vn' is not a language code; Vietnamese is vi"),
        ("language=[vi, vi]", "data.language: vi is named twice"),
        ("language=[vi, eng_Latn]", "data.language: eng_Latn is English, the other side of every row"),
        ("language=[]", "data.language: [] is not allowed; allowed: a code, or a list of codes"),
        ("language=[vi, 3]", "data.language: ['vi', 3] is not allowed; allowed: a code, or a list of codes"),
        ("train=[{path: a, language: vn}]", "data.train: language: 'vn' is not a language code; Vietnamese is vi"),
        ("language_temperature=0.5", "data.language_temperature: 0.5 is not allowed; allowed: at least 1"),
    ],
)  # fmt: skip
def test_languages_that_are_refused(change, expected):
    assert message(f"data.{change}") == f"run.yaml: {expected}"


def test_languages_are_a_list_or_one_code():
    data = {"train": [{"path": "a", "language": False}, "b"], "language": ["vi", False]}
    found = parse_config({"model": "m", "output_dir": "run", "data": data}).data
    assert (found.languages, found.sources[0].language, found.sources[1].language) == (["vi", "no"], "no", None)
    assert (DataConfig(train="a", language="vi").languages, DataConfig(train="a").languages) == (["vi"], [])


FORMS = "a file, a Hub dataset, or a list of them and of {path, english, weight, language}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("train=[]", f"data.train: [] is not allowed; allowed: {FORMS}"),
        ("train=[a.jsonl, 3]", f"data.train: ['a.jsonl', 3] is not allowed; allowed: {FORMS}"),
        ("train=[{path: a, weight: 0}]", "data.train.0.weight: 0 is not allowed; allowed: greater than 0"),
        ("train=[b, {path: a, weight: -1}]", "data.train.1.weight: -1 is not allowed; allowed: greater than 0"),
        ("train=[{path: a, weight: .inf}]", "data.train.0.weight: inf is not allowed; allowed: at most 1000"),
        ("train=[{path: a, weight: .nan}]", "data.train.0.weight: nan is not allowed; allowed: at most 1000"),
        ("train=[{path: a, weight: '2'}]", "data.train.0.weight: '2' is not allowed; allowed: a number"),
        ("train=[{path: a, wieght: 2}]", "unknown key data.train.0.wieght; did you mean data.train.0.weight?"),
        ("train=[{weight: 2}]", "data.train.0.path is missing"),
        ("train=[a.jsonl, ./a.jsonl]", "data.train: a.jsonl is named twice; give it weight: 2"),
        (
            "={train: [a, b], english: c}",
            "data.english: belongs to one file; write {path: FILE, english: FILE} into data.train",
        ),
    ],
)  # fmt: skip
def test_files_and_weights_that_are_refused(change, expected):
    change = f"data{change}" if change.startswith("=") else f"data.{change}"
    assert message(change) == f"run.yaml: {expected}"


def test_an_unknown_key_is_named_before_the_key_that_it_misspells():
    settings = {**SMALLEST, "data": {"trian": "pairs.jsonl"}}
    with pytest.raises(UsageError, match=r"^run\.yaml: unknown key data\.trian; did you mean data\.train\?$"):
        parse_config(settings, where="run.yaml")


@pytest.mark.parametrize("key", ["model", "output_dir", "data", "data.train"])
def test_missing_keys(key):
    settings = {**SMALLEST, "data": dict(SMALLEST["data"])}
    del (settings["data"] if "." in key else settings)[key.rpartition(".")[2]]
    with pytest.raises(UsageError, match=f"^configuration: {key} is missing$"):
        parse_config(settings)


CHOICES = [
    ("method", "dft", "'english-only', 'tft', 'deep-supervision', 'cross-lingual', 'sdrrl' or 'plug'"),
    ("dtype", "float16", "'auto', 'float32' or 'bfloat16'"),
    ("quantize", "8bit", "'4bit'"),
    ("data.on_bad_row", "ignore", "'error' or 'skip'"),
    ("supervision.schedule", "step", "'constant', 'linear' or 'cosine'"),
    ("supervision.conversion.signal", "logit", "'logits', 'feature', 'contrastive', 'cka' or 'none'"),
    ("supervision.thinking.signal", "logit", "'logits', 'feature', 'contrastive', 'cka' or 'none'"),
    ("supervision.logits.mode", "greedy", "'autoregressive' or 'positional'"),
    ("supervision.logits.norm", "raw", "'final' or 'none'"),
    ("supervision.logits.forward", "fast", "'auto', 'shared' or 'separate'"),
    ("supervision.feature.pooling", "max", "'mean' or 'last'"),
    ("supervision.feature.span", "answer", "'query' or 'query+answer'"),
    ("supervision.feature.english", "free", "'detached', 'joint' or 'frozen'"),
    ("supervision.feature.english_norm", "none", "'final' or 'raw'"),
]


@pytest.mark.parametrize(("key", "found", "allowed"), CHOICES)
def test_unknown_choice_lists_what_is_allowed(key, found, allowed):
    assert message(f"{key}={found}") == f"run.yaml: {key}: {found!r} is not allowed; allowed: {allowed}"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("supervision.conversion.weight=-0.1", "-0.1 is not allowed; allowed: at least 0"),
        ("supervision.thinking.weight=-1", "-1 is not allowed; allowed: at least 0"),
        ("supervision.conversion.weight=.nan", "nan is not allowed; allowed: a finite number"),
        ("supervision.conversion.weight=.inf", "inf is not allowed; allowed: a finite number"),
        ("supervision.conversion.weight=heavy", "'heavy' is not allowed; allowed: a number"),
        ("supervision.conversion.weight=true", "True is not allowed; allowed: a number"),
        ("supervision.conversion.layer=0", "0 is not allowed; allowed: at least 1, or 'auto'"),
        ("supervision.thinking.layer=-3", "-3 is not allowed; allowed: at least 1, or 'auto'"),
        ("supervision.thinking.layer=half", "'half' is not allowed; allowed: a whole number, or 'auto'"),
        ("supervision.thinking.layer=2.5", "2.5 is not allowed; allowed: a whole number, or 'auto'"),
        ("supervision.thinking.layer=true", "True is not allowed; allowed: a whole number, or 'auto'"),
        ("supervision.phase.steps=-1", "-1 is not allowed; allowed: at least 0"),
        ("supervision.phase.learning_rate=0", "0 is not allowed; allowed: greater than 0"),
        ("supervision.keep_english.kl=-1", "-1 is not allowed; allowed: at least 0"),
        ("supervision.keep_english.top=0", "0 is not allowed; allowed: at least 1"),
        ("supervision.profile_rows=0", "0 is not allowed; allowed: at least 1"),
        ("data.english_ratio=1", "1 is not allowed; allowed: less than 1"),
        ("data.english_ratio=-0.5", "-0.5 is not allowed; allowed: at least 0"),
        ("data.english_ratio=.nan", "nan is not allowed; allowed: less than 1"),
        ("data.validation=-1", "-1 is not allowed; allowed: at least 0, or text"),
        ("data.validation=1.5", "1.5 is not allowed; allowed: a whole number, or less than 1, or text"),
        ("data.validation=true", "True is not allowed; allowed: a whole number, or a number, or text"),
        ("data.max_prompt_tokens=0", "0 is not allowed; allowed: at least 1"),
        ("data.max_completion_tokens=-1", "-1 is not allowed; allowed: at least 1"),
        ("data.limit=0", "0 is not allowed; allowed: at least 1"),
        ("ema=1", "1 is not allowed; allowed: less than 1"),
        ("ema=0.0", "0.0 is not allowed; allowed: greater than 0"),
        ("ema=true", "True is not allowed; allowed: a number"),
        ("interpolate=0", "0 is not allowed; allowed: greater than 0"),
        ("interpolate=1.5", "1.5 is not allowed; allowed: at most 1"),
        ("lora.r=0", "0 is not allowed; allowed: at least 1"),
        ("lora.dropout=1.0", "1.0 is not allowed; allowed: less than 1"),
        ("lora.target_modules=5", "5 is not allowed; allowed: text, or a list"),
        ("seed=-1", "-1 is not allowed; allowed: at least 0"),
        ("seed=true", "True is not allowed; allowed: a whole number"),
        ("trust_remote_code=maybe", "'maybe' is not allowed; allowed: true or false"),
        ("model=", "null is not allowed; allowed: text"),
        ("training=5", "5 is not allowed; allowed: a section with keys of its own"),
        ("data=pairs.jsonl", "'pairs.jsonl' is not allowed; allowed: a section with keys of its own"),
    ],
)
def test_value_that_is_not_allowed(change, expected):
    key = change.partition("=")[0]
    assert message(change) == f"run.yaml: {key}: {expected}"


@pytest.mark.parametrize("layers", [(3, 3), (4, 2)])
def test_conversion_comes_below_thinking(layers):
    low, high = layers
    expected = (
        f"run.yaml: supervision.conversion.layer: {low} is not below supervision.thinking.layer: {high}; "
        "conversion comes before thinking"
    )
    changes = [f"supervision.conversion.layer={low}", f"supervision.thinking.layer={high}"]
    assert message(*changes) == expected
    assert changed(*changes, "supervision.conversion.signal=none").supervision.thinking.layer == high
    assert changed(changes[0]).supervision.conversion.layer == low


def test_deep_supervision_has_a_signal():
    none = ["supervision.conversion.signal=none", "supervision.thinking.signal=none"]
    assert message(*none) == "run.yaml: supervision: both signals are none; that is method: tft"
    assert changed(*none, "method=tft").method == "tft"
    assert changed(none[0]).supervision.thinking.signal == "logits"


def test_quantized_training_needs_adapters():
    assert message("quantize=4bit") == "run.yaml: quantize: 4bit trains adapters only; add lora: {r: 16}"
    assert changed("quantize=4bit", "lora={r: 4}").lora.r == 4


@pytest.mark.parametrize(
    ("method", "ratio", "target", "training", "heldout", "needed_by"),
    [
        ("tft", 0, True, False, False, "data.english_ratio 0 (0 for none)"),
        ("tft", 0.25, True, True, False, "data.english_ratio 0.25 (0 for none)"),
        ("english-only", 0, False, True, True, "method english-only"),
        ("deep-supervision", 0, True, True, False, "method deep-supervision"),
    ],
)
def test_required_sides(method, ratio, target, training, heldout, needed_by):
    sides = required_sides(METHODS[method], ratio)
    assert (sides.target, sides.english, sides.needed_by) == (target, training, needed_by)
    assert required_sides(METHODS[method], ratio, heldout=True).english is heldout


def test_sft_is_another_name_of_english_only():
    assert changed("method=sft").method == "english-only"


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("supervision.thinking.layer=5", ("supervision", "thinking", "layer"), 5),
        ("training.learning_rate=2e-5", ("training", "learning_rate"), 2e-5),
        ("training.learning_rate=1E4", ("training", "learning_rate"), 1e4),
        ("training.label_smoothing_factor=-.5e+3", ("training", "label_smoothing_factor"), -500.0),
        ("revision='2e5'", ("revision",), "2e5"),
        ("model=a=b=c", ("model",), "a=b=c"),
        ("lora.target_modules=[q_proj, v_proj]", ("lora", "target_modules"), ["q_proj", "v_proj"]),
        ("supervision.logits={mode: positional}", ("supervision", "logits", "mode"), "positional"),
        ("data.limit=null", ("data", "limit"), None),
        ("data.validation=0.5", ("data", "validation"), 0.5),
        ("data.validation=500", ("data", "validation"), 500),
        ("data.validation=held.jsonl", ("data", "validation"), "held.jsonl"),
        ("data.language=no", ("data", "language"), "no"),
        ("output_dir=2026-01-31", ("output_dir",), "2026-01-31"),
        (" seed =3", ("seed",), 3),
        ("training.warmup_steps=0.1", ("training", "warmup_steps"), 0.1),
        ("training.save_strategy=no", ("training", "save_strategy"), "no"),
        ("training.fp16=no", ("training", "fp16"), False),
    ],
)
def test_set_values(change, path, value):
    found = changed(change).model_dump()
    for key in path:
        found = found[key]
    assert found == value
    assert type(found) is type(value)


def test_later_changes_win_and_the_settings_given_stay_as_they_are():
    settings = {**SMALLEST, "lora": {"target_modules": ["q_proj"]}}
    result = apply_changes(settings, ["seed=1", "data.limit=3", "seed=2", "lora.r=4"])
    assert (result["seed"], result["data"]["limit"], result["lora"]) == (2, 3, {"target_modules": ["q_proj"], "r": 4})
    assert settings == {**SMALLEST, "lora": {"target_modules": ["q_proj"]}}
    assert SMALLEST["data"] == {"train": "pairs.jsonl"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seed", "--set seed: expected key=value, such as training.learning_rate=1e-4"),
        ("=3", "--set =3: expected key=value, such as training.learning_rate=1e-4"),
        ("model=[a", "--set model=[a: the value is not valid YAML"),
        ("training={a: 1, a: 2}", "--set training={a: 1, a: 2}: the value is not valid YAML"),
        ("model.name=m", "--set model.name=m: model is a value, not a section"),
        ("data.train.x.y=3", "--set data.train.x.y=3: train is a value, not a section"),
    ],
)
def test_set_that_cannot_be_read(change, expected):
    assert message(change) == expected


def test_load_config_reads_the_file_and_its_changes(write):
    path = write("\ufeffmodel: été\ndata: {train: p.csv}\noutput_dir: o\ntraining: {learning_rate: 2e-5}\n")
    config = load_config(path, ["seed=4"])
    assert (config.model, config.data.train, config.seed) == ("été", "p.csv", 4)
    assert config.training == {"learning_rate": 2e-5}
    assert file_message(write("model: m\noutput_dir: o\n")) == "FILE: data is missing"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: m\ndata: {train: p\nseed: 1\n", ", line 3: not valid YAML: expected ',' or '}', but got ':'"),
        ("model: m\n\tseed: 1\n", ", line 2: not valid YAML: found character '\\t' that cannot start any token"),
        (
            "model: m\nseed: 1\ndata:\n  train: p\n  train: q\n",
            ", line 5: not valid YAML: the key train stands here again, first in line 4",
        ),
        (
            "model: m\nseed: 1\noutput_dir: o\nseed: 2\n",
            ", line 4: not valid YAML: the key seed stands here again, first in line 2",
        ),
        ("model: !python/object m\n", ", line 1: not valid YAML: could not determine a constructor for the tag "
         "'!python/object'"),
        ("- model: m\n", ": expected keys such as model: and data:, found list"),
        ("model\n", ": expected keys such as model: and data:, found str"),
        ("", ": expected keys such as model: and data:, found nothing"),
        (b"model: caf\xe9\n", ": not UTF-8 text"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_read(write, text, expected):
    assert file_message(write(text)) == f"FILE{expected}"


def test_control_characters_are_one_line(write):
    text = file_message(write("model: \x00\n"))
    assert text.startswith("FILE: not valid YAML: unacceptable character #x0000")
    assert "\n" not in text


def test_the_same_key_in_two_sections_and_merged_keys_are_no_repetition(write):
    path = write(
        "model: m\noutput_dir: o\ndata: {train: p}\nsupervision:\n"
        "  conversion: &signal {signal: feature, weight: 0.5}\n  thinking: {<<: *signal, weight: 0.2}\n"
    )
    supervision = load_config(path).supervision
    assert (supervision.conversion.weight, supervision.thinking.weight) == (0.5, 0.2)
    assert supervision.thinking.signal == "feature"


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "vietnamese.yaml").write_text("model: m\n")
    near = tmp_path / "vietnamse.yaml"
    assert file_message(near) == f"FILE: no such file; did you mean {tmp_path / 'vietnamese.yaml'}?"
    assert file_message(tmp_path / "other.txt") == "FILE: no such file"
    assert file_message(tmp_path / "nowhere" / "run.yaml") == "FILE: no such file"


def test_a_folder_is_no_file_but_a_run_folder_has_one(tmp_path):
    assert file_message(tmp_path) == "FILE: a folder; give a YAML file"
    (tmp_path / "config.yaml").write_text("model: m\n")
    assert file_message(tmp_path) == "FILE: a folder; give a YAML file, such as FILE/config.yaml"


@pytest.mark.parametrize("method", list(METHODS))
def test_dump_and_load_give_the_same_configuration(write, method):
    config = changed(
        f"method={method}",
        "model='1e5'",
        "revision='2026-01-31'",
        "data.language=no",
        "data.train='été: a # b/ዳታ.jsonl'",
        "data.validation=12",
        "lora={r: 4, target_modules: [q_proj]}",
        "training={learning_rate: 3e-7, lr_scheduler_kwargs: {min_lr: 1e-9}, report_to: null}",
        "supervision.conversion={signal: feature, layer: 2, weight: 0.125}",
    )
    assert load_config(write(dump_config(config))) == config
    # Other readers of config.yaml see the same values.
    assert yaml.safe_load(dump_config(config)) == config.model_dump()


def test_to_yaml_keeps_long_texts_on_one_line():
    text = to_yaml({"train": "a long folder name/" * 20})
    assert text == f"train: {'a long folder name/' * 20}\n"


def test_importing_the_configuration_imports_nothing_heavy():
    heavy = ("torch", "transformers", "numpy", "datasets", "altair", "peft", "babel", "rich")
    script = f"import sys, pivotune.config.settings; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_preset_changes_defaults_and_single_keys_change_it():
    paper = changed("preset=paper")
    assert (paper.supervision.thinking.weight, paper.supervision.schedule) == (1.0, "constant")
    assert (paper.supervision.lens, paper.supervision.logits.gradient) == ("logit", "all")
    assert paper.data.english_ratio == 0.0
    own = changed("preset=paper", "supervision.thinking.weight=0.5", "data.english_ratio=0.1")
    assert (own.supervision.thinking.weight, own.supervision.conversion.weight) == (0.5, 1.0)
    assert list(own.supervision.active()) == ["conversion", "thinking"]
    assert list(changed("supervision.conversion={}").supervision.active()) == ["conversion", "thinking"]
    assert own.data.english_ratio == 0.1
    assert message("preset=papr") == "run.yaml: preset: 'papr' is not allowed; allowed: 'recommended' or 'paper'"
    # What a run writes down is read back as it was.
    for config in (own, changed("supervision.logits.mode=positional")):
        assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["supervision.lens=tuned", "supervision.logits.norm=none"], "set logits.norm: final, or lens: logit"),
        (["supervision.lens=model", "supervision.logits.mode=positional"], "set logits.mode: autoregressive"),
        (["supervision.logits={mode: positional, gradient: prompt}"], "set gradient: all, or mode: autoregressive"),
        (["supervision.balance=gradients"], "supervision.balance.mode: 'gradients' is not allowed"),
        (["supervision.tuned={states: 5}"], "supervision.tuned.states: 5"),
    ],
)
def test_lens_and_balance_are_checked(changes, expected):
    assert expected in message(*changes)
