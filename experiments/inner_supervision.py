"""Inner supervision against plain fine-tuning and its control, over training seeds, by the likelihood of gold answers.

    python -m experiments.inner_supervision run --data DATA --language vi --seeds 0,1,2 --out experiments/results/vi-zh
    python -m experiments.inner_supervision table --out experiments/results/vi-zh

Every arm trains the same rows for the same steps. A cell (arm, seed) is one JSON file under `--out`; the same command
continues an interrupted round. `--data` holds `train/<language>.jsonl.gz` and `eval/xquad`, `eval/mlqa`.

Measured: the negative log-likelihood of gold answers in nats per character, on held-out rows and on questions of XQuAD and
MLQA that training never saw, each in the target language and in English, as the mean over the last `--checkpoints` states
of the model; with `--answered N`, also the token F1 of greedy answers to N questions by the last state. The table has
differences to TFT, paired by question and seed (every arm trains the same rows in the order of its seed), with intervals
over passages and seeds; the questions of one passage are one item.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from pivotune import DeepSupervisionConfig, DeepSupervisionTrainer
from pivotune.compare.significance import Sample, difference
from pivotune.data.datasets import side_examples, split_validation
from pivotune.data.examples import Encoder, Limits, Pair
from pivotune.data.sources import load_rows
from pivotune.data.templates import load_template
from pivotune.evaluation.registry import find_tasks
from pivotune.evaluation.tasks.base import Item, Task
from pivotune.evaluation.tasks.tables import Source
from pivotune.models.loading import load_model, load_tokenizer
from pivotune.results.metrics import Metric
from pivotune.text.files import write_text
from pivotune.training.arguments import bf16_is_native
from pivotune.training.heldout import greedy_answers, score_answers
from pivotune.training.lens_fitting import LENS_FILE

NLL = Metric("nll", "ratio", ("nll", "characters"), higher_is_better=False)
F1 = Metric("f1", "ratio", ("f1", "questions"), scale=100.0)
BASELINE = "tft"
LAYERS = {"conversion": {"layer": 3}, "thinking": {"layer": 20}}
_ET = {"conversion": {"signal": "none"}, "thinking": {"layer": 20}}
_LC = {"conversion": {"layer": 3}, "thinking": {"signal": "none"}}


class Question(NamedTuple):
    """A benchmark's question in both languages, encoded with its first gold answer.

    Attributes:
        passage: a name for its passage.
        sides: language -> the task and its item.
    """

    passage: str
    pair: Pair
    sides: dict[str, tuple[Task, Item]]


def _arm(lens: str, gradient: str, **changes: Any) -> dict[str, Any]:
    return {"supervision": {**LAYERS, "lens": lens, "logits": {"gradient": gradient}, **changes}}


# Name -> arguments of `DeepSupervisionConfig`.
ARMS: dict[str, dict[str, Any]] = {
    "tft": {"method": "tft"},
    "cross-lingual": {"method": "cross-lingual"},
    "logit-all": _arm("logit", "all"),
    "logit-prompt": _arm("logit", "prompt"),
    "tuned-all": _arm("tuned", "all"),
    "tuned-prompt": _arm("tuned", "prompt"),
    "model-prompt": _arm("model", "prompt"),
    "tuned-prompt-et": _arm("tuned", "prompt", **_ET),
    "tuned-prompt-lc": _arm("tuned", "prompt", **_LC),
    "tuned-prompt-balanced": _arm("tuned", "prompt", balance={"mode": "gradient", "every": 10}),
    # Layers of thinking alone, beside 20.
    **{
        f"tuned-prompt-et{layer}": _arm("tuned", "prompt", conversion={"signal": "none"}, thinking={"layer": layer})
        for layer in (8, 14, 24, 28)
    },
    "contrastive": _arm("logit", "all", conversion={"signal": "none"}, thinking={"layer": 15, "signal": "contrastive"}),
    "cka": _arm("logit", "all", conversion={"signal": "none"}, thinking={"layer": 15, "signal": "cka"}),
    "tuned-prompt-11-24": _arm("tuned", "prompt", conversion={"layer": 11}, thinking={"layer": 24}),
    "tuned-prompt-et-both": _arm("tuned", "prompt", **_ET, tuned={"text": "both"}),
    "tuned-prompt-et-branches": _arm("tuned", "prompt", **_ET, tuned={"text": "branches"}),
    "tuned-prompt-weight-1": _arm("tuned", "prompt", conversion={"layer": 3, "weight": 1.0},
                                  thinking={"layer": 20, "weight": 1.0}),
}  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Train and score the cells that are missing, seed by seed, so that an interrupted round can be compared."""
    tokenizer = load_tokenizer(options.model)
    encoder = Encoder(tokenizer, load_template(None, tokenizer), Limits(options.max_tokens, options.max_tokens))
    rows = load_rows(str(options.data / "train" / f"{options.language}.jsonl.gz"), need_english=True)
    pairs = _short(encoder.encode_lazily(rows, on_bad_row="skip", source="rows"), options)
    questions = _questions(options, encoder)
    for seed in options.seeds:
        train, heldout = split_validation(pairs, options.heldout, seed=0)
        scored = {name: asked[: options.questions] for name, asked in questions.items()}
        scored = {"heldout": [Question("", pair, {}) for pair in heldout], **scored}
        for arm in options.arms:
            path = options.out / options.language / f"{arm}-{seed}.json"
            if path.is_file():
                continue
            started = time.time()
            cell = _train(options, arm, seed, list(train), tokenizer, scored, questions)
            cell["seconds"] = round(time.time() - started)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(cell) + "\n")
            print(f"{path.name}: {cell['seconds']} s, {cell['means']}", flush=True)


