"""Answers on disk, so that an interrupted evaluation goes on where it stopped and finished items are not computed again.

One JSON Lines file for one model in one precision. A line is written when its batch is done; a line that a kill cut
short is skipped when the file is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivotune.errors import UsageError
from pivotune.evaluation.requests import (
    Answer,
    Likelihood,
    LogProbability,
    Request,
    answer_from_json,
    answer_to_json,
    request_key,
)

# Beside the results, unless another folder is asked for.
CACHE_FOLDER = "evaluation-cache"


class AnswerCache:
    """Answers of one model by request.

    Args:
        folder: where the files are; None keeps nothing.
        identity: everything besides the request that an answer depends on (weights, precision, versions).
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"{digest}.jsonl"
        self._answers: dict[str, Answer] = {}
        if self.path is not None:
            self._open(self.path, identity)

    def get(self, request: Request) -> Answer | None:
        answer = self._answers.get(request_key(request))
        # A damaged file may hold the answer to another kind of question.
        return answer if isinstance(answer, LogProbability) == isinstance(request, Likelihood) else None

    def add(self, answers: Mapping[Request, Answer]) -> None:
        """Remember the answers of one batch, all or none of them on disk."""
        keyed = {request_key(request): answer for request, answer in answers.items()}
        self._answers.update(keyed)
        if self.path is None:
            return
        lines = [json.dumps({"request": key, "answer": answer_to_json(answer)}) for key, answer in keyed.items()]
        # One write: a kill between two lines of a batch would change the batches that are computed next time.
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def _open(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                self._read(path)
            else:
                path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--cache: {path} cannot be used ({error.strerror})") from error

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._answers[record["request"]] = answer_from_json(record["answer"])
            except (ValueError, KeyError, TypeError):
                continue  # the first line, or one that was cut short
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
