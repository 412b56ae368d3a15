"""DDP, FSDP2 and ZeRO on two processes take the steps of one: terms, gradient norms, weights, held-out scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, build
from process_pool import run_ranks
from safetensors.torch import load_file
from tiny_training import make_pairs, step_logs, weights

pytestmark = pytest.mark.slow

# One of each kind; the other cases are exhaustive.
_QUICK = ["tft", "logits-shared", "logits-separate", "prompt", "lens-tuned", "feature-joint-answer", "feature-frozen",
          "contrastive", "cka-joint",
          "one-row-each", "phase", "keep-english", "accumulated", "checkpointed", "lora", "gemma2"]  # fmt: skip
_REST = [name for name in CASES if name not in _QUICK]
# Plain data parallelism and sharding; own activation checkpointing of FSDP; mixed precision, whose rounding differs.
ENGINES: dict[str, tuple[list[str], float]] = {
    "ddp": (_QUICK, 1e-5),
    "ddp-rest": (_REST, 1e-5),
    "fsdp2": (_QUICK, 1e-5),
    "fsdp2-rest": (_REST, 1e-5),
    "fsdp2-checkpointing": (["logits-shared", "logits-separate", "feature-joint-answer"], 1e-5),
    "fsdp2-bf16": (["logits-shared", "feature-detached", "accumulated"], 2e-2),
    # DeepSpeed is no dependency; these are skipped where it is not installed.
    "zero2": (list(CASES), 1e-5),
    "zero3": ([name for name in CASES if name != "lora-head"], 1e-5),
}
_ALL = [
    pytest.param(engine, name, marks=[pytest.mark.exhaustive] if engine.endswith("rest") else [], id=f"{engine}-{name}")
    for engine, (names, _) in ENGINES.items()
    for name in names
]
# What depends on how many rows of a batch one process has, or on the clock.
_OTHER = ("padding_share",)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Path]:
    """Folder of the results of two processes, by engine; each engine runs once, all its cases in one go."""
    return {}


def outcome(results: dict[str, Path], engine: str, tmp_path_factory: Any) -> Path:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the package deepspeed is not installed")
    if engine not in results:
        results[engine] = tmp_path_factory.mktemp(engine)
        env = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"} if engine.startswith("zero") else {}
        arguments = [engine, str(results[engine]), ENGINES[engine][0]]
        run_ranks(results[engine], environment=env, program="worker:run_cases", arguments=arguments)
    return results[engine]


@pytest.fixture(scope="module")
def in_one_process(tmp_path_factory) -> Callable[..., tuple[Any, dict[str, torch.Tensor], dict[str, float]]]:
    """Return a case's trainer after training, its first weights and its held-out scores; each is trained once."""

    @cache
    def train(name: str, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, float]]:
        single = build(name, tmp_path_factory.mktemp("single"), 1, **changes)
        start = weights(single.model)
        single.train()
        return single, start, single.evaluate(make_pairs(7, seed=1))

    return train


@pytest.mark.parametrize(("engine", "name"), _ALL)
def test_two_processes_take_the_steps_of_one(engine, name, results, in_one_process, tmp_path_factory):
    folder, tolerance = outcome(results, engine, tmp_path_factory), ENGINES[engine][1]
    single, start, held_out = in_one_process(name, **({"bf16": True} if engine.endswith("bf16") else {}))
    found = json.loads((folder / f"{name}.json").read_text())

    assert single.state.global_step > 1
    for line, expected in zip(found["logs"], step_logs(single), strict=True):
        for key in _OTHER:
            line.pop(key, None), expected.pop(key, None)
        assert line == pytest.approx(expected, rel=tolerance, abs=tolerance)
    for key in ("target_nll", "english_nll", "target_nll_per_character"):
        assert found["held_out"][f"eval_{key}"] == pytest.approx(held_out[f"eval_{key}"], rel=tolerance)

    ours, expected = load_file(folder / f"{name}.safetensors"), single.model.state_dict()
    moved = 0.0
    for key, tensor in expected.items():
        torch.testing.assert_close(ours.pop(key), tensor, rtol=0, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")
        moved = max(moved, (tensor - start[key]).abs().max().item())
    assert not ours
    assert moved > 1e-3
