"""From an item to the exact text and tokens a model is asked with: the run's own template, cut to the model's context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pivotune.data.examples import begin_ids
from pivotune.data.templates import Rendered, Template, Turn
from pivotune.errors import UsageError


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
        """What separates query and answer: the template's own words do, where there is one."""
        return wanted if self.template is None else ""

    def context(self, query: str, reserve: int) -> Context:
        """The prompt of a query that leaves room for `reserve` more tokens.

        A query that is too long loses its beginning, never its end, where the question stands, nor the template's words.

        Raises:
            UsageError: nothing of the query fits.
        """
        text = self._around(query).prompt
        if self.max_length is None or not query:
            return Context(text)
        excess = len(self.encode_context(text)) + reserve - self.max_length
        if excess <= 0:
            return Context(text)
        return Context(self._around(self._without_start(query, excess, reserve)).prompt, truncated=True)

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

    def _around(self, query: str) -> Rendered:
        return Rendered("", query, "", "") if self.template is None else self.template.render(Turn(query))

    def _without_start(self, query: str, excess: int, reserve: int) -> str:
        """The query without its first `excess` tokens; a few more where the cut tokenizes worse than it did before."""
        offsets = self.tokenizer(query, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert self.max_length is not None
        for dropped in range(excess, len(offsets)):
            rest = query[offsets[dropped][0] :].lstrip()
            if len(self.encode_context(self._around(rest).prompt)) + reserve <= self.max_length:
                return rest
        raise UsageError(
            f"the model reads {self.max_length} tokens, and prompt and answer need more even without the query; "
            "lower --max-new-tokens or use a shorter template"
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def _prefix_id(self) -> int:
        """What the harness puts before text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos
