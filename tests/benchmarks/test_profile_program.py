"""`python -m benchmarks.profile` on the tiny shape."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import profile
from benchmarks.shapes import build_model
from pivotune.errors import UsageError


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *options):
    out = tmp_path / "profile.json"
    settings = ["--shape", "tiny", "--device", "cpu", "--threads", "1", "--rounds", "1", "--out", str(out)]
    profile.main([*settings, *options])
    return json.loads(out.read_text())


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "find_spec", lambda name: None)
    content = run(tmp_path, "--tokens", "24", "--sequences", "3", "--layers", "2")
    assert content["benchmark"] == "profile"
    assert (content["settings"]["tokens"], content["settings"]["layers"]) == (24, 2)
    time, memory, difference = content["rows"]
    assert set(time["seconds"]) == set(memory["memory"]) == {"pivotune", "stacked logits"}
    assert (difference["goal"], difference["reached"]) == ("<= 1e-05", True)


def test_contenders_measure_the_same_thing():
    model = build_model("tiny")
    input_ids = torch.randint(512, (3, 8))
    ours, stacked = profile.ours(model, input_ids), profile.stacked(model, input_ids)
    assert ours.shape == (5,)
    torch.testing.assert_close(ours, stacked, rtol=1e-5, atol=0)
    shuffled = profile.ours(model, input_ids.flip(0))
    torch.testing.assert_close(ours, shuffled, rtol=1e-5, atol=0)
    assert not torch.allclose(ours, profile.ours(model, input_ids + 1), rtol=1e-7, atol=0)


def test_transformer_lens_measures_the_same_thing():
    pytest.importorskip("transformer_lens", reason="the package transformer-lens is not installed")
    model = build_model("tiny")
    input_ids = torch.randint(512, (3, 8))
    contenders = profile._peer_contenders(build_model("tiny"), model, input_ids)
    assert len(contenders) == 3
    for contender in contenders.values():
        torch.testing.assert_close(contender(), profile.ours(model, input_ids), rtol=1e-5, atol=0)


def test_tokens_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--tokens: 25 found; allowed: a multiple of --sequences 3"):
        run(tmp_path, "--tokens", "25", "--sequences", "3")
