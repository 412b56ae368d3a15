"""Prompt templates: `chat` (the tokenizer's own), `alpaca` (the paper's) or a Jinja file.

A template turns one side of a row into four strings; the model reads `prefix + query + suffix + completion`. The query is
the user's text. Prefix and suffix are the template's own words, the same in both languages. The completion ends with the
end-of-text or end-of-turn token. Spans follow from the lengths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError

# Strings that no row contains, to find the places of the user's text and the answer in a template.
_QUERY, _INPUT, _ANSWER = "\u241aquery\u241a", "\u241ainput\u241a", "\u241aanswer\u241a"

_ALPACA_HEAD = "Below is an instruction that describes a task"
_ALPACA_TAIL = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
_ALPACA_RESPONSE = "\n\n### Response:"

# A Jinja file's text as a chat template. Transformers trims white space around blocks; "+" keeps the file's own.
_AS_CHAT = """\
{%- set answered = messages[-1]['role'] == 'assistant' -%}
{%- set asked = messages[:-1] if answered else messages -%}
{%- set prompt, input, history = asked[-1]['content'], '', asked[:-1] -%}
{%- set completion = messages[-1]['content'] if answered else 'MARK' -%}
ONE_TURN
{%- set text +%}SOURCE{%+ endset -%}
{{- BEGIN ~ (text ~ END if answered else text.split('MARK')[0]) -}}
"""
_ONE_TURN = "{%- if history -%}{{ raise_exception('this template takes one user turn') }}{%- endif -%}"

# One turn of a chat, as chat templates take it: {"role": "system" | "user" | "assistant", "content": text}.
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One side of a row: the user's prompt and input, the model's answer, and the turns before."""

    prompt: str
    completion: str = ""
    input: str = ""
    history: Sequence[Message] = ()

    @property
    def is_whole(self) -> bool:
        return bool(self.prompt and self.completion)

    @property
    def user_text(self) -> str:
        """Return Alpaca's two fields as one message."""
        return f"{self.prompt}\n\n{self.input}" if self.input else self.prompt

    @property
    def texts(self) -> list[str]:
        """Prompt, answer, input and the texts of the turns before, for `with_texts`."""
        return [self.prompt, self.completion, self.input, *(message["content"] for message in self.history)]

    def with_texts(self, texts: Sequence[str]) -> Turn:
        """Return the turn with other texts in the order of `texts`."""
        prompt, completion, text, *contents = texts
        history = tuple({**message, "content": new} for message, new in zip(self.history, contents, strict=True))
        return Turn(prompt, completion, text, history)

    def with_system_folded(self) -> Turn:
        """Return the turn with its system message before the first user text, for templates that refuse the role."""
        if not self.history or self.history[0]["role"] != "system":
            return self
        system, *rest = self.history
        if not rest:
            return replace(self, prompt=f"{system['content']}\n\n{self.prompt}", history=())
        first = {**rest[0], "content": f"{system['content']}\n\n{rest[0]['content']}"}
        return replace(self, history=(first, *rest[1:]))


@dataclass(frozen=True, slots=True)
class Rendered:
    """`prefix + query + suffix` is the prompt; `completion` follows it and ends with the end token."""

    prefix: str
    query: str
    suffix: str
    completion: str

    @property
    def prompt(self) -> str:
        return self.prefix + self.query + self.suffix


