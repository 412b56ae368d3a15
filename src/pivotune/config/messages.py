"""Mistakes in settings as one line: which key, what was found, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pivotune.errors import UsageError

# Tag of the alternative that is a list, in a union with a discriminator.
LIST_TAG = "[]"
# Words of pydantic's messages -> the words of a YAML file's author.
_PLAIN = {
    "valid string": "text", "valid integer": "a whole number", "valid number": "a number",
    "valid boolean": "true or false", "valid list": "a list", "valid dictionary": "a section with keys of its own",
    "instance of": "a section with keys of its own",
}  # fmt: skip
_SectionT = TypeVar("_SectionT", bound=BaseModel)


def validate(section: type[_SectionT], settings: Mapping[str, Any], *, where: str, within: str = "") -> _SectionT:
    """Build a section from plain settings; `where` names them in messages, `within` is the path of the section.

    Raises:
        UsageError: the first mistake, in one line.
    """
    try:
        return section.model_validate(settings)
    except ValidationError as error:
        raise UsageError(f"{where}: {describe(section, error, within)}") from error


def describe(section: type[BaseModel], error: ValidationError, within: str) -> str:
    """Return the first mistake in one line; `within` is the path of the section. Unknown keys come first: they
    explain missing ones."""
    problems: list[Any] = list(error.errors())
    unknown = ("extra_forbidden", "invalid_key", "unknown_key")
    problem = next((p for p in problems if p["type"] in unknown), problems[0])
    path = [str(part) for part in problem["loc"] if part != LIST_TAG]
    found = problem.get("input")
    if problem["type"] == "extra_forbidden":
        return _unknown_key(section, path, within)
    if problem["type"] == "invalid_key":
        return _unknown_key(section, [*path[:-1], str(found)], within)
    if problem["type"] == "unknown_key":
        return _unknown_key(section, [*path, problem["ctx"]["key"]], within)
    key = within + ".".join(_keys(problem))
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    # The members of a union have an error each.
    alike = [p["msg"] for p in problems if _keys(p) == _keys(problem)]
    shown = "null" if found is None else repr(found)
    return f"{key}: {shown} is not allowed; allowed: {', or '.join(allowed_values(alike))}"


def allowed_values(messages: Iterable[str]) -> list[str]:
    """Return what pydantic's messages allow, in the words of a YAML file's author, each once."""
    found = []
    for message in messages:
        allowed = message.removeprefix("Input should be ").removeprefix("Value error, ")
        allowed = allowed.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
        found.append(next((plain for words, plain in _PLAIN.items() if words in allowed), allowed))
    return list(dict.fromkeys(found))


# Pydantic puts the names of union members into the path of an error.
_UNION_MEMBERS = ("int", "str", "float", "literal", "constrained-int", "constrained-float")


def _keys(problem: Any) -> list[str]:
    """Return the path of an error without the names of union members."""
    path = map(str, problem["loc"])
    return [part for part in path if part not in _UNION_MEMBERS and "[" not in part and "(" not in part]


def _section_in(annotation: Any) -> type[BaseModel]:
    """Return the section among the alternatives and items of a type."""
    found = [annotation]
    while not (isinstance(found[0], type) and issubclass(found[0], BaseModel)):
        found = [*found[1:], *get_args(found[0])]
    return found[0]


def _unknown_key(section: type[BaseModel], path: list[str], within: str) -> str:
    fields = section.model_fields
    for name in path[:-1]:
        # The places of a list's entries are no fields.
        fields = _section_in(fields[name].annotation).model_fields if name in fields else fields
    near = difflib.get_close_matches(path[-1], fields, n=1)
    hint = (
        f"; did you mean {within}{'.'.join([*path[:-1], near[0]])}?" if near else f"; known keys: {', '.join(fields)}"
    )
    return f"unknown key {within}{'.'.join(path)}{hint}"
