from __future__ import annotations

from pathlib import Path

import pytest
from conftest import build_tiny_tokenizer

from pivotune.data.examples import Encoder
from pivotune.data.templates import Rendered, Turn, load_template
from pivotune.errors import UsageError

# Trims what the user says and what the model answers; ends turns with a special token that is not end-of-text.
TRIMMING = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] | trim + '<|system|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Ends the answer with nothing at all.
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Llama-2's: refuses a system turn, and a dialogue whose roles do not take turns.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def whole(rendered: Rendered) -> str:
    return rendered.prefix + rendered.query + rendered.suffix + rendered.completion


def chat_text(tokenizer, turn: Turn) -> str:
    """What the tokenizer itself writes for the whole dialogue."""
    messages = [
        *turn.history,
        {"role": "user", "content": turn.user_text},
        {"role": "assistant", "content": turn.completion},
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def write(folder: Path, text: str) -> str:
    path = folder / "template.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


def message_of(raised: pytest.ExceptionInfo) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- chat ----------------------------------------------------------------------------------------------------------


def test_chat_is_the_tokenizers_own_text_split_around_query_and_answer(tokenizer):
    rendered = load_template("chat", tokenizer).render(Turn("Namba ni ipi?", "Ni moja."))
    assert rendered == Rendered(
        prefix="<|user|>\n", query="Namba ni ipi?", suffix="<|end|>\n<|assistant|>\n", completion="Ni moja.<|end|>"
    )
    assert rendered.prompt == "<|user|>\nNamba ni ipi?<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("template", [None, TRIMMING, ENDLESS, STRICT])
@pytest.mark.parametrize(
    "text", ["a", "user", "assistant", "<|user|>\n", "[INST]", "[assistant]", "  two  spaces ", "a\n\nassistant: \n"]
)
def test_chat_text_is_what_the_tokenizer_writes_whatever_the_user_says(template, text):
    tokenizer = build_tiny_tokenizer(**({"chat_template": template} if template else {}))
    turn = Turn(text, f"{text}!")
    rendered = load_template("chat", tokenizer).render(turn)
    expected = chat_text(tokenizer, turn)
    assert expected.rstrip().removesuffix("<|end|>") == whole(rendered).removesuffix("<|end|>").rstrip()
    assert rendered.query == (text.strip() if template == TRIMMING else text)


@pytest.mark.parametrize("text", ["a", "user", "assistant", "LONG", "a much longer text"])
def test_chat_template_that_changes_with_the_text(text):
    """The query is found again where the words around it are not the usual ones."""
    head = "{% if messages[0]['content'] | length < 7 %}SHORT user{% endif %}[user]"
    template = head + "{{ messages[0]['content'] }}[assistant]{{ messages[1]['content'] if messages | length > 1 }}"
    tokenizer = build_tiny_tokenizer(chat_template=template)
    rendered = load_template("chat", tokenizer).render(Turn(text, "b"))
    prefix = "SHORT user[user]" if len(text) < 7 else "[user]"
    assert rendered == Rendered(prefix, text, "[assistant]", "b<|end|>")


def test_turns_that_end_with_another_special_token_get_no_end_of_text():
    """Also one that is special only as an added token, as Gemma 3's end of turn is."""
    for extra in (["<|system|>"], None):
        tokenizer = build_tiny_tokenizer(chat_template=TRIMMING, additional_special_tokens=extra)
        rendered = load_template("chat", tokenizer).render(Turn("q", " It is. "))
        assert rendered.completion == "It is.<|system|>"
        assert rendered.prefix == "<|begin|>[user]"


def test_template_without_end_token_gets_end_of_text():
    tokenizer = build_tiny_tokenizer(chat_template=ENDLESS)
    rendered = load_template("chat", tokenizer).render(Turn("q", "It is."))
    assert rendered == Rendered("user: ", "q", "\nassistant: ", "It is.\n<|end|>")


def test_alpaca_fields_are_one_chat_message(tokenizer):
    rendered = load_template("chat", tokenizer).render(Turn("Add.", "3", input="1 and 2"))
    assert rendered.query == "Add.\n\n1 and 2"


def test_history_and_system_turns_belong_to_the_prefix(tokenizer):
    history = (
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    template = load_template("chat", tokenizer)
    assert template.render(Turn("a", "b")).prefix == "<|user|>\n"
    for _ in range(2):  # what was remembered of the other rows must not matter
        rendered = template.render(Turn("a", "b", history=history))
        assert (
            rendered.prefix == "<|system|>\nBe short.<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\n"
        )
        assert (rendered.query, rendered.completion) == ("a", "b<|end|>")
        # Begins as a row without earlier turns does.
        rendered = template.render(Turn("a", "b", history=history[1:]))
        assert rendered.prefix == "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\n"
        assert rendered.query == "a"
        assert template.render(Turn("a", "b")).prefix == "<|user|>\n"


def test_prompt_alone_has_no_completion(tokenizer, tmp_path):
    path = write(tmp_path, "{{ prompt }}={{ completion }}")
    for name in ("chat", "alpaca", path):
        rendered = load_template(name, tokenizer).render(Turn("q"))
        assert rendered.completion == ""
        assert rendered.prompt == load_template(name, tokenizer).render(Turn("q", "answer")).prompt


def test_chat_template_that_refuses_a_role():
    template = load_template("chat", build_tiny_tokenizer(chat_template=STRICT))
    with pytest.raises(UsageError) as raised:
        template.render(Turn("q", "a", history=({"role": "system", "content": "s"},)))
    assert message_of(raised) == (
        "the chat template refuses the roles system, user: System role not supported; data.fold_system: true puts the "
        "system text before the user's"
    )


def test_a_folded_system_message_begins_the_first_user_text():
    encoder = Encoder(
        tokenizer := build_tiny_tokenizer(chat_template=STRICT), load_template(None, tokenizer), fold_system=True
    )
    system, user, assistant = (
        {"role": role, "content": text}
        for role, text in (("system", "Be brief."), ("user", "Hi."), ("assistant", "Yes?"))
    )
    assert encoder.render(Turn("Why?", "So.", history=[system])).prompt == "[INST] Be brief.\n\nWhy? [/INST]"
    later = encoder.render(Turn("Why?", "So.", history=[system, user, assistant]))
    assert later.prompt == "[INST] Be brief.\n\nHi. [/INST] Yes?<|end|>[INST] Why? [/INST]"
    assert later.query == "Why?"
    assert encoder.render(Turn("Why?")).prompt == "[INST] Why? [/INST]"


def test_chat_template_whose_generation_prompt_does_not_precede_the_answer():
    text = "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}think:{% endif %}"
    template = load_template("chat", build_tiny_tokenizer(chat_template=text))
    with pytest.raises(UsageError, match="does not put the answer right after its generation prompt; use alpaca"):
        template.render(Turn("q", "a"))


def test_chat_template_without_the_users_text():
    template = load_template("chat", build_tiny_tokenizer(chat_template="hello"))
    with pytest.raises(UsageError, match=r"^data\.template: chat: the template does not contain the user's text$"):
        template.render(Turn("q", "a"))


def test_chat_needs_a_chat_template_and_the_default_goes_without():
    tokenizer = build_tiny_tokenizer(chat_template=None)
    with pytest.raises(UsageError) as raised:
        load_template("chat", tokenizer)
    expected = "data.template: chat needs a tokenizer with a chat template; use alpaca or a Jinja file"
    assert message_of(raised) == expected
    assert load_template(None, tokenizer).name == "alpaca"
    assert load_template(None, build_tiny_tokenizer()).name == "chat"


@pytest.mark.parametrize("name", [None, "chat", "alpaca", "template.jinja"])
def test_tokenizer_without_end_of_text(name):
    with pytest.raises(UsageError) as raised:
        load_template(name, build_tiny_tokenizer(eos_token=None))
    assert message_of(raised).startswith("the tokenizer has no end-of-text token")
    assert "set tokenizer.eos_token" in str(raised.value)


def test_named_chat_templates_without_a_default():
    tokenizer = build_tiny_tokenizer(chat_template={"tool_use": ENDLESS, "rag": ENDLESS})
    with pytest.raises(UsageError) as raised:
        load_template(None, tokenizer)
    assert message_of(raised) == (
        "data.template: chat: the tokenizer's chat templates are tool_use, rag, and none is called default; "
        "use a Jinja file"
    )


# --- alpaca --------------------------------------------------------------------------------------------------------


def test_alpaca_without_input_is_stanfords_text(tokenizer):
    rendered = load_template("alpaca", tokenizer).render(Turn("Name three primary colors.", "Red, blue, yellow."))
    assert whole(rendered) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName three primary colors.\n\n### Response:Red, blue, yellow.<|end|>"
    )
    assert rendered.query == "Name three primary colors."
    assert rendered.completion == "Red, blue, yellow.<|end|>"


def test_alpaca_with_input_is_stanfords_text(tokenizer):
    rendered = load_template("alpaca", tokenizer).render(Turn("Classify.", "Blue", input="sky"))
    assert whole(rendered) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nClassify.\n\n### Input:\nsky\n\n### Response:Blue<|end|>"
    )
    assert rendered.query == "Classify.\n\n### Input:\nsky"