def load_template(name: str | None, tokenizer: Any) -> Template:
    """Load the template called `name` for this tokenizer.

    Args:
        name: `chat`, `alpaca`, the path of a Jinja file, or None for `chat` where the tokenizer has a chat template and
            `alpaca` otherwise.

    Raises:
        UsageError: no end-of-text token, no chat template, no such file, or no answer slot in it.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            "the tokenizer has no end-of-text token, so answers could never end; set tokenizer.eos_token before training"
        )
    if name is None:
        # A model that was trained with Alpaca's prompts holds them as its chat template, which has no input.
        chat = tokenizer.chat_template
        name = "chat" if chat and chat != AlpacaTemplate(tokenizer).chat_template else "alpaca"
    known = {"chat": ChatTemplate, "alpaca": AlpacaTemplate}
    return known[name](tokenizer) if name in known else JinjaTemplate(Path(name), tokenizer)


class ChatTemplate:
    """The tokenizer's own chat template; the completion is the assistant's turn with its end token."""

    name = "chat"
    # The rendered text already holds the begin-of-text token where the template wants one.
    adds_special_tokens = True

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UsageError("data.template: chat needs a tokenizer with a chat template; use alpaca or a Jinja file")
        names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ["default"]
        if "default" not in names:
            raise UsageError(
                f"data.template: chat: the tokenizer's chat templates are {', '.join(names)}, and none is called default; "
                "use a Jinja file"
            )
        self._tokenizer = tokenizer
        self._end_tokens = _end_tokens(tokenizer)
        # The template's text before and after the user's, for rows without history.
        self._plain_frame: tuple[str, str] | None = None

    @property
    def chat_template(self) -> Any:
        return self._tokenizer.chat_template

    def render(self, turn: Turn) -> Rendered:
        frame = None if turn.history else self._plain_frame
        if frame is None:
            text = self._apply([*turn.history, {"role": "user", "content": _QUERY}], generation_prompt=True)
            frame = _around(text, _QUERY, "data.template: chat")
            if not turn.history:
                self._plain_frame = frame
        prefix, suffix = frame
        messages = [*turn.history, {"role": "user", "content": turn.user_text}]
        prompt = self._apply(messages, generation_prompt=True)
        if not (prompt.startswith(prefix) and prompt.endswith(suffix)):
            # The frame depends on the text or the date. The suffix goes first: its words may occur in the query.
            kept = suffix if prompt.endswith(suffix) else ""
            prefix, after = _around(prompt.removesuffix(kept), turn.user_text.strip(), "data.template: chat")
            suffix = after + kept
        whole = ""
        if turn.completion:
            whole = self._apply([*messages, {"role": "assistant", "content": turn.completion}], generation_prompt=False)
            if not whole.startswith(prompt):
                raise UsageError(
                    "data.template: chat: this chat template does not put the answer right after its generation prompt; "
                    "use alpaca or a Jinja file"
                )
        return _split(prompt, prefix, suffix, whole, self._end_tokens)

    def _apply(self, messages: list, *, generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            hint = "; data.fold_system: true puts the system text before the user's" if "system" in roles else ""
            raise UsageError(f"the chat template refuses the roles {roles}: {error}{hint}") from error


class AlpacaTemplate:
    """Stanford Alpaca's two prompts, with and without an input (Taori et al. 2023), as in the paper."""

    name = "alpaca"
    adds_special_tokens = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._end = tokenizer, tokenizer.eos_token

    @property
    def chat_template(self) -> str:
        """Return the prompt without an input as a chat template."""
        source = f"{_ALPACA_HEAD}{_ALPACA_TAIL}{{{{ prompt }}}}{_ALPACA_RESPONSE}{{{{ completion }}}}"
        return _as_chat(source, self._tokenizer, begins=self.adds_special_tokens, end=self._end, history=False)

    def render(self, turn: Turn) -> Rendered:
        if turn.history:
            raise UsageError("data.template: alpaca takes one user turn; use chat for rows with earlier turns")
        if turn.input:
            prefix = f"{_ALPACA_HEAD}, paired with an input that provides further context{_ALPACA_TAIL}"
            query = f"{turn.prompt}\n\n### Input:\n{turn.input}"
        else:
            prefix, query = f"{_ALPACA_HEAD}{_ALPACA_TAIL}", turn.prompt
        completion = f"{turn.completion}{self._end}" if turn.completion else ""
        return Rendered(prefix, query, _ALPACA_RESPONSE, completion)


