"""How an evaluation is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Options of `pivotune evaluate`.

    Attributes:
        data_dir: folder with publishers' files; None reads the Hub.
        split: split of all sets; None for the one each set is usually reported on.
        limit: items of each task; None for all.
        seed: draws the `limit` items at random; None takes the first ones, as lm-evaluation-harness does.
        batch_size: requests at once.
        template: `chat`, `alpaca`, a Jinja file, `none` for plain text, or None for the run's own.
        backend: `hf` or `vllm`.
        dtype: of the weights: `auto`, `float32` or `bfloat16`.
        cache: folder for answers, so that an interrupted evaluation goes on; None keeps none.
        pairs: the user's own parallel text, and its English side where that is a file of its own.
        comet: COMET checkpoint; None looks for the usual one on this machine.
        max_new_tokens: longest answer; None for each task's own.
        skip_missing: leave out sets whose data is not there, and say so, instead of stopping.
        trust_remote_code: let the model's own code run.
        revision: branch, tag or commit of a Hub model.
    """

    data_dir: Path | None = None
    split: str | None = None
    limit: int | None = None
    seed: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    template: str | None = None
    backend: str = "hf"
    dtype: str = "auto"
    cache: Path | None = None
    pairs: tuple[Path, Path | None] | None = None
    comet: str | None = None
    max_new_tokens: int | None = None
    skip_missing: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
