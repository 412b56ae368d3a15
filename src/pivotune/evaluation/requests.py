"""What a model is asked, and its answers: plain data that can be hashed, kept on disk and asked again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely `continuation` is after `context`."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Generation:
    """The greedy answer to `context`, up to a stop string or the end token."""

    context: str
    max_new_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Something measured in a model as a whole (alignment by layer), kept as JSON text."""

    name: str
    content_hash: str


# What a language model answers; a measurement looks inside it.
Question = Likelihood | Generation
Request = Question | Measurement


@dataclass(frozen=True, slots=True)
class LogProbability:
    """Sum of the continuation's log-probabilities in nats, and how many tokens it has."""

    logprob: float
    tokens: int


# An answer to a `Likelihood` or a `Generation`.
Answer = LogProbability | str


def request_key(request: Request) -> str:
    """The same for the same request, in every process."""
    content = [type(request).__name__, asdict(request)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:32]


def answer_to_json(answer: Answer) -> Any:
    return answer if isinstance(answer, str) else [answer.logprob, answer.tokens]


def answer_from_json(content: Any) -> Answer:
    """Raises TypeError or ValueError where `content` is not what `answer_to_json` wrote."""
    if isinstance(content, str):
        return content
    logprob, tokens = content
    return LogProbability(float(logprob), int(tokens))