def _short(pairs: Any, options: argparse.Namespace) -> list[Pair]:
    """Return the first rows whose sequences are short enough for a CPU."""
    found: list[Pair] = []
    for pair in pairs:
        if pair.target and pair.english and len(pair.target.ids) <= options.longest:
            found.append(pair)
        if len(found) == options.rows:
            break
    return found


def _questions(options: argparse.Namespace, encoder: Encoder) -> dict[str, list[Question]]:
    """Return benchmark -> its questions.

    One question of every passage before the second of any, short passages first: questions of one passage say little more.
    """
    sets = {}
    for name in ("xquad", "mlqa"):
        items: dict[str, dict[str, tuple[Task, Item]]] = {}
        for language in (options.language, "en"):
            task = find_tasks([f"{name}_{language}"], [])[0]
            split = None if name == "xquad" else "validation"
            data = task.read(Source(options.data / "eval" / name, split))
            for item in data.items:
                items.setdefault(item.id, {})[language] = task, item
        both = [sides for sides in items.values() if len(sides) == 2]
        both.sort(key=lambda sides: len(sides[options.language][1].query))
        asked: Counter[str] = Counter()
        order = []
        for sides in both:
            order.append(asked[passage := _digest(sides)])
            asked[passage] += 1
        both = [both[i] for i in sorted(range(len(both)), key=order.__getitem__)]
        rows = [
            {"prompt": ours.query, "completion": ours.gold_answer,
             "prompt_en": english.query, "completion_en": english.gold_answer}
            for (_, ours), (_, english) in ((sides[options.language], sides["en"]) for sides in both)
        ][: max(options.questions, options.answered)]  # fmt: skip
        limits = Limits(options.longest_question, options.max_tokens)
        asking = Encoder(encoder.tokenizer, encoder.template, limits)
        encoded = asking.encode_lazily(load_rows(rows, need_english=True), on_bad_row="skip", source=name)
        sets[name] = [Question(_digest(sides := both[pair.number - 1]), pair, sides) for pair in encoded]
    return sets


def _digest(sides: dict[str, tuple[Task, Item]]) -> str:
    """Return a name for a question's passage: results hold no text of the benchmarks."""
    passage = sides["en"][1].query.split("\n\n")[0]
    return hashlib.blake2b(passage.encode(), digest_size=6).hexdigest()


def _train(
    options: argparse.Namespace,
    arm: str,
    seed: int,
    train: list[Pair],
    tokenizer: Any,
    scored: dict[str, list[Question]],
    questions: dict[str, list[Question]],
) -> dict[str, Any]:
    runs = options.out / options.language / "runs"
    folder = runs / f"{arm}-{seed}"
    lenses = [path for path in runs.glob(f"*-{seed}/{LENS_FILE}") if path.parent != folder]
    if lenses and not folder.exists():
        folder.mkdir(parents=True)
        shutil.copyfile(lenses[0], folder / LENS_FILE)  # the run adds the layers that it lacks
    arguments = {
        "output_dir": str(folder), "seed": seed, "max_steps": options.steps, "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.accumulate, "save_strategy": "no", "logging_steps": 10,
        "report_to": "none", "disable_tqdm": True, "bf16": torch.cuda.is_available() or bf16_is_native(),
        "use_cpu": not torch.cuda.is_available(), "data": {"english_ratio": 0.25},
    }  # fmt: skip
    args = DeepSupervisionConfig(**arguments, **ARMS[arm])
    scorer = _Scorer(scored, tokenizer, options, args.bf16)
    model = load_model(options.model, dtype="float32")
    trainer = DeepSupervisionTrainer(model, args, train_dataset=train, processing_class=tokenizer, callbacks=[scorer])
    trainer.train()
    means = {
        name: round(sum(i["nll"] for i in found.values()) / sum(i["characters"] for i in found.values()), 4)
        for name, found in scorer.items.items()
    }
    answers = _answer(options, model, tokenizer, questions, args.bf16)
    for name, found in answers.items():
        asked = sum(i["questions"] for i in found.values())
        means[name] = round(100 * sum(i["f1"] for i in found.values()) / asked, 2)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    # In bfloat16 figures differ by up to 0.01: cells of one table need one precision.
    settings = {**vars(options), "bf16": args.bf16, "arm": ARMS[arm], "seed": seed}
    for name in ("command", "data", "out", "arms", "seeds"):
        del settings[name]
    return {
        "means": means,
        "items": {**scorer.items, **answers},
        "log": logs,
        "settings": json.loads(json.dumps(settings, default=str)),
    }


