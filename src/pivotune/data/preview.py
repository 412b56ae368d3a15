"""One example as the model will see it: which tokens are the query, which are trained on, which are the template's."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pivotune.data.examples import Side

Role = Literal["template", "query", "answer"]


class Segment(NamedTuple):
    """A run of tokens with one role. Only `answer` tokens carry loss."""

    role: Role
    text: str
    num_tokens: int


def preview(tokenizer: Any, side: Side) -> list[Segment]:
    """The sequence decoded from its token ids (not from the text they came from), in order, special tokens included."""
    start, end = side.query
    bounds: list[tuple[Role, int, int]] = [
        ("template", 0, start),
        ("query", start, end),
        ("template", end, side.answer),
    ]
    bounds.append(("answer", side.answer, len(side.ids)))
    return [
        Segment(role, tokenizer.decode(side.ids[left:right].tolist(), skip_special_tokens=False), right - left)
        for role, left, right in bounds
        if right > left
    ]
