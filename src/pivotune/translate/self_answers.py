"""A model's own greedy answers to the English prompts of rows, which `method: sdrrl` trains on.

Beside `self.jsonl` lie `self.answered.jsonl`, all answers, with their settings in `self.answered.json`, and
`self.report.json`, the rows left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pivotune.data.check import report_path, row_record
from pivotune.data.examples import Encoder
from pivotune.data.formats import read_file, row_name
from pivotune.data.rows import Row
from pivotune.data.sources import Rows
from pivotune.errors import UsageError
from pivotune.text.files import write_json, write_jsonl
from pivotune.training.heldout import end_token_ids, generate_answers
from pivotune.translate.run import english_record
from pivotune.translate.steps import StepFile

# Reasons to leave a row out, by their name in the files.
REASONS = {
    "cut_answer": "the answer does not end within the token limit",
    "empty_answer": "the answer is empty",
    "long_prompt": "the prompt leaves no room for an answer in the model's context",
    "refused_prompt": "the model's template refuses the earlier turns or the system message",
}


@dataclass
class Answerer:
    """Answers English prompts, likeliest token by likeliest token.

    Attributes:
        context: tokens that the model reads at once; None without a limit.
    """

    model: Any
    encoder: Encoder
    context: int | None
    max_new_tokens: int
    batch_size: int

    def __call__(self, rows: list[Row]) -> list[dict[str, Any]]:
        """Return a record for each row: its question, the answer, and a key of `REASONS` if it is left out."""
        records, prompts = [question(row) for row in rows], {}
        for place, row in enumerate(rows):
            turn = row.sides[1]
            try:
                ids = self.encoder.encode_prompt(replace(turn, completion=""))
            except UsageError:
                records[place]["left_out"] = "refused_prompt"
                continue
            if self.context is not None and len(ids) + self.max_new_tokens > self.context:
                records[place]["left_out"] = "long_prompt"
            else:
                prompts[place] = np.array(ids)
        tokenizer = self.encoder.tokenizer
        answers = generate_answers(
            self.model,
            tokenizer,
            list(prompts.values()),
            end_ids=end_token_ids(self.model, tokenizer, self.encoder.template),
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        for place, answer in zip(prompts, answers, strict=True):
            records[place]["answer"] = answer.text
            if not (answer.ended and answer.text):
                records[place]["left_out"] = "empty_answer" if answer.ended else "cut_answer"
        return records


def question(row: Row) -> dict[str, Any]:
    """Return the id and the English messages before the answer."""
    turn = row.sides[1]
    return {"id": row.id, "messages": [*turn.history, {"role": "user", "content": turn.user_text}]}


def is_answer_to(record: Mapping[str, Any], row: Row) -> bool:
    """Return True if a record was made from the row's question."""
    return {**record, **question(row)} == record


def write_answered(steps: StepFile, rows: Rows, *, has_target: bool) -> tuple[int, Counter[str]]:
    """Write the rows with their answers, and the report; return the number of rows written and of those left out by reason.

    Args:
        has_target: keep the target side; rows of English alone are written under plain keys.

    Raises:
        UsageError: no row was kept; no file is written then.
    """
    left_out: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for row, (_, record) in zip(rows, read_file(steps.path), strict=False):
            if reason := record.get("left_out"):
                left_out.append({"number": row_name(row.number, rows.sources), "id": row.id, "reasons": [reason]})
                continue
            answered = row_record(replace(row, completion_en=record["answer"]))
            yield answered if has_target else english_record(answered)
        if len(left_out) == len(rows):
            reasons = Counter(REASONS[entry["reasons"][0]] for entry in left_out)
            why = "; ".join(f"{count:,} left out: {reason}" for reason, count in reasons.items())
            raise UsageError(f"{rows.source}: no row was kept ({why}); all answers are in {steps.path}")

    write_jsonl(steps.out, kept())
    written = len(rows) - len(left_out)
    counts = {"source": rows.source, "written": written, "unusable": rows.skipped, "reasons": REASONS}
    write_json(report_path(steps.out), {**counts, "left_out": left_out})
    return written, Counter(entry["reasons"][0] for entry in left_out)