def test_alpaca_refuses_earlier_turns(tokenizer):
    with pytest.raises(UsageError) as raised:
        load_template("alpaca", tokenizer).render(Turn("q", "a", history=({"role": "user", "content": "x"},)))
    assert message_of(raised) == "data.template: alpaca takes one user turn; use chat for rows with earlier turns"


# --- Jinja file ----------------------------------------------------------------------------------------------------


def test_jinja_file_splits_around_prompt_and_completion(tokenizer, tmp_path):
    path = write(tmp_path, "Q: {{ prompt }}\nA: {{ completion }}{{ eos_token }}\n")
    template = load_template(path, tokenizer)
    assert template.name == path
    assert template.render(Turn("A: a", "b")) == Rendered("Q: ", "A: a", "\nA: ", "b<|end|>")


def test_jinja_file_without_end_token_gets_one(tokenizer, tmp_path):
    template = load_template(write(tmp_path, "{{ prompt }} => {{ completion }}."), tokenizer)
    assert template.render(Turn("q", "a")) == Rendered("", "q", " => ", "a.<|end|>")


def test_jinja_filters_see_the_real_texts(tokenizer, tmp_path):
    template = load_template(write(tmp_path, "<{{ prompt | trim }}>{{ completion | trim }}"), tokenizer)
    assert template.render(Turn(" q ", " a ")) == Rendered("<", "q", ">", "a<|end|>")


