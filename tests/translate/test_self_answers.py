"""The model's own answers: their text, rows left out, forms, and resuming after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import write_jsonl
from conftest import build_tiny_model, build_tiny_tokenizer, tiny_rows

from pivotune.data.examples import Encoder
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template
from pivotune.errors import UsageError
from pivotune.training.heldout import end_token_ids
from pivotune.translate.run import load_english
from pivotune.translate.self_answers import Answerer, is_answer_to, write_answered
from pivotune.translate.steps import StepFile

TOKENS = 12
ENGLISH = [{"id": row["id"], "instruction": row["prompt_en"], "output": row["completion_en"]} for row in tiny_rows(12)]


def answerer(*, template: str = "chat", context: int | None = 256, tokens: int = TOKENS) -> Answerer:
    model, tokenizer = build_tiny_model(), build_tiny_tokenizer()
    # Random models end hardly any answer: these ids are frequent in theirs.
    model.generation_config.eos_token_id = [2, *range(40, 100)]
    return Answerer(model, Encoder(tokenizer, load_template(template, tokenizer)), context, tokens, batch_size=3)


def load(folder: Path, rows: list[dict], limit: int | None = None):
    return load_english(str(write_jsonl(folder / "rows.jsonl", rows)), limit, "data self-answers")


def answer(steps: StepFile, rows, make) -> int:
    done = steps.count_done(rows, is_answer_to)
    steps.begin(overwrite=False)
    steps.append(rows, done, make, 4, lambda done: None)
    return done


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(make: Answerer, prompt: str) -> tuple[str, bool]:
    """The answer to one prompt, and whether it ended."""
    tokenizer, model = make.encoder.tokenizer, make.model
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    ends = end_token_ids(model, tokenizer)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False,
                            eos_token_id=ends, pad_token_id=0)[0, ids.shape[1] :].tolist()  # fmt: skip
    ended = output[-1] in ends
    return tokenizer.decode(output[:-1] if ended else output, skip_special_tokens=True).strip(), ended


def test_answers_are_those_of_each_prompt_alone_and_cut_ones_are_left_out(tmp_path):
    make, steps = answerer(), StepFile(tmp_path / "self.jsonl", "answered", {"model": "m"})
    rows = load(tmp_path, ENGLISH)
    answer(steps, rows, make)
    expected = [alone(make, row["instruction"]) for row in ENGLISH]
    assert [record["answer"] for record in records(steps.path)] == [text for text, _ in expected]
    reasons = [None if ended and text else "empty_answer" if ended else "cut_answer" for text, ended in expected]
    assert [record.get("left_out") for record in records(steps.path)] == reasons
    assert {None, "cut_answer"} <= set(reasons)
    written, left_out = write_answered(steps, rows, has_target=False)
    assert records(steps.out) == [
        {"id": row["id"], "prompt": row["instruction"], "completion": text}
        for row, (text, _), reason in zip(ENGLISH, expected, reasons, strict=True)
        if reason is None
    ]
    assert (written, left_out["cut_answer"]) == (reasons.count(None), reasons.count("cut_answer"))
    report = json.loads((tmp_path / "self.report.json").read_text())
    assert [(entry["number"], entry["reasons"]) for entry in report["left_out"]] == [
        (place, [reason]) for place, reason in enumerate(reasons, start=1) if reason
    ]
    assert len(load_rows(steps.out, need_english=False)) == written


def said(text: str):
    """A model that answers with its prompt."""
    return lambda rows: [
        {"id": row.id, "messages": [*row.history_en, {"role": "user", "content": row.sides[1].user_text}],
         "answer": f"{text} {row.prompt_en}"} for row in rows
    ]  # fmt: skip


def test_everything_but_the_english_answer_is_kept(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"id": 7, "instruction": "Sema", "input": "a", "output": "Ndiyo", "instruction_en": "Say", "input_en": "b",
         "output_en": "Yes", "category": "x"},
        {"messages": [*chat, {"role": "assistant", "content": "Habari"}],
         "messages_en": [*chat, {"role": "assistant", "content": "Hello"}]},
        {"prompt_en": "Which?", "completion_en": "That."},
        {"prompt_en": "Which?", "completion_en": ""},
    ]  # fmt: skip
    steps, loaded = StepFile(tmp_path / "self.jsonl", "answered", {}), load(tmp_path, rows)
    assert loaded.skipped == {"`completion_en` is empty": 1}
    answer(steps, loaded, said("I say"))
    assert write_answered(steps, loaded, has_target=True)[0] == 3
    alpaca, conversation, english = records(steps.out)
    assert alpaca == {key: str(value) for key, value in rows[0].items() if key != "category"} | {
        "output_en": "I say Say"
    }
    assert conversation["messages"] == rows[1]["messages"]
    assert conversation["messages_en"] == [*chat, {"role": "assistant", "content": "I say Hi"}]
    assert english == {"prompt": "", "completion": "", "prompt_en": "Which?", "completion_en": "I say Which?"}
    # Without a target side English goes under plain keys.
    write_answered(steps, loaded, has_target=False)
    assert records(steps.out)[0] == {"id": "7", "instruction": "Say", "input": "b", "output": "I say Say"}
    assert load_english(str(steps.out), None, "data translate")[1].completion_en == "I say Hi"


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_kill_loses_and_doubles_nothing(tmp_path, cut):
    rows, steps = load(tmp_path, ENGLISH), StepFile(tmp_path / "self.jsonl", "answered", {"model": "m"})
    whole = StepFile(tmp_path / "whole.jsonl", "answered", {"model": "m"})
    answer(whole, rows, said("I say"))

    def killed(step):
        if step[0].number > 8:
            raise KeyboardInterrupt
        return said("I say")(step)

    with pytest.raises(KeyboardInterrupt):
        answer(steps, rows, killed)
    content = steps.path.read_bytes()
    steps.path.write_bytes(content[: len(content) - cut])
    assert answer(steps, rows, said("I say")) == 8 - (cut > 0)
    assert steps.path.read_bytes() == whole.path.read_bytes()
    assert answer(steps, rows, None) == 12  # nothing is left to do


def test_an_empty_result_is_refused_and_the_answers_stay(tmp_path):
    rows, steps = load(tmp_path, ENGLISH[:3]), StepFile(tmp_path / "self.jsonl", "answered", {})
    reasons = iter(("cut_answer", "cut_answer", "empty_answer"))
    answer(steps, rows, lambda step: [{**record, "left_out": next(reasons)} for record in said("I")(step)])
    with pytest.raises(UsageError) as caught:
        write_answered(steps, rows, has_target=False)
    assert str(caught.value) == (
        f"{rows.source}: no row was kept (2 left out: the answer does not end within the token limit; 1 left out: the "
        f"answer is empty); all answers are in {steps.path}"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "self.answered.json", "self.answered.jsonl"}
    assert answer(steps, rows, None) == 3


def test_other_questions_are_refused(tmp_path):
    rows, steps = load(tmp_path, ENGLISH), StepFile(tmp_path / "self.jsonl", "answered", {})
    answer(steps, rows, said("I say"))
    other = [{**row, "output": "another answer"} for row in ENGLISH]
    assert steps.count_done(load(tmp_path, other), is_answer_to) == 12
    other[4]["instruction"] += "?"
    with pytest.raises(UsageError, match=r"self\.answered\.jsonl, line 5 was not made from row 5 of the data"):
        steps.count_done(load(tmp_path, other), is_answer_to)


def test_prompts_without_room_and_turns_that_the_template_refuses_are_left_out(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = load(
        tmp_path,
        [
            {"prompt": "word " * 200, "completion": "x"},
            {"messages": [*turns, {"role": "assistant", "content": "d"}]},
            {"prompt": "Say it.", "completion": "x"},
        ],
    )
    make = answerer(template="alpaca", context=300, tokens=4)
    long, refused, whole = make(list(rows))
    assert (long["left_out"], refused["left_out"]) == ("long_prompt", "refused_prompt")
    assert "answer" in whole
    assert not {"answer"} & (long.keys() | refused.keys())
    # The context is used to its last token.
    length = len(make.encoder.encode_prompt(rows[2].sides[1]))
    for room, reason in ((4, None), (3, "long_prompt")):
        make.context = length + room
        assert make([rows[2]])[0].get("left_out") in ([reason] if reason else (None, "cut_answer", "empty_answer"))
