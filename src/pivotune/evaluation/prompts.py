"""Exact texts and tokens of requests: an item in the run's template, cut to the model's context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pivotune.data.control_tokens import ControlTokens
from pivotune.data.templates import Template, Turn, begin_ids
from pivotune.errors import UsageError
from pivotune.evaluation.cache import Generation, Likelihood, Pivot, Question
from pivotune.evaluation.tasks.base import Item, Task

_ANSWER = "answer"
# Limit of the English part of an answer, as `data.max_completion_tokens` has it for training.
_PIVOT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Context:
    """Text before an answer; truncated if the query lost its beginning to fit the model's context."""

    text: str
    truncated: bool = False


class Prompter:
    """Put the template around queries and tokenize prompt and answer as training did: control tokens in them are text.

    Without a template (`--template none`) texts and tokens are those of lm-evaluation-harness without a chat template:
    white space at the end of a context belongs to the continuation, and an empty context is the begin-of-text token.
    `max_length` limits the model's context in tokens.
    """

    def __init__(self, tokenizer: Any, template: Template | None, max_length: int | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.begin_ids = begin_ids(tokenizer, template is not None and template.adds_special_tokens)
        self._control_tokens = ControlTokens(tokenizer)

    @property
    def name(self) -> str:
        return "none" if self.template is None else self.template.name

    def context(self, query: str, reserve: int, cuttable: tuple[int, int] | None = None) -> Context:
        """Return the prompt of a query that leaves room for `reserve` more tokens.

        In a too long prompt the span `cuttable` (None: the whole query) loses its beginning; the rest of the query and the
        template's words stay.

        Raises:
            UsageError: the rest alone does not fit.
        """
        text = self._rendered(query)
        excess = 0 if self.max_length is None else len(self.encode_context(text)) + reserve - self.max_length
        if self.max_length is None or excess <= 0:
            return Context(text)
        # Drop the first `excess` tokens of the span; a few more if the rest takes more tokens than before.
        start, end = cuttable or (0, len(query))
        span = self.as_text(query)[start:end]
        if self._control_tokens.are_hidden(span):
            offsets = self._control_tokens.encode(span)[1]
        else:
            encoded = self.tokenizer(span, add_special_tokens=False, return_offsets_mapping=True)
            offsets = encoded["offset_mapping"]
        for dropped in range(excess, len(offsets) + 1):
            kept = query[start + offsets[dropped][0] : end].lstrip() if dropped < len(offsets) else ""
            text = self._rendered(query[:start] + kept + query[end:])
            if len(self.encode_context(text)) + reserve <= self.max_length:
                return Context(text, truncated=True)
        shortest = self._rendered(query[:start] + query[end:])
        raise UsageError(
            f"the prompt takes {len(self.encode_context(shortest))} tokens even without what may be cut, and the answer "
            f"up to {reserve}; the model reads {self.max_length} (a smaller --max-new-tokens or a shorter template may fit)"
        )

    def encode_context(self, text: str) -> list[int]:
        """Return the token ids of a prompt, with the begin-of-text token if the model expects one."""
        return self.begin_ids + self._ids(text) if text else [self._prefix_id]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt and of its continuation.

        Under a template no token merges across the border, because generation begins there too.
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

    def as_text(self, text: str) -> str:
        """Hide control tokens that an item's text spells out, until it is tokenized; without a template change nothing."""
        return text if self.template is None else self._control_tokens.hide(Turn(text)).prompt

    def _rendered(self, query: str) -> str:
        if self.template is None:
            return query
        return self.template.render(Turn(self.as_text(query))).prompt + self.lead[0]

    @cached_property
    def lead(self) -> tuple[str, str]:
        """Return the template's text before an answer (an empty thinking block), and the spaces that end it."""
        assert self.template is not None
        lead, found, _ = self.template.render(Turn("question", _ANSWER)).completion.partition(_ANSWER)
        fixed = lead.rstrip(" ") if found else ""
        return fixed, lead[len(fixed) :] if found else ""

    def _ids(self, text: str) -> list[int]:
        if self._control_tokens.are_hidden(text):
            return self._control_tokens.encode(text)[0]
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def _prefix_id(self) -> int:
        """Return the harness's token before text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos


@dataclass(frozen=True, slots=True)
class ItemRequests:
    """Requests of one item: the likelihoods of gold answer or choices, and the generated answer.

    Attributes:
        pivot: request for the English part of an answer of two parts, which comes before all others; None without one.
        marker: text between the two parts.
    """

    item: Item
    context: Context
    likelihoods: tuple[Likelihood, ...]
    generation: Generation | None = None
    pivot: Pivot | None = None
    marker: str = ""

    @property
    def all(self) -> tuple[Question, ...]:
        return self.likelihoods if self.generation is None else (*self.likelihoods, self.generation)

    def behind(self, english: str) -> ItemRequests:
        """Return the requests behind the model's own answer to `pivot`; a missing marker is added."""
        text = f"{self.context.text}{english.removesuffix(self.marker.strip()).rstrip()}{self.marker}"
        generation = self.generation and replace(self.generation, context=text)
        likelihoods = tuple(replace(request, context=text) for request in self.likelihoods)
        return replace(self, likelihoods=likelihoods, generation=generation)


def item_requests(
    task: Task, item: Item, prompter: Prompter, max_new_tokens: int | None = None, marker: str = ""
) -> ItemRequests:
    """Return the requests of one item under the run's template; with a `marker` for an answer of two parts."""
    # Text between context and answer: the task's, or the template's spaces there.
    delimiter = item.delimiter if prompter.template is None else prompter.lead[1]
    texts = item.choices if task.kind == "choice" else (item.gold_answer,)
    # An item without a prompt (XNLI) has no question to answer in English first.
    marker = marker if item.query else ""
    pivot_tokens = max_new_tokens or _PIVOT_TOKENS
    continuations = [f"{'' if marker else delimiter}{prompter.as_text(text)}" for text in texts]
    max_new_tokens = max_new_tokens or task.max_new_tokens
    reserve = max(len(prompter.encode_pair("\n", text)[1]) for text in continuations)
    if task.kind != "choice":
        reserve = max(reserve, max_new_tokens)
    if marker:
        reserve += pivot_tokens + len(prompter.encode_pair("\n", marker)[1])
    if not item.query and prompter.max_length is not None and reserve >= prompter.max_length:
        # No part of the prompt can be cut: the continuations themselves lose their beginning, as in the harness.
        context = Context(prompter.context("", 0).text, truncated=True)
    else:
        try:
            context = prompter.context(item.query, reserve, item.cuttable)
        except UsageError as error:
            raise UsageError(f"{task.name}, item {item.id}: {error}") from error
    likelihoods = tuple(Likelihood(context.text, text) for text in continuations)
    generation = None if task.kind == "choice" else Generation(context.text, max_new_tokens, tuple(task.stop))
    if not marker:
        return ItemRequests(item, context, likelihoods, generation)
    pivot = Pivot(context.text, pivot_tokens, (marker.strip(),))
    context = replace(context, text=f"{context.text}{delimiter}")
    return ItemRequests(item, context, likelihoods, generation, pivot, marker)
