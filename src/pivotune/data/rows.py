"""One row of parallel instruction data, and how it is read from a record in any accepted form."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from numbers import Integral, Number
from operator import attrgetter
from typing import Any

from pivotune.data.templates import Message, Turn
from pivotune.errors import UsageError
from pivotune.text.json_text import RepeatedKeyError, parse_json, shown

MISSING = "is missing"
EMPTY = "is empty"
ENGLISH_SUFFIX = "_en"
LANGUAGE_KEY = "language"
# Names from the data are cut in messages.
_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One example: the query and answer in the target language and their English parallels.

    A side (target or English) is either whole or has '' in all its texts. `input` is the second field of an
    Alpaca row, kept apart because the Alpaca template gives it a section of its own. `history` holds the chat
    turns before the last user turn. `number` is the row's 1-based place in its source: the line for JSON Lines,
    else the row. `language` is the code of the target language, as the row names it or as a run has assigned it; ''
    without one.
    """

    prompt: str
    completion: str
    prompt_en: str
    completion_en: str
    input: str = ""
    input_en: str = ""
    history: Sequence[Message] = ()
    history_en: Sequence[Message] = ()
    id: str = ""
    number: int = 0
    language: str = ""

    @property
    def sides(self) -> tuple[Turn, Turn]:
        """The target side and the English side."""
        return (
            Turn(self.prompt, self.completion, self.input, self.history),
            Turn(self.prompt_en, self.completion_en, self.input_en, self.history_en),
        )

    def __reduce__(self) -> tuple:
        """Pickle as a call: the methods of a dataclass with slots list its fields anew for every row."""
        return Row, _VALUES(self)


_VALUES = attrgetter(*Row.__dataclass_fields__)


class RowError(Exception):
    """Why a record cannot be used: the `key` at fault ('' for the whole record), the `reason` and a `note`.

    `str(error)` leaves the note out, so that rows with the same problem can be counted together. `error` is the message
    with file and line for a record that cannot even be read.
    """

    def __init__(self, key: str, reason: str, note: str = "", error: UsageError | None = None) -> None:
        super().__init__(key, reason, note, error)
        self.key, self.reason, self.note, self.error = key, reason, note, error

    def __str__(self) -> str:
        return f"`{self.key}` {self.reason}" if self.key else f"the row {self.reason}"


# Keys of one side in each form. The first complete form of a side is read, so that `prompt`/`completion` win over the
# columns they were made from. An Alpaca row may also have `input`.
FORMS = (("prompt", "completion"), ("instruction", "output"), ("messages",), ("conversations",))
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "bot", "model"), "assistant"
)
# Further texts of a side: Alpaca's second field, and the turns before in LLaMA-Factory's form of it.
_CONTEXT = ("input", "system", "history")
ENGLISH_KEYS = (*(f"{key}{ENGLISH_SUFFIX}" for form in FORMS for key in form), f"input{ENGLISH_SUFFIX}")
USED_KEYS = {f"{key}{suffix}" for key in (*(key for form in FORMS for key in form), *_CONTEXT)
             for suffix in ("", ENGLISH_SUFFIX)} | {"id", LANGUAGE_KEY}  # fmt: skip
# The first that fits counts.
_KINDS = {
    bool: "a truth value", Number: "a number", str: "text", bytes: "bytes", Mapping: "an object", Iterable: "a list",
}  # fmt: skip


def parse_row(record: Any, *, number: int, need_target: bool, need_english: bool) -> Row:
    """Read one record in any form: `prompt`/`completion`, Alpaca or chat, English keys with `_en` at the end.

    A side that is not needed is read where it is whole, and is left empty otherwise. Other columns are ignored.

    Raises:
        RowError: a needed text is missing, blank or no text, or a chat does not end with the assistant's answer.
    """
    if not isinstance(record, Mapping):
        raise RowError("", f"is {_kind(record)}, not an object with named texts")
    target = _parse_side(record, "", needed=need_target)
    english = _parse_side(record, ENGLISH_SUFFIX, needed=need_english)
    row_id = record_id(record)
    if row_id and (fault := _text_fault(row_id)):
        raise RowError("id", fault)
    texts = (target.prompt, target.completion, english.prompt, english.completion)
    language = record.get(LANGUAGE_KEY)
    if not isinstance(language, str):
        language = "" if _is_missing(language) else _kind(language)
    # No code is as long: a whole text in this column is not kept.
    language = language.strip()[:_LONGEST_NAME]
    return Row(*texts, target.input, english.input, target.history, english.history, row_id, number, language)