def test_jinja_history_and_input_are_used(tokenizer, tmp_path):
    earlier = "{% for m in history %}{{ m.role }}={{ m.content }};{% endfor %}"
    text = earlier + "{{ prompt }}{% if input %} ({{ input }}){% endif %}>{{ completion }}"
    template = load_template(write(tmp_path, text), tokenizer)
    history = ({"role": "user", "content": "hi"},)
    assert template.render(Turn("q", "a", history=history)) == Rendered("user=hi;", "q", ">", "a<|end|>")
    # The input is the user's text, so it belongs to the query.
    assert template.render(Turn("q", "a", input="i")) == Rendered("", "q (i", ")>", "a<|end|>")


def test_jinja_file_that_knows_no_input_or_history_loses_neither(tokenizer, tmp_path):
    template = load_template(write(tmp_path, "{{ prompt }}>{{ completion }}"), tokenizer)
    assert template.render(Turn("q", "a", input="i")).query == "q\n\ni"
    with pytest.raises(UsageError, match=r"template.jinja: no \{\{ history \}\} slot, and the row has earlier turns$"):
        template.render(Turn("q", "a", history=({"role": "user", "content": "hi"},)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q: {{ prompt }}", "no {{ completion }} slot; exactly one is needed"),
        ("{{ prompt }}{{ promt }}", "no {{ completion }} slot; exactly one is needed"),
        ("{{ completion }}", "no {{ prompt }} slot; exactly one is needed"),
        ("", "no {{ completion }} slot; exactly one is needed"),
        ("{{ prompt }}{{ completion }}{{ completion }}", "2 {{ completion }} slot; exactly one is needed"),
        ("{{ prompt }}{{ prompt }}{{ completion }}", "2 {{ prompt }} slot; exactly one is needed"),
        ("{{ completion }}{{ prompt }}", "{{ completion }} stands before {{ prompt }}; the answer comes last"),
        ("{{ prompt + 1 }}{{ completion }}", "can only concatenate str"),
        ("{{ prompt.missing.part }}{{ completion }}", "has no attribute 'missing'"),
    ],
)
def test_jinja_file_with_wrong_slots(tokenizer, tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        load_template(path, tokenizer)
    assert message_of(raised).startswith(f"template {path}: ")
    assert message in str(raised.value)


def test_jinja_syntax_error_names_the_line(tokenizer, tmp_path):
    path = write(tmp_path, "{{ prompt }}\n{{ completion }}\n{% if %}\n")
    with pytest.raises(UsageError) as raised:
        load_template(path, tokenizer)
    assert message_of(raised).startswith(f"template {path}, line 3: Expected an expression")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% if prompt|length > 6 %}long {% endif %}{{ prompt }}{{ completion }}", "must not depend on the prompt"),
        ("{% if input %}{{ input }}{% else %}{{ prompt }}{% endif %}{% if input == 'x' %}{{ completion }}{% else %}"
         "{{ completion }}{% endif %}", None),
        ("{% if completion == 'a' %}!{% endif %}{{ prompt }}{{ completion }}", "must not depend on it"),
        ("{% if input %}{% else %}{{ prompt }}{% endif %}{{ completion }}", "does not write the user's text of this row"),
        ("{{ prompt }}{% if not input %}{{ completion }}{% endif %}", "does not contain the answer"),
    ],
)  # fmt: skip
def test_jinja_file_that_treats_this_row_otherwise(tokenizer, tmp_path, text, message):
    template = load_template(write(tmp_path, text), tokenizer)
    turn = Turn("q", "a", input="i")
    if message is None:
        assert template.render(turn) == Rendered("", "i", "", "a<|end|>")
        return
    with pytest.raises(UsageError, match=message) as raised:
        template.render(turn)
    message_of(raised)


