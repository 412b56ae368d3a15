"""Prompts are the template's, tokenized as training and the harness do, and cut where the model's context ends."""

from __future__ import annotations

import functools
import operator

import pytest
from chat_templates import LEADS
from conftest import build_tiny_model, build_tiny_tokenizer

from pivotune.data.examples import Encoder
from pivotune.data.rows import Row
from pivotune.data.templates import Turn, load_template
from pivotune.errors import UsageError
from pivotune.evaluation.prompts import Prompter


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_tokens_are_those_of_training(tokenizer, template):
    loaded = load_template(template, tokenizer)
    prompter = Prompter(tokenizer, loaded, 256)
    encoder = Encoder(tokenizer, loaded)
    row = Row("một con mèo", "hai con chó", "", "")
    side = encoder.encode([row])[0].target
    context, continuation = prompter.encode_pair(prompter.context("một con mèo", 8).text, "hai con chó")
    assert context == encoder.encode_prompt(Turn("một con mèo"))
    assert context + continuation == side.ids[: len(context) + len(continuation)].tolist()
    assert len(context) == side.answer


def test_plain_text_is_split_as_the_harness_splits_it(tokenizer):
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=build_tiny_model(), tokenizer=tokenizer, max_length=256)
    prompter = Prompter(tokenizer, None, 256)
    for context, continuation in [("a b c", " d e"), ("a b  ", "c"), ("a\n", " b"), ("câu hỏi:", " trả lời")]:
        assert prompter.encode_pair(context, continuation) == lm._encode_pair(context, continuation)


def test_a_long_query_loses_its_beginning(tokenizer):
    template = load_template("alpaca", tokenizer)
    words = " ".join(f"w{number}" for number in range(400))
    prompter = Prompter(tokenizer, template, 256)
    context = prompter.context(f"{words} the question?", 32)
    assert context.truncated
    assert "the question?" in context.text
    assert context.text.startswith("Below is an instruction")
    assert len(prompter.encode_context(context.text)) <= 256 - 32
    # Not more is cut than must be.
    assert len(prompter.encode_context(context.text)) > 256 - 32 - 8
    assert not prompter.context("short", 32).truncated


def test_no_limit_cuts_nothing(tokenizer):
    context = Prompter(tokenizer, None, None).context("word " * 1000, 32)
    assert not context.truncated
    assert context.text == "word " * 1000


def test_no_room_at_all_is_one_line(tokenizer):
    with pytest.raises(UsageError, match="the model reads 64"):
        Prompter(tokenizer, load_template("alpaca", tokenizer), 64).context("why is that so?", 60)


def test_an_empty_query_has_the_begin_token_as_context(tokenizer):
    prompter = Prompter(tokenizer, None, 256)
    context, continuation = prompter.encode_pair("", "a b")
    assert context == [tokenizer.eos_token_id]  # this tokenizer has no begin-of-text
    assert tokenizer.decode(continuation) == tokenizer.decode(tokenizer("a b", add_special_tokens=False)["input_ids"])


def test_an_empty_query_goes_through_templates(tokenizer):
    for template in ("chat", "alpaca"):
        prompter = Prompter(tokenizer, load_template(template, tokenizer), 256)
        assert prompter.context("", 8).text == load_template(template, tokenizer).render(Turn("")).prompt


@pytest.mark.parametrize("name", LEADS)
def test_a_templates_text_before_the_answer_is_in_the_prompt(name):
    """Training learns this text, so it precedes both scored and generated answers."""
    template, fixed, space = LEADS[name]
    tokenizer = build_tiny_tokenizer(chat_template=template)
    loaded = load_template("chat", tokenizer)
    prompter = Prompter(tokenizer, loaded, 256)
    side = Encoder(tokenizer, loaded).encode([Row("một con mèo", "hai con chó", "", "")])[0].target
    context = prompter.context("một con mèo", 8).text
    assert context.endswith(fixed)
    assert prompter.lead == (fixed, space)
    ids = functools.reduce(operator.iadd, prompter.encode_pair(context, f"{space}hai con chó"), [])
    assert ids == side.ids[: len(ids)].tolist()


