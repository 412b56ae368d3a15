"""From an item to the exact text and tokens a model is asked with: the run's own template, cut to the model's context."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pivotune.data.examples import begin_ids
from pivotune.data.templates import Template, Turn
from pivotune.errors import UsageError

_ANSWER = "answer"


@dataclass(frozen=True, slots=True)
class Context:
    """What stands before an answer, and whether the query lost its beginning to fit the model's context."""

    text: str
    truncated: bool = False


class Prompter:
    """Puts the template around queries and tokenizes prompt and answer as training did.

    Without a template (`--template none`) texts and tokens are those of lm-evaluation-harness without a chat template:
    white space at the end of a context goes to the continuation, and an empty context is the begin-of-text token.

    Args:
        tokenizer: a fast tokenizer.
        template: the run's template, or None for plain text.
        max_length: tokens that the model reads at once; None for no limit.
    """

    def __init__(self, tokenizer: Any, template: Template | None, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.begin_ids = begin_ids(tokenizer, template is not None and template.adds_special_tokens)

    @property
    def name(self) -> str:
        return "none" if self.template is None else self.template.name

    def delimiter(self, wanted: str) -> str:
        """What stands between the context and an answer: where there is a template, the spaces that it writes there."""
        return wanted if self.template is None else self._lead[1]

    def context(self, query: str, reserve: int, cuttable: tuple[int, int] | None = None) -> Context:
        """The prompt of a query that leaves room for `reserve` more tokens.

        Args:
            cuttable: characters of the query whose beginning is left out where the prompt is too long; None for all of it.
                The rest of the query and the template's words stay.

        Raises:
            UsageError: not even the rest fits.
        """
        text = self._around(query)
        if self.max_length is None:
            return Context(text)
        excess = len(self.encode_context(text)) + reserve - self.max_length
        if excess <= 0:
            return Context(text)
        start, end = cuttable or (0, len(query))
        return Context(self._shortened(query, start, end, excess, reserve), truncated=True)

    def encode_context(self, text: str) -> list[int]:
        """Token ids of a prompt, with the begin-of-text token where the model expects one."""
        if not text:
            return [self._prefix_id]
        return self.begin_ids + self._ids(text)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of what follows it.

        Tokens that would merge across the border stay apart under a template, where generation begins at the border too.
        """
        if not context:
            ids = self._ids(continuation)
            return ([self._prefix_id], ids) if ids[:1] != [self._prefix_id] else (ids[:1], ids[1:])
        if self.template is None:
            stripped = context.rstrip()
            context, continuation = stripped, context[len(stripped) :] + continuation
        prompt, whole = self.encode_context(context), self.encode_context(context + continuation)
        if self.template is None or whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self._ids(continuation)

    def _around(self, query: str) -> str:
        """The prompt, with what the template always writes before an answer (an empty thinking block, say)."""
        return query if self.template is None else self.template.render(Turn(query)).prompt + self._lead[0]

    @cached_property
    def _lead(self) -> tuple[str, str]:
        """What the template writes between prompt and answer, and spaces at its end, which share tokens with answers."""
        assert self.template is not None
        lead, found, _ = self.template.render(Turn("question", _ANSWER)).completion.partition(_ANSWER)
        fixed = lead.rstrip(" ") if found else ""
        return fixed, lead[len(fixed) :] if found else ""

    def _shortened(self, query: str, start: int, end: int, excess: int, reserve: int) -> str:
        """The prompt without the first `excess` tokens of the span; a few more where the rest tokenizes worse."""
        offsets = self.tokenizer(query[start:end], add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        assert self.max_length is not None
        for dropped in range(excess, len(offsets) + 1):
            kept = query[start + offsets[dropped][0] : end].lstrip() if dropped < len(offsets) else ""
            text = self._around(query[:start] + kept + query[end:])
            if len(self.encode_context(text)) + reserve <= self.max_length:
                return text
        shortest = self._around(query[:start] + query[end:])
        raise UsageError(
            f"the prompt takes {len(self.encode_context(shortest))} tokens even without what may be cut, and the answer "
            f"up to {reserve}; the model reads {self.max_length} (a smaller --max-new-tokens or a shorter template may fit)"
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def _prefix_id(self) -> int:
        """What the harness puts before text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos
