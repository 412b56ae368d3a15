"""Answers of the engine against lm-evaluation-harness's own class and plain computation."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_model

from pivotune.data.templates import load_template
from pivotune.evaluation.cache import Generation, Likelihood, LogProbability
from pivotune.evaluation.engine import Engine, transformers_engine, vllm_engine
from pivotune.evaluation.prompts import Prompter

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

TEXTS = ["the cat sits", "a b c d e f g", "x", "một hai ba bốn năm sáu bảy", "", "the cat sits on the mat"]


def engine(tokenizer, family="llama", *, template=None, batch_size=3, **changes) -> Engine:
    prompter = Prompter(tokenizer, template and load_template(template, tokenizer), 256)
    model = build_tiny_model(family, **changes).eval()
    return transformers_engine(model, prompter, batch_size=batch_size, end_token_ids=[tokenizer.eos_token_id])


def answers(engine: Engine, requests):
    found = {}
    for batch in engine.batches(requests):
        found |= engine.answer(batch)
    return [found[request] for request in requests]


def likelihoods() -> list[Likelihood]:
    return [Likelihood(text, f" {choice}") for text in TEXTS for choice in ("yes", "no", "perhaps not today")]


def harness_scores(tokenizer, model, requests) -> list[tuple[float, bool]]:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=256)
    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=(r.context, r.continuation), idx=0) for r in requests
    ]
    return lm.loglikelihood(instances, disable_tqdm=True)


def test_likelihoods_equal_the_harness_in_every_family(tokenizer, distinct_family):
    ours = engine(tokenizer, distinct_family)
    requests = likelihoods()
    expected = harness_scores(tokenizer, build_tiny_model(distinct_family).eval(), requests)
    for answer, (logprob, _) in zip(answers(ours, requests), expected, strict=True):
        assert isinstance(answer, LogProbability)
        assert answer.logprob == pytest.approx(logprob, rel=1e-5)


def test_no_logits_are_made_for_prompt_tokens(tokenizer):
    """The largest tensor of the head is as long as the continuations, for prompts of any length."""
    ours = engine(tokenizer, batch_size=8)
    sizes = []
    head = ours.lm.model.lm_head
    head.register_forward_hook(lambda module, args, output: sizes.append(output.numel() // output.shape[-1]))
    requests = [Likelihood("word " * 30 + str(index), " yes") for index in range(8)]
    for batch in ours.batches(requests):
        ours.answer(batch)
    tokens = sum(len(ours.prompter.encode_pair(r.context, r.continuation)[1]) for r in requests)
    # One position per row for the model's own forward, and one per continuation token.
    assert max(sizes) <= max(8, tokens)


def test_equal_prompts_are_read_once(tokenizer):
    ours = engine(tokenizer, batch_size=16)
    tokens = []
    ours.lm.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    letters = [Likelihood(f"question {number}", letter) for number in (1, 2) for letter in "ABCD"]
    assert all(len(ours.prompter.encode_pair(r.context, r.continuation)[1]) == 1 for r in letters)
    answers(ours, letters)
    assert tokens == [sum(len(ours.prompter.encode_pair(r.context, r.continuation)[0]) for r in letters[::4])]


@pytest.mark.parametrize("batch_size", [1, 2, 5, "auto"])
def test_batch_size_changes_nothing(tokenizer, batch_size):
    requests = [*likelihoods(), *(Generation(f"say {text}", 8, ("\n",)) for text in TEXTS)]
    one = answers(engine(tokenizer, batch_size=1), requests)
    other = answers(engine(tokenizer, batch_size=batch_size), requests)
    for first, second in zip(one, other, strict=True):
        if isinstance(first, str):
            assert first == second
        else:
            assert first.logprob == pytest.approx(second.logprob, rel=1e-5)
            assert first.tokens == second.tokens


def test_generation_is_greedy_and_ends_at_stop_and_end_tokens(tokenizer):
    ours = engine(tokenizer)
    prompt = "the cat"
    ids = ours.prompter.encode_context(prompt)
    greedy = list(ids)
    with torch.no_grad():
        for _ in range(12):
            greedy.append(int(ours.lm.model(torch.tensor([greedy])).logits[0, -1].argmax()))
    text = tokenizer.decode(greedy[len(ids) :], skip_special_tokens=True)
    assert answers(ours, [Generation(prompt, 12, ())]) == [text]
    stop = text[2:4]
    assert answers(ours, [Generation(prompt, 12, (stop,))]) == [text[: text.index(stop)]]
    third = greedy[len(ids) + 2]
    ended = transformers_engine(ours.lm.model, ours.prompter, batch_size=1, end_token_ids=[third])
    first = greedy[len(ids) :].index(third)
    kept = tokenizer.decode(greedy[len(ids) : len(ids) + first + 1], skip_special_tokens=True)
    assert answers(ended, [Generation(prompt, 12, ())]) == [kept]


def test_a_line_break_before_the_first_word_ends_nothing(tokenizer, monkeypatch):
    """Many base models begin with a line break; the harness would read an empty answer."""
    ours = engine(tokenizer)
    said = tokenizer("\n\n yes\nno more", add_special_tokens=False)["input_ids"]
    model = ours.lm.model
    whole = type(model).forward

    def speaking(self, input_ids=None, **options):
        output = whole(self, input_ids=input_ids, **options)
        step = spoken.pop(0) if spoken else tokenizer.eos_token_id
        output.logits[:, -1] = 0.0
        output.logits[:, -1, step] = 50.0
        return output

    spoken = list(said)
    monkeypatch.setattr(type(model), "forward", speaking)
    assert answers(ours, [Generation("the cat", len(said) + 4, ("\n",))]) == ["yes"]
    # It ended at the line break behind the word, not later.
    assert spoken


def test_generation_settings_of_the_model_are_set_aside(tokenizer):
    plain = answers(engine(tokenizer), [Generation("the cat", 12, ())])
    prompter = Prompter(tokenizer, None, 256)
    model = build_tiny_model().eval()
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=2.0, no_repeat_ngram_size=1)
    other = transformers_engine(model, prompter, batch_size=1, end_token_ids=[tokenizer.eos_token_id])
    assert answers(other, [Generation("the cat", 12, ())]) == plain


def test_a_batch_that_does_not_fit_is_halved(tokenizer, monkeypatch):
    ours = engine(tokenizer, batch_size=8)
    requests = likelihoods()[:8]
    whole = Engine._score
    sizes = []

    def limited(self, batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return whole(self, batch)

    monkeypatch.setattr(Engine, "_score", limited)
    assert len(answers(ours, requests)) == 8
    assert sizes == [8, 4, 2, 2, 4, 2, 2]


def test_batches_do_not_depend_on_the_order_asked(tokenizer):
    ours = engine(tokenizer)
    requests = likelihoods()
    assert list(ours.batches(requests)) == list(ours.batches(requests[::-1]))


def test_a_prompt_longer_than_the_context_is_cut_on_the_left(tokenizer):
    prompter = Prompter(tokenizer, None, 16)
    model = build_tiny_model().eval()
    ours = transformers_engine(model, prompter, batch_size=1, end_token_ids=[2])
    request = Likelihood("a b c d e f g h i j k l m n o p", " x y")
    assert sum(map(len, prompter.encode_pair(request.context, request.continuation))) > 16
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=16)
    instance = Instance(request_type="loglikelihood", doc={}, arguments=(request.context, request.continuation), idx=0)
    expected = lm.loglikelihood([instance], disable_tqdm=True)[0][0]
    assert answers(ours, [request])[0].logprob == pytest.approx(expected, rel=1e-5)


class FakeVLLM:
    """Take the arguments of the harness's vLLM class, and answer with the request."""

    def __init__(self, **made_with):
        self.made_with = made_with

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        return [(-float(len(context)), False) for _, context, _ in requests]

    def generate_until(self, requests, disable_tqdm=False):
        return [json.dumps(request.args[1]) for request in requests]