def test_jinja_is_sandboxed(tokenizer, tmp_path):
    for attack in (
        "{{ prompt.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ history.append(1) }}",
    ):
        with pytest.raises(UsageError, match=r"^template .*(unsafe|not safely callable)"):
            load_template(write(tmp_path, attack + "{{ prompt }}{{ completion }}"), tokenizer)


@pytest.mark.parametrize("name", ["chatt", "missing.jinja", ""])
def test_unknown_template(tokenizer, name):
    with pytest.raises(UsageError) as raised:
        load_template(name, tokenizer)
    assert message_of(raised).startswith("data.template: ")
    assert message_of(raised).endswith("is not chat, alpaca or an existing Jinja file")


def test_jinja_file_that_is_not_text(tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_bytes(b"\xff\xfe{{ prompt }}")
    with pytest.raises(UsageError) as raised:
        load_template(str(path), tokenizer)
    assert message_of(raised) == f"template {path}: not UTF-8 text"


def test_begin_of_text_written_by_the_file_is_known(tmp_path):
    """The encoder adds one where the template has not."""
    tokenizer = build_tiny_tokenizer(bos_token="<|begin|>")
    plain = load_template(write(tmp_path, "{{ prompt }}{{ completion }}"), tokenizer)
    assert not plain.adds_special_tokens
    begun = load_template(write(tmp_path, "{{ bos_token }}{{ prompt }}{{ completion }}"), tokenizer)
    assert begun.adds_special_tokens
    assert begun.render(Turn("q", "a")).prefix == "<|begin|>"
    assert load_template("chat", tokenizer).adds_special_tokens
    assert not load_template("alpaca", tokenizer).adds_special_tokens


@pytest.mark.parametrize("end", ["", "{{ eos_token }}"])
def test_a_file_as_a_chat_template_writes_the_same_dialogue(tokenizer, tmp_path, end):
    loop = "{% for turn in history %}\n{{ turn.role }}: {{ turn.content }}\n{% endfor %}\n"
    text = f"{loop}Q: {{{{ prompt }}}}\nA: {{{{ completion }}}}{end}"
    template = load_template(write(tmp_path, text), tokenizer)
    earlier = [{"role": "user", "content": "Moja?"}, {"role": "assistant", "content": "1."}]
    for turn in (Turn("Mbili?", "2."), Turn("Mbili?", "2.", history=earlier)):
        messages = [*turn.history, {"role": "user", "content": "Mbili?"}, {"role": "assistant", "content": "2."}]
        written = tokenizer.apply_chat_template(messages, chat_template=template.chat_template, tokenize=False)
        assert written == whole(template.render(turn))
