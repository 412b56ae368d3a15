"""The demo: TFT and deep supervision from the same start on the same real facts, measured in both languages."""

from __future__ import annotations

import gc
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pivotune.compare.significance import Sample, difference
from pivotune.config.settings import RunConfig
from pivotune.config.yaml_text import parse_config
from pivotune.data.check import check_rows
from pivotune.data.datasets import spread
from pivotune.data.examples import Pair
from pivotune.data.pair_store import store_pairs
from pivotune.data.sources import load_rows
from pivotune.demo.rows import build_demo_rows, write_demo_rows
from pivotune.errors import UsageError
from pivotune.layers.measure import analyze_layers
from pivotune.models.loading import check_model, load_model
from pivotune.report.runs import DATA_CHECK, LAYERS_AFTER, LAYERS_BEFORE
from pivotune.results.files import read_results, write_results
from pivotune.results.metrics import HELDOUT_NLL, Metric, summarize
from pivotune.runs.execute import RunResult, execute_run
from pivotune.runs.folder import has_trained
from pivotune.runs.prepare import PreparedRun, prepare_run
from pivotune.text.files import write_json
from pivotune.training.heldout import greedy_answers
from pivotune.training.preparation import heldout_examples
from pivotune.training.progress import Progress

MODEL = "bundled:smollm2-135m-instruct"
METHODS = ("tft", "deep-supervision")


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Sizes that fit ten minutes on two CPU cores: one epoch of `rows`.

    `heldout` held-out rows get scored gold answers, `answered` of them greedy answers, `profiled` an entropy profile.
    """

    language: str = "vi"
    rows: int = 320
    heldout: int = 64
    answered: int = 24
    profiled: int = 16
    seed: int = 0
    signal: str = "logits"


def run_demo(
    folder: Path,
    settings: DemoSettings,
    *,
    overwrite: bool = False,
    progress: Progress,
    callback: Callable[[str], TrainerCallback],
    on_prepared: Callable[[PreparedRun], None],
) -> dict[str, Any]:
    """Build the data, train both methods, measure all three models; write everything under `folder`.

    Args:
        callback: returns the progress callback of a training run from its title.
        on_prepared: called once with the first prepared run, to print it.

    Returns:
        The content of `results.json`: scores and answers of all models, and the layer analysis of the starting model.

    Raises:
        UsageError: an unsupported language, or a folder with other files or an earlier demo; nothing is written then.
    """
    data = build_demo_rows(settings.language, rows=settings.rows, seed=settings.seed)
    check_model(MODEL)
    if folder.is_file():
        raise UsageError(f"--out: {folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / METHODS[0]).is_dir():
            raise UsageError(f"--out: {folder} is not empty and holds no demo; choose another folder")
        if not overwrite and any(has_trained(folder / method) for method in METHODS):
            raise UsageError(f"--out: {folder} already holds a demo; add --overwrite or choose another folder")
        for name in ("results.json", "base.json", "base.items.jsonl.gz"):
            (folder / name).unlink(missing_ok=True)
    # Made first: it tells an interrupted demo from a folder of the user's own files.
    (folder / METHODS[0]).mkdir(parents=True, exist_ok=True)
    write_demo_rows(data, folder)
    prepared = {}
    for method in METHODS:
        prepared[method] = prepare_run(demo_config(folder, settings, method), overwrite=overwrite)
        heldout = prepared[method].validation
        prepared[method].validation = store_pairs(spread(heldout, settings.heldout), heldout.sources)
    on_prepared(prepared[METHODS[0]])
    results: dict[str, Any] = {"settings": asdict(settings), "cldr_version": data.cldr_version, "models": {}}
    before = None
    for method in METHODS:
        bars = [callback(f"Training {method}")]
        run = execute_run(prepared[method], callbacks=bars, progress=progress, before=before)
        if before is None:
            base = load_model(MODEL, dtype="float32")
            results["models"]["base"] = _measure(base, "base", run, prepared[method], settings, progress)
            del base
        before = run.before
        results["models"][method] = _measure(run.model, method, run, prepared[method], settings, progress)
        results["layers"] = run.layers
        del run
        gc.collect()  # trainer and model refer to each other
    results["difference"] = paired_difference(folder)
    write_json(folder / "results.json", results)
    _write_for_the_report(folder, results)
    return results


def paired_difference(folder: Path) -> dict[str, dict[str, float]]:
    """Return deep supervision minus TFT in nats per token by language, with the 95 % interval over the held-out rows."""
    tft, ours = (read_results(folder / method) for method in METHODS)
    found = {}
    for task in (name for name in ours.tasks if name.startswith("heldout_")):
        paired = difference(HELDOUT_NLL, [Sample(ours.items[task])], [Sample(tft.items[task])])
        language = task.removeprefix("heldout_")
        found[language] = {"value": paired.value, "low": paired.low, "high": paired.high}
    return found


def _write_for_the_report(folder: Path, results: dict[str, Any]) -> None:
    """Write the report's further inputs: data check, entropy before and after training, answers, `base.json`."""
    language, layers = results["settings"]["language"], results["layers"]
    rows = load_rows(str(folder / "train.jsonl"), on_bad_row="skip")
    write_json(folder / METHODS[-1] / DATA_CHECK, check_rows(rows, language=language).to_dict())
    exact = Metric("exact_match", "mean", ("correct",), 100.0)
    tft = read_results(folder / METHODS[0])
    for name, measured in results["models"].items():
        is_base = name == "base"
        run = folder / (METHODS[-1] if is_base else name)
        profiled = {**layers, "model": name, "target": measured["profile"], "lens": "logit"}
        profiled |= {"english": None, "reading": None}
        write_json(run / (LAYERS_BEFORE if is_base else LAYERS_AFTER), profiled)
        tasks: dict[str, Any] = {}
        records: list[dict[str, Any]] = []
        for side, code in (("target", language), ("english", "en")):
            answers = enumerate(measured[side]["answers"])
            own = [{"item": n, **one, "correct": int(exact_match(one["answer"], one["gold"]))} for n, one in answers]
            found = [("facts", exact, own)]
            if is_base:
                scored = tft.items[f"heldout_{code}"].items()
                own = [{"item": item, "nll": one["base_nll"], "tokens": one["tokens"]} for item, one in scored]
                found.append(("heldout", HELDOUT_NLL, own))
            for benchmark, metric, own in found:
                figure = {"metric": metric.name, **summarize(metric, own).to_dict()}
                about = {"benchmark": benchmark, "language": code, "split": "validation"}
                tasks[f"{benchmark}_{code}"] = {**figure, **about, "metrics": {metric.name: figure}}
                records += [{"task": f"{benchmark}_{code}", **record} for record in own]
        write_results(folder / "base.json" if is_base else run, MODEL, None, tasks, records)


