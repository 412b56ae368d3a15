from __future__ import annotations

import copy
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_batches import collate, gradients, make_examples, relative_difference, signal, supervise, values
from tiny_training import run_config, tiny_trainer
from torch import nn

from pivotune.config.supervision import SupervisionConfig
from pivotune.data.collator import ExampleDataset
from pivotune.errors import UsageError
from pivotune.objectives.deep_supervision import deep_supervision_terms
from pivotune.runs.execute import execute_run
from pivotune.runs.prepare import prepare_run
from pivotune.training.starting_model import FEATURES_FILE, FeatureDataset, prepare_features

_TERMS = {"conversion": signal(kind="feature", layer=1), "thinking": signal(kind="feature", layer=3)}


def frozen(**changes: Any) -> SupervisionConfig:
    return supervise(**{**_TERMS, "english": "frozen", **changes})


FROZEN = frozen()
EXAMPLES = make_examples(8)


def prepare(
    model: nn.Module, path: Path, supervision: SupervisionConfig = FROZEN, examples=EXAMPLES, **options: Any
) -> Path:
    prepare_features(model, examples, supervision, path, pad_token_id=0, batch_size=3, **options)
    return path


def batch_of(path: Path, examples=EXAMPLES) -> dict[str, torch.Tensor]:
    dataset = FeatureDataset(ExampleDataset(examples), path)
    return collate([dataset[index] for index in range(len(dataset))])


def content(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """What is in a file: its metadata lie in no certain order."""
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).tolist() for name in sorted(file.keys())}