class JinjaTemplate:
    """A Jinja file with the variables `prompt`, `completion` and, where used, `input`, `history`, `bos_token`, `eos_token`.

    It must hold `{{ prompt }}` before `{{ completion }}`. The end token is added where the file does not write it. The
    query runs from the prompt to the input. A file without `{{ input }}` gets both as one prompt.
    """

    def __init__(self, path: Path, tokenizer: Any) -> None:
        from jinja2 import TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.name = str(path)
        self._tokenizer = tokenizer
        self._end_tokens = _end_tokens(tokenizer)
        if not path.is_file():
            raise UsageError(f"data.template: {path} is not chat, alpaca or an existing Jinja file")
        try:
            environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True)
            self._source = path.read_text(encoding="utf-8-sig")
            self._template = environment.from_string(self._source)
            self._variables = meta.find_undeclared_variables(environment.parse(self._source))
        except TemplateSyntaxError as error:
            raise UsageError(f"template {path}, line {error.lineno}: {error.message}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"template {path}: not UTF-8 text") from error
        probe = self._fill(Turn(prompt=_QUERY, completion=_ANSWER))
        for marker, variable in ((_ANSWER, "completion"), (_QUERY, "prompt")):
            if (count := probe.count(marker)) != 1:
                raise UsageError(f"template {path}: {count or 'no'} {{{{ {variable} }}}} slot; exactly one is needed")
        if probe.index(_ANSWER) < probe.index(_QUERY):
            raise UsageError(
                f"template {path}: {{{{ completion }}}} stands before {{{{ prompt }}}}; the answer comes last"
            )
        self.adds_special_tokens = bool(tokenizer.bos_token) and probe.startswith(tokenizer.bos_token)

    def render(self, turn: Turn) -> Rendered:
        where = f"template {self.name}"
        if turn.history and "history" not in self._variables:
            raise UsageError(f"{where}: no {{{{ history }}}} slot, and the row has earlier turns")
        if "input" not in self._variables:
            turn = replace(turn, prompt=turn.user_text, input="")
        # Text before the user's texts, and between them and the answer.
        marked = replace(turn, prompt=_QUERY, completion=_ANSWER, input=turn.input and _INPUT)
        text, _ = _around(self._fill(marked), _ANSWER, where)
        marks = [mark for mark in (_QUERY, _INPUT) if mark in text]
        if not marks:
            raise UsageError(f"{where}: it does not write the user's text of this row")
        prefix = text[: min(map(text.index, marks))]
        suffix = text[max(text.rindex(mark) + len(mark) for mark in marks) :]
        # The row's texts are rendered too, because the template may filter them.
        prompt, _ = _around(self._fill(replace(turn, completion=_ANSWER)), _ANSWER, where)
        if not (prompt.startswith(prefix) and prompt.endswith(suffix)):
            raise UsageError(f"{where}: the text around {{{{ prompt }}}} must not depend on the prompt")
        whole = self._fill(turn) if turn.completion else ""
        if whole and not whole.startswith(prompt):
            raise UsageError(f"{where}: the text before {{{{ completion }}}} must not depend on it")
        return _split(prompt, prefix, suffix, whole, self._end_tokens)

    @property
    def chat_template(self) -> str:
        """Return the file's text as a chat template; `input` is empty in it."""
        whole = self._fill(Turn(_QUERY, _ANSWER))
        end = "" if whole.rstrip().endswith(self._end_tokens) else self._end_tokens[-1]
        history = "history" in self._variables
        return _as_chat(self._source, self._tokenizer, begins=self.adds_special_tokens, end=end, history=history)

    def _fill(self, turn: Turn) -> str:
        texts = {"prompt": turn.prompt, "completion": turn.completion, "input": turn.input}
        special = {"bos_token": self._tokenizer.bos_token or "", "eos_token": self._tokenizer.eos_token}
        try:
            return self._template.render(texts, history=list(turn.history), **special)
        except Exception as error:  # expressions of a template can raise any error of Python's operators
            raise UsageError(f"template {self.name}: {error}") from error


Template = ChatTemplate | AlpacaTemplate | JinjaTemplate


def end_of_answer(template: Template, tokenizer: Any) -> int:
    """Return the id of the last token of this template's answers (Gemma's end of turn is not its end of text)."""
    return tokenizer(template.render(Turn("question", "answer")).completion, add_special_tokens=False)["input_ids"][-1]


def begin_ids(tokenizer: Any, text_has_special_tokens: bool) -> list[int]:
    """Return the begin-of-text token where this tokenizer puts one and the text does not hold it already."""
    if text_has_special_tokens or tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def _as_chat(source: str, tokenizer: Any, *, begins: bool, end: str, history: bool) -> str:
    """Return a chat template that writes the messages as the Jinja text `source` writes prompt, completion and history."""
    for opening, closing in (("{%", "%}"), ("{#", "#}")):
        source = re.sub(rf"{re.escape(opening)}(?![-+])", rf"{opening}+", source)
        source = re.sub(rf"(?<![-+]){re.escape(closing)}", rf"+{closing}", source)
    begin = tokenizer.bos_token if begin_ids(tokenizer, begins) else ""
    slots = {
        "ONE_TURN": "" if history else _ONE_TURN, "SOURCE": source, "MARK": _ANSWER,
        "BEGIN": json.dumps(begin), "END": json.dumps(end),
    }  # fmt: skip
    return re.sub("|".join(slots), lambda found: slots[found[0]], _AS_CHAT)


def _around(text: str, part: str, where: str) -> tuple[str, str]:
    """Return the text before and after the last occurrence of `part`."""
    before, found, after = text.rpartition(part)
    if not found:
        missing = "answer" if part == _ANSWER else "user's text"
        raise UsageError(f"{where}: the template does not contain the {missing}")
    return before, after


def _end_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return all special tokens, end-of-text last; any of them may end an answer."""
    # Gemma 3's end of turn is not among the named special tokens, only an added token that is marked special.
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return (*tokenizer.all_special_tokens, *added, tokenizer.eos_token)


def _split(prompt: str, prefix: str, suffix: str, whole: str, end_tokens: tuple[str, ...]) -> Rendered:
    """Split the text of a row, `whole`, which is '' for a prompt alone.

    White space behind the answer's end token is dropped; end-of-text is appended where the answer has no end token.
    """
    completion = whole[len(prompt) :]
    if whole:
        stripped = completion.rstrip()
        completion = stripped if stripped.endswith(end_tokens) else completion + end_tokens[-1]
    return Rendered(prefix, prompt[len(prefix) : len(prompt) - len(suffix)], suffix, completion)