def demo_config(folder: Path, settings: DemoSettings, method: str) -> RunConfig:
    """Return the run configuration of one method, as for `pivotune train`."""
    return parse_config(
        {
            "model": MODEL,
            "method": method,
            "data": {
                "train": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "language": settings.language,
                "english_ratio": 0.25,
            },
            "supervision": {
                "thinking": {"signal": settings.signal},
                "profile_rows": settings.profiled,
                # Facts are short: the lens of this many states is nearly that of the default, in half of the time.
                "tuned": {"states": 4000, "steps": 40},
            },
            "training": {
                "num_train_epochs": 1,
                "learning_rate": 2e-4,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.1,
                # Two micro-batches: half of the activations, the same step. Four would take 28 MB less and 1.2 to 1.4
                # times the time, since each of them reads all weights and adds to all gradients.
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 2,
                "per_device_eval_batch_size": 16,
                "save_strategy": "no",
                "logging_steps": 4,
            },
            "output_dir": str(folder / method),
            "seed": settings.seed,
        }
    )


def exact_match(answer: str, gold: str) -> bool:
    """Return True if both are equal after NFC normalization, with white space squeezed and without the final stop."""

    def normalized(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(".。 ")

    return normalized(answer) == normalized(gold)


def _measure(
    model: Any, name: str, run: RunResult, prepared: PreparedRun, settings: DemoSettings, progress: Progress
) -> dict[str, Any]:
    """Return NLL, exact match, greedy answers and layer entropy of one model on the held-out rows."""
    tokenizer = prepared.tokenizer

    def text(ids: Any) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()

    measured: dict[str, Any] = {}
    for side, examples in heldout_examples(prepared.validation).items():
        task = run.results["tasks"][f"heldout_{settings.language if side == 'target' else 'en'}"]
        scores = task["base"] if name == "base" else task
        chosen = spread(examples, settings.answered)
        with progress(f"Answering {side} questions ({name})", settings.answered) as advance:
            options: Any = {"autocast": prepared.args.bf16, "progress": advance}
            texts = greedy_answers(model, tokenizer, chosen, max_new_tokens=32, **options)
        answers = []
        for main, answer in zip((example.main for example in chosen), texts, strict=True):
            question, gold = text(main.ids[slice(*main.query)]), text(main.ids[main.answer :])
            answers.append({"question": question, "gold": gold, "answer": answer})
        measured[side] = {
            "nll": scores["value"],
            "stderr": scores["stderr"],
            "nll_per_character": scores["nll_per_character"],
            "rows": task["n"],
            "exact_match": sum(exact_match(item["answer"], item["gold"]) for item in answers) / len(answers),
            "answered": len(answers),
            "answers": answers,
        }
    pairs = [Pair(pair.target, None) for pair in spread(prepared.validation, settings.profiled)]
    with progress(f"Measuring the layers ({name})", len(pairs)) as advance:
        measured["profile"] = analyze_layers(model, tokenizer, pairs, progress=advance)["target"]
    return measured