def record_id(record: Any) -> str:
    """Return the record's `id` as text, '' without one. Whole numbers count as ids."""
    value = record.get("id") if isinstance(record, Mapping) else None
    is_id = isinstance(value, str | Integral) and not isinstance(value, bool)
    try:
        return str(value).strip() if is_id else ""
    except ValueError:  # Python refuses to write out whole numbers of over 4,300 digits
        return ""


def _parse_side(record: Mapping[str, Any], suffix: str, *, needed: bool) -> Turn:
    try:
        form = _find_form(record, suffix)
        if form is None:
            likely = _find_form(record, "") or FORMS[0]
            # For a user whose columns have other names.
            names = [
                f"`{name[:_LONGEST_NAME]}...`" if len(name) > _LONGEST_NAME else f"`{name}`"
                for name in map(str, islice(record, 8))
            ]
            columns = ", ".join(names) + (", ..." if len(record) > len(names) else "") if names else "no columns"
            raise RowError(likely[0] + suffix, MISSING, f" (the row has {columns})")
        earlier = _earlier_turns(record, suffix)
        if len(form) == 1:
            turn = _parse_chat(record[form[0] + suffix], form[0] + suffix)
        elif all(isinstance(_plain(record.get(key + suffix)), list | tuple) for key in form):
            # TRL's conversational form: the last turns are those to train on.
            turn = _parse_chat([message for part in form for message in record[part + suffix]], form[0] + suffix)
        else:
            prompt, completion = (_text(record, key + suffix) for key in form)
            key = f"input{suffix}"
            has_input = form[0] == "instruction" and _text_fault(record.get(key)) not in (MISSING, EMPTY)
            turn = Turn(prompt, completion, _text(record, key) if has_input else "")
        if earlier and turn.history and earlier[0]["role"] == turn.history[0]["role"] == "system":
            raise RowError(f"system{suffix}", "stands beside a system message of the conversation; keep one of the two")
        return replace(turn, history=(*earlier, *turn.history))
    except RowError:
        if needed:
            raise
        return Turn("")


def _plain(value: Any) -> Any:
    """Return an array as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _earlier_turns(record: Mapping[str, Any], suffix: str) -> list[Message]:
    """Return the turns of the columns `system`, a text, and `history`, a list of [user, assistant]."""
    turns: list[Message] = []
    key = f"system{suffix}"
    if _text_fault(record.get(key)) not in (MISSING, EMPTY):
        turns.append({"role": "system", "content": _text(record, key)})
    key = f"history{suffix}"
    value = record.get(key)
    if is_empty(value):
        return turns
    for pair in map(_plain, _parse_list(value, key)):
        if not (isinstance(pair, list | tuple) and len(pair) == 2) or any(map(_text_fault, pair)):
            raise RowError(key, "is not a list of [question, answer]")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return turns


def _find_form(record: Mapping[str, Any], suffix: str) -> tuple[str, ...] | None:
    for enough in (all, any):
        for form in FORMS:
            if enough(not _is_missing(record.get(key + suffix)) for key in form):
                return form
    return None


def _text(record: Mapping[str, Any], key: str) -> str:
    if fault := _text_fault(record.get(key)):
        raise RowError(key, fault)
    return record[key]


def _text_fault(value: Any) -> str:
    """Say why a value is no text to train on; '' if it is one."""
    if _is_missing(value):
        return MISSING
    if not isinstance(value, str):
        return f"is {_kind(value)}, not text"
    if not value or value.isspace():
        return EMPTY
    try:
        value.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair (\ud83d alone); tokenizers fail on it later with a worse message.
        return "holds half of a surrogate pair, which is no character"
    return ""


def _is_missing(value: Any) -> bool:
    """Return True for None and for NaN, which pandas writes in place of None."""
    return value is None or (isinstance(value, float) and value != value)


def is_empty(value: Any) -> bool:
    """Return True for a missing value and for a text, list or array without content; arrays have no truth value."""
    return _is_missing(value) or (hasattr(value, "__len__") and len(value) == 0)


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS.items() if isinstance(value, kind)), type(value).__name__)


def _parse_list(value: Any, key: str) -> list[Any]:
    """Return a list, an array, or the list in the JSON text of a CSV cell."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(key, EMPTY)
        try:
            value = parse_json(value)
        except RepeatedKeyError as error:
            raise RowError(key, "has an object that names a key more than once", f" (it {error})") from None
        except ValueError:
            if re.match(r"\s*\[\s*[{\[(]\s*'", value):
                raise RowError(key, "is a Python literal, not JSON", " (write it with json.dumps)") from None
            raise RowError(key, "is text, not a list of messages") from None
    value = _plain(value)
    if not isinstance(value, list | tuple):
        raise RowError(key, f"is {_kind(value)}, not a list of messages")
    return list(value)