class Calls:
    """Counts a model's forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *args: Any) -> None:
        self.count += 1


# ---- the same as a model that runs along ----


def test_terms_and_gradients_equal_those_of_the_live_model(distinct_family, tmp_path):
    start, model = build_tiny_model(distinct_family), build_tiny_model(distinct_family, seed=1)
    batch = batch_of(prepare(start, tmp_path / "f.safetensors"))
    kept = deep_supervision_terms(model, batch, FROZEN)
    live = deep_supervision_terms(model, collate(EXAMPLES), FROZEN, reference=start)
    assert values(kept)["conversion"][1] == 6
    for name, (total, count) in values(live).items():
        assert values(kept)[name] == (pytest.approx(total, rel=1e-5), count)
    for name in ("conversion", "thinking"):
        difference = relative_difference(gradients(model, kept[name].sum), gradients(model, live[name].sum))
        assert difference < 1e-5
        kept = deep_supervision_terms(model, batch, FROZEN)
        live = deep_supervision_terms(model, collate(EXAMPLES), FROZEN, reference=start)


@pytest.mark.parametrize(
    "changes",
    [
        {"pooling": "last"},
        {"span": "query+answer"},
        {"english_norm": "raw"},
        {"conversion": signal(kind="logits", layer=1)},
        {"thinking": signal()},
        {"thinking": signal(), "conversion": signal(kind="feature", layer=3)},
    ],
    ids=str,
)
def test_every_setting_equals_the_live_model(tmp_path, changes):
    supervision = frozen(**changes)
    start, model = build_tiny_model(), build_tiny_model(seed=1)
    kept = deep_supervision_terms(model, batch_of(prepare(start, tmp_path / "f", supervision)), supervision)
    live = deep_supervision_terms(model, collate(EXAMPLES), supervision, reference=start)
    assert values(kept) == {name: (pytest.approx(s, rel=1e-5), n) for name, (s, n) in values(live).items()}


def test_without_dropout_and_adapters_and_the_model_as_it_was(tmp_path):
    base = build_tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    plain = batch_of(prepare(copy.deepcopy(base).eval(), tmp_path / "plain"))
    adapted: Any = get_peft_model(
        base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.train()
    kept = batch_of(prepare(adapted, tmp_path / "adapted"))
    torch.testing.assert_close(kept["english_features_thinking"], plain["english_features_thinking"])
    assert all(module.training for module in adapted.modules())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in adapted.named_parameters())
    assert len(adapted.base_model.model.transformer.h) == 4


def test_only_the_blocks_that_are_needed_run(tmp_path):
    model: Any = build_tiny_model()
    calls = [Calls(block) for block in model.model.layers]
    prepare(model, tmp_path / "f", frozen(thinking=signal(), conversion=signal(kind="feature", layer=2)))
    assert [call.count for call in calls] == [2, 2, 0, 0]


def test_autocast_is_that_of_training(tmp_path):
    full = batch_of(prepare(build_tiny_model(), tmp_path / "a"))["english_features_thinking"]
    half = batch_of(prepare(build_tiny_model(), tmp_path / "b", autocast=torch.bfloat16))["english_features_thinking"]
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0, atol=0.2)


# ---- the file ----


def test_file_is_used_again(tmp_path, caplog):
    path = prepare(build_tiny_model(), tmp_path / "new" / FEATURES_FILE)
    assert [file.name for file in path.parent.iterdir()] == [FEATURES_FILE]
    assert {name: np.shape(table) for name, table in content(path)[1].items()} == {
        "conversion": (6, 32),
        "thinking": (6, 32),
    }
    before, model = path.read_bytes(), build_tiny_model()
    calls = Calls(model)
    with caplog.at_level(logging.WARNING, logger="pivotune"):
        prepare(model, path)
    assert (calls.count, caplog.messages, path.read_bytes()) == (0, [], before)


def test_rows_are_read_from_the_mapped_file(tmp_path):
    """Also by a worker process that gets the dataset pickled."""
    path = prepare(build_tiny_model(), tmp_path / "f")
    dataset = FeatureDataset(ExampleDataset(EXAMPLES), path)
    size = len(pickle.dumps(ExampleDataset(EXAMPLES)))
    assert len(pickle.dumps(dataset)) < size + 300
    for one, other in zip(dataset, pickle.loads(pickle.dumps(dataset)), strict=False):
        assert one.english_features.keys() == {"conversion", "thinking"}
        for name, vector in one.english_features.items():
            assert np.array_equal(vector, other.english_features[name])
            assert vector.any() == (one.parallel is not None)


def changed_weights(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[7, 0] += 1e-3


def changed_config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-3


@pytest.mark.parametrize(
    ("word", "model_change", "changes", "options"),
    [
        ("weights", changed_weights, {}, {}),
        ("weights", changed_config, {}, {}),
        ("rows", None, {}, {"examples": EXAMPLES[:7]}),
        ("rows", None, {}, {"examples": make_examples(8, seed=1)}),
        ("settings", None, {"conversion": signal(kind="feature", layer=2)}, {}),
        ("settings", None, {"pooling": "last"}, {}),
        ("settings", None, {"span": "query+answer"}, {}),
        ("settings", None, {"english_norm": "raw"}, {}),
        ("settings", None, {"thinking": signal()}, {}),
        ("settings", None, {}, {"autocast": torch.bfloat16}),
    ],
)
def test_anything_else_is_computed_again(tmp_path, caplog, word, model_change, changes, options):
    """One line says why, and the new file is that of a first run."""
    path = prepare(build_tiny_model(), tmp_path / "f")

    def run(path: Path) -> None:
        model = build_tiny_model()
        if model_change:
            model_change(model)
        prepare(model, path, frozen(**changes), **options)

    with caplog.at_level(logging.WARNING, logger="pivotune"):
        run(path)
    assert caplog.messages == [f"{path}: computed again (other {word})"]
    run(tmp_path / "first")
    assert content(path) == content(tmp_path / "first")


def test_layer_of_thinking_on_the_target_side_does_not_matter(tmp_path):
    """Its English side is the top: a sweep over layers computes it once."""
    path = prepare(build_tiny_model(), tmp_path / "f")
    model = build_tiny_model()
    calls = Calls(model)
    prepare(model, path, frozen(thinking=signal(kind="feature", layer=2)))
    assert calls.count == 0


def cut(data: bytes) -> bytes:
    return data[:-10]


def one_bit(data: bytes) -> bytes:
    return data[:-10] + bytes([data[-10] ^ 1]) + data[-9:]


@pytest.mark.parametrize("damage", [cut, one_bit, lambda data: b"", lambda data: b"no such thing" * 99])
def test_damaged_file_is_never_used(tmp_path, caplog, damage):
    path = prepare(build_tiny_model(), tmp_path / "f")
    whole = content(path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="pivotune"):
        prepare(build_tiny_model(), path)
    (message,) = caplog.messages
    assert message.startswith(f"{path}: computed again (")
    assert "\n" not in message
    assert content(path) == whole


def test_killed_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        prepare(build_tiny_model(), tmp_path / "run" / "f")
    assert list((tmp_path / "run").iterdir()) == []


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError) as raised:
        prepare(build_tiny_model(), tmp_path / "file" / "f")
    assert str(raised.value).startswith(f"{tmp_path / 'file' / 'f'}: cannot be written (")
    assert "\n" not in str(raised.value)


def test_sharded_weights_are_refused(tmp_path):
    model = build_tiny_model()
    # DeepSpeed's own mark on what it has partitioned.
    model.lm_head.weight.ds_id = 7
    with pytest.raises(UsageError, match=r"feature.english: frozen needs the whole starting model.*ZeRO-3"):
        prepare(model, tmp_path / "f")


# ---- in training ----

OPTIONS: dict[str, Any] = {
    "conversion_signal": "feature",
    "thinking_signal": "feature",
    "feature_english": "frozen",
    "english_ratio": 0.25,
}


def test_training_runs_no_english_pass_and_holds_no_second_model(tmp_path):
    """A forward for every step and none besides, as in plain fine-tuning."""
    trainer = tiny_trainer(tmp_path, **OPTIONS)
    assert (tmp_path / FEATURES_FILE).is_file()
    trainer.balance.layers = {}  # measures gradients at the first step
    calls = Calls(trainer.model)
    trainer.train()
    assert calls.count == trainer.state.global_step == 4
    assert not [name for name, value in vars(trainer).items() if isinstance(value, nn.Module) and value is not trainer.model
                and name != "model_wrapped"]  # fmt: skip


def test_second_trainer_computes_nothing(tmp_path):
    tiny_trainer(tmp_path, **OPTIONS)
    model = build_tiny_model()
    calls = Calls(model)
    tiny_trainer(tmp_path, model=model, **OPTIONS)
    assert calls.count == 0


@pytest.mark.parametrize("changes", [{"feature_english": "detached"}, {"method": "tft"},
                                     {"conversion_signal": "logits", "thinking_signal": "none"}])  # fmt: skip
def test_no_file_where_nothing_is_frozen(tmp_path, changes):
    tiny_trainer(tmp_path, **{**OPTIONS, **changes})
    assert not (tmp_path / FEATURES_FILE).exists()


def test_progress_is_shown(tmp_path):
    titles: list[tuple[str, int]] = []
    done: list[int] = []

    class Shown:
        def __init__(self, title: str, total: int) -> None:
            titles.append((title, total))

        def __enter__(self):
            return done.append

        def __exit__(self, *error: object) -> None: ...

    tiny_trainer(tmp_path, trainer={"progress": Shown}, **OPTIONS)
    assert titles == [("Reading the English side", 12)]
    assert done[-1] == 12
    assert done == sorted(done)


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_bar_of_transformers_is_the_default(tmp_path, capsys, disable_tqdm):
    tiny_trainer(tmp_path, disable_tqdm=disable_tqdm, **OPTIONS)
    assert ("Reading the English side: 100%" in capsys.readouterr().err) is not disable_tqdm


def test_run_uses_its_file_again_when_resumed_and_a_new_run_removes_it(tmp_path):
    signal = {"signal": "feature", "layer": 1}
    config = run_config(
        tmp_path,
        supervision={"conversion": signal, "thinking": {**signal, "layer": 3}, "feature": {"english": "frozen"}},
    )
    result = execute_run(prepare_run(config))
    file = result.folder / FEATURES_FILE
    written = file.stat().st_mtime_ns
    execute_run(prepare_run(config, resume=True), resume=True)
    assert file.stat().st_mtime_ns == written
    prepare_run(config, overwrite=True)
    assert not file.exists()