def _answer(
    options: argparse.Namespace, model: Any, tokenizer: Any, questions: dict[str, list[Question]], autocast: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Return `<benchmark>_<language>_f1` -> passage -> the sum of its questions' F1 and their number."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, asked in questions.items() if options.answered else ():
        asked = asked[: options.answered]
        pairs = [question.pair for question in asked]
        for language in (options.language, "en"):
            examples = side_examples(pairs, "english" if language == "en" else "target")
            texts = greedy_answers(model, tokenizer, examples, max_new_tokens=32, autocast=autocast)
            items = found.setdefault(f"{name}_{language}_f1", {})
            for question, text in zip(asked, texts, strict=True):
                task, item = question.sides[language]
                assert task.score is not None
                passage = items.setdefault(question.passage, {"f1": 0.0, "questions": 0})
                # As `pivotune evaluate`, which stops at the first line break.
                passage["f1"] += round(task.score(text.partition("\n")[0], item)["f1"], 4)
                passage["questions"] += 1
    return found


class _Scorer(TrainerCallback):
    """Add up gold-answer scores of the last states of the model; questions of one passage are one item."""

    def __init__(self, sets: Any, tokenizer: Any, options: argparse.Namespace, autocast: bool) -> None:
        self.sets, self.tokenizer, self.options, self.autocast = sets, tokenizer, options, autocast
        self.items: dict[str, dict[str, dict[str, float]]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        distance = self.options.steps - state.global_step
        if distance % self.options.every or distance // self.options.every >= self.options.checkpoints:
            return
        for name, questions in self.sets.items():
            for side in ("target", "english"):
                examples = side_examples([question.pair for question in questions], side)
                options: Any = {
                    "pad_token_id": self.tokenizer.pad_token_id,
                    "batch_size": 16,
                    "autocast": self.autocast,
                }
                scores = score_answers(model, examples, **options)
                language = self.options.language if side == "target" else "en"
                found = self.items.setdefault(f"{name}_{language}", {})
                for question, score in zip(questions, scores, strict=True):
                    key = question.passage or str(question.pair.number)
                    item = found.setdefault(key, {"nll": 0.0, "characters": 0})
                    item["nll"] += round(score.nll, 3)
                    item["characters"] += score.characters


def table(options: argparse.Namespace) -> None:
    """Print every arm's difference to TFT in nats per character (F1: points), with its interval over passages and seeds."""
    for folder in sorted(path for path in options.out.iterdir() if path.is_dir()):
        cells: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("*.json")):
            cells[path.stem.rpartition("-")[0]].append(json.loads(path.read_text(encoding="utf-8")))
        names = list(next(iter(cells.values()))[0]["means"])
        print(f"\n| {folder.name}: nats per character | seeds | " + " | ".join(names) + " |")
        print("|---" * (len(names) + 2) + "|")
        base = {cell["settings"]["seed"]: cell for cell in cells[BASELINE]}
        values = [f"{sum(c['means'][name] for c in base.values()) / len(base):.4f}" for name in names]
        print(f"| {BASELINE} | {len(base)} | " + " | ".join(values) + " |")
        for arm in (arm for arm in ARMS if arm != BASELINE and arm in cells):
            shared = [cell for cell in cells[arm] if cell["settings"]["seed"] in base]
            for cell in shared:
                _check_settings(arm, cell["settings"], base[cell["settings"]["seed"]]["settings"])
            print(f"| {arm} | {len(shared)} | " + " | ".join(_cell(shared, base, name) for name in names) + " |")


def _check_settings(arm: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in sorted((ours.keys() | theirs.keys()) - {"arm"}):
        if ours.get(name) != theirs.get(name):
            raise SystemExit(
                f"{arm}, seed {ours['seed']}: {name} is {ours.get(name)}, but {theirs.get(name)} in {BASELINE}"
            )


def _cell(cells: Sequence[dict[str, Any]], base: dict[int, dict[str, Any]], name: str) -> str:
    ours = [Sample(cell["items"][name], cell["settings"]["seed"]) for cell in cells]
    theirs = [Sample(base[cell["settings"]["seed"]]["items"][name], cell["settings"]["seed"]) for cell in cells]
    found = difference(F1 if name.endswith("_f1") else NLL, ours, theirs, pair_seeds=True)
    mark = {"better": " **", "worse": " !"}.get(str(found.verdict), "")
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("runs/inner-supervision"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--language", default="vi")
    parser.add_argument("--model", default="bundled:smollm2-135m-instruct")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    numbers = {
        "steps": 80, "batch": 4, "accumulate": 2, "rows": 1500, "heldout": 80, "questions": 60, "checkpoints": 1,
        "every": 10, "longest": 160, "longest_question": 320, "max_tokens": 128, "answered": 0,
    }  # fmt: skip
    for name, default in numbers.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    (run if options.command == "run" else table)(options)


if __name__ == "__main__":
    main()