def _parse_chat(value: Any, key: str) -> Turn:
    """Read a list of messages."""
    read = (_read_message(item, key) for item in _parse_list(value, key))
    messages = [message for message in read if message is not None]
    if not messages:
        raise RowError(key, EMPTY)
    if messages[-1]["role"] != "assistant":
        raise RowError(key, "does not end with the assistant's answer")
    if len(messages) < 2 or messages[-2]["role"] != "user":
        raise RowError(key, "has no user turn right before the last answer")
    *history, query, answer = messages
    return Turn(query["content"], answer["content"], history=tuple(history))


def _read_message(item: Any, key: str) -> Message | None:
    """Read one turn, with `role`/`content` or `from`/`value`; return None for a blank system turn."""
    if not isinstance(item, Mapping):
        raise RowError(key, f"has {_kind(item)} where a message with role and content should be")
    name = _first_present(item, "role", "from")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        role = shown(name) if isinstance(name, str) else repr(name) if name is None else _kind(name)
        raise RowError(key, f"has a message with role {role} (allowed: {', '.join(ROLES)})")
    content = _joined_parts(_first_present(item, "content", "value"), key)
    fault = _text_fault(content)
    if role == "system" and fault in (MISSING, EMPTY):
        return None
    if fault:
        raise RowError(key, f"has a message whose text {fault}")
    return {"role": role, "content": content}


def _joined_parts(content: Any, key: str) -> Any:
    """Return the text of content that is a list of parts, `[{"type": "text", "text": ...}]`; other content as it is."""
    content = _plain(content)
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise RowError(key, f"has a message with a part of type {shown(str(kind))} (allowed: text)")
        if fault := _text_fault(part.get("text")):
            raise RowError(key, f"has a message with a part whose text {fault}")
    return "".join(part["text"] for part in content)


def answered_turns(row: Row) -> list[Row]:
    """Return a row for every answer of a conversation, each with the turns before it; the last answer's row is last.

    The English side follows turn by turn. Where its roles differ, only the last answers are parallel: one row.
    """
    roles, english = (
        [turn["role"] for turn in side if turn["role"] != "system"] for side in (row.history, row.history_en)
    )
    if row.prompt and row.prompt_en and roles != english:
        return [row]
    sides = [_split_before_answers(history) for history in (row.history, row.history_en)]
    found = [
        replace(
            row, history=before, prompt=prompt, completion=completion, input="",
            history_en=before_en, prompt_en=prompt_en, completion_en=completion_en, input_en="",
        )
        for (before, prompt, completion), (before_en, prompt_en, completion_en) in zip_longest(
            *sides, fillvalue=((), "", "")
        )
    ]  # fmt: skip
    return [*found, row]


def _split_before_answers(history: Sequence[Message]) -> list[tuple[tuple[Message, ...], str, str]]:
    """Return (turns before, question, answer) of every answer right after a user turn."""
    return [
        (tuple(history[: place - 1]), history[place - 1]["content"], history[place]["content"])
        for place in range(1, len(history))
        if (history[place - 1]["role"], history[place]["role"]) == ("user", "assistant")
    ]


def _first_present(item: Mapping[str, Any], *keys: str) -> Any:
    return next((item[key] for key in keys if not _is_missing(item.get(key))), None)