def test_vllm_is_made_and_asked_through_the_harness(tokenizer, monkeypatch):
    """vLLM itself needs a GPU: here its class in the harness is replaced by one with the same methods."""
    from lm_eval import models
    from lm_eval.api import registry

    monkeypatch.setattr(registry, "get_model", lambda name: {"vllm": FakeVLLM}[name])
    made = vllm_engine("folder", Prompter(tokenizer, None, 99), batch_size="auto", dtype="bfloat16", end_token_ids=[2])
    # Read, not imported: that needs vLLM.
    source = ast.parse((Path(models.__path__[0]) / "vllm_causallms.py").read_text(encoding="utf-8"))
    constructors = [n for n in ast.walk(source) if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    assert set(made.lm.made_with) <= {argument.arg for argument in constructors[0].args.args}
    assert made.lm.made_with["pretrained"] == made.lm.made_with["tokenizer"] == "folder"
    assert (made.lm.made_with["max_length"], made.lm.made_with["dtype"]) == (99, "bfloat16")
    asked = [Likelihood("a b", " c"), Generation("a b", 5, ("\n",))]
    context, continuation = made.prompter.encode_pair("a b", " c")
    assert made.lm.tok_encode(["a b"]) == [context]
    score, text = answers(made, asked)
    assert score == LogProbability(-float(len(context)), len(continuation))
    options = {
        "until": [],
        "max_gen_toks": 5,
        "do_sample": False,
        "stop_token_ids": [2],
        "skip_special_tokens": True,
    }
    assert json.loads(text) == options