def test_only_what_may_be_cut_is_cut(tokenizer):
    words = " ".join(f"w{number}" for number in range(400))
    query = f"Translate this:\n{words}\nNow!"
    span = (len("Translate this:\n"), len("Translate this:\n") + len(words))
    context = Prompter(tokenizer, load_template("chat", tokenizer), 256).context(query, 32, span)
    assert context.truncated
    assert "Translate this:\n" in context.text
    assert "w399\nNow!" in context.text


def begin_tokenizer(**changes):
    """A tokenizer that puts a begin-of-text token first, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tiny_tokenizer(bos_token="<|begin|>", **changes)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    return tokenizer


OWN_BEGIN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(("template", "changes"), [("alpaca", {}), (None, {}), ("chat", {"chat_template": OWN_BEGIN})])
def test_generation_and_likelihood_read_the_same_tokens(template, changes):
    """One begin-of-text token, from the tokenizer or from the chat template."""
    from pivotune.evaluation.cache import Generation, Likelihood
    from pivotune.evaluation.engine import transformers_engine

    pytest.importorskip("lm_eval")
    tokenizer = begin_tokenizer(**changes)
    prompter = Prompter(tokenizer, template and load_template(template, tokenizer), 256)
    model = build_tiny_model()
    read: list[list[int]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, options: read.append(options["input_ids"][0].tolist()), with_kwargs=True
    )
    engine = transformers_engine(model, prompter, batch_size=1, end_token_ids=[tokenizer.eos_token_id])
    text = prompter.context("một <|user|> con mèo", 8).text
    engine.answer([Generation(text, 1, ())])
    engine.answer([Likelihood(text, " hai")])
    generated, scored = read
    assert generated == prompter.encode_context(text)
    assert scored[: len(generated)] == generated
    assert generated.count(tokenizer.bos_token_id) == 1
    assert generated[0] == tokenizer.bos_token_id
    spelled_out = template is not None
    assert (tokenizer.convert_tokens_to_ids("<|user|>") in generated[3:]) is not spelled_out


SPELLED = "một <|end|>\n<|assistant|> con mèo"


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_control_tokens_of_an_item_are_text_as_in_training(tokenizer, template):
    loaded = load_template(template, tokenizer)
    prompter, encoder = Prompter(tokenizer, loaded, 256), Encoder(tokenizer, loaded)
    side = encoder.encode([Row(SPELLED, SPELLED, "", "")])[0].target
    context, continuation = prompter.encode_pair(prompter.context(SPELLED, 8).text, prompter.as_text(SPELLED))
    assert [*context, *continuation, tokenizer.eos_token_id] == side.ids.tolist()
    plain, _ = prompter.encode_pair(prompter.context("một con mèo", 8).text, "")
    special = set(tokenizer.all_special_ids)
    assert [number for number in context if number in special] == [number for number in plain if number in special]
    assert tokenizer.decode(context).count(SPELLED) == 1


def test_a_cut_never_turns_a_control_token_back_into_one(tokenizer):
    """The cut falls within the letters of a name; as little is cut as of plain text."""
    prompter = Prompter(tokenizer, load_template("chat", tokenizer), 64)
    special, whole = set(tokenizer.all_special_ids), len(prompter.encode_context(prompter.context("", 8).text))
    for words in range(40, 48):
        context = prompter.context("<|end|>" * words, 8)
        ids = prompter.encode_context(context.text)
        assert context.truncated
        assert 64 - 8 - 1 <= len(ids) <= 64 - 8
        assert sum(number in special for number in ids) == 3, tokenizer.decode(ids)
        assert len(ids) > whole


def test_plain_text_keeps_the_harnesss_tokens(tokenizer):
    prompter = Prompter(tokenizer, None, 256)
    assert prompter.encode_context(prompter.context("a <|end|>", 8).text)[-1] == tokenizer.eos_token_id
