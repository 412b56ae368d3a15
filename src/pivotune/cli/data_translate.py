"""`pivotune data translate` and `data self-answers`: parallel rows from English ones, and a model's own answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pivotune.cli.common import check_inputs, own_options, progress, quiet_libraries, safe, stderr, stdout
from pivotune.cli.data_check import print_check
from pivotune.errors import UsageError
from pivotune.text.words import counted

if TYPE_CHECKING:
    from pivotune.data.sources import Rows
    from pivotune.translate.steps import StepFile


def translate(
    data: Annotated[str, typer.Argument(help="English rows: a file or Hub dataset, in any form of a row.")],
    language: Annotated[str, typer.Option("--to", help="Code of the language to translate into: vi, zh, pt_BR...")],
    model: Annotated[
        str, typer.Option(help="NLLB, MADLAD-400, M2M100, mBART-50, Marian or a chat model; or the endpoint's model.")
    ],
    out: Annotated[Path, typer.Option(help="File of the parallel rows (.jsonl); the same command continues it.")],
    endpoint: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server: http://localhost:8000/v1; key in OPENAI_API_KEY.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time, with --endpoint.")] = 8,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model: refs/pr/N.")] = None,
    engine: Annotated[str, typer.Option(help="Of a local chat model: hf (Transformers) or vllm.")] = "hf",
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a CTranslate2 model: folder or Hub name; default: the model's folder.")
    ] = None,
    back_translation: Annotated[
        str | None, typer.Option(help="Model that translates back into English; chrF++ against the English text.")
    ] = None,
    min_chrf: Annotated[
        float | None, typer.Option(min=0, max=100, help="Leave out rows below; default: 30.", show_default=False)
    ] = None,
    similarity: Annotated[
        str | None, typer.Option(help="Multilingual sentence encoder; cosine of both sides of a row.")
    ] = None,
    min_similarity: Annotated[
        float | None, typer.Option(min=-1, max=1, help="Leave out rows below; default: 0.7.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Translate only the first usable rows.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Rows to show for each kind of problem.")] = 3,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Keep the rows with a defect in the file.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew.")] = False,
) -> None:
    """Translate English instruction rows; code, links and line breaks stay, and rows with a defect are left out."""
    from pivotune.data.check import check_clean_path, report_path
    from pivotune.text.languages import find_language
    from pivotune.translate import run
    from pivotune.translate.chat import EndpointTranslator, check_endpoint, check_engine
    from pivotune.translate.filters import RowFilter, back_translation_filter, similarity_filter
    from pivotune.translate.steps import StepFile
    from pivotune.translate.translators import prepare_translator

    target = find_language(language)
    if target.code == "en":
        raise UsageError("--to: en is the language of the rows; name the target language")
    scores = out.with_suffix(".scores.jsonl")
    settings = {"source": data, "model": model, "revision": revision, "language": target.flores}
    steps = StepFile(out, "translated", settings, (scores,))
    for path in (out, steps.path, scores):
        check_clean_path(path, data, option="--out")
    check_engine(engine)
    if min_chrf is not None and back_translation is None:
        raise UsageError("--min-chrf: needs --back-translation")
    if min_similarity is not None and similarity is None:
        raise UsageError("--min-similarity: needs --similarity")
    local = {"revision": revision, "tokenizer": tokenizer, "engine": engine}
    if endpoint is not None:
        check_endpoint(endpoint)
        for option, given in (("--revision", revision), ("--tokenizer", tokenizer), ("--engine", engine != "hf")):
            if given:
                raise UsageError(f"{option}: is for a local model; leave it out with --endpoint")
    rows = run.read_english(data, limit)
    done = 0 if overwrite else steps.count_done(rows, run.is_translation_of)
    if endpoint is None or back_translation or similarity:
        quiet_libraries()
    # All mistakes are found before the first row is translated.
    prepared: Any = None
    if endpoint is not None:
        prepared = partial(EndpointTranslator, endpoint, model, target, parallel)
    elif done < len(rows):
        prepared = prepare_translator(model, language, **local)
    filters: list[RowFilter] = []
    if back_translation is not None:
        of_model = {**local, "engine": "hf"} if back_translation == model and endpoint is None else {}
        back = prepare_translator(back_translation, "en", language, **of_model)
        filters.append(back_translation_filter(back_translation, back, 30 if min_chrf is None else min_chrf))
    if similarity is not None:
        filters.append(similarity_filter(similarity, 0.7 if min_similarity is None else min_similarity))
    translator: Any = None
    if done < len(rows):
        with stderr.status(f"Loading {safe(model)}"):
            translator = prepared()
    steps.begin(overwrite=overwrite)
    if done < len(rows):
        with progress("Translating rows", len(rows)) as advance:
            run.translate_rows(steps, rows, done, translator, translator.rows_per_step, advance)
    del translator  # its memory is for the filters' models
    pairs = run.translated_rows(steps, rows)
    for each in filters:
        with progress(f"Scoring {each.name}", len(rows)) as advance:
            each.score(scores, pairs, advance)
    found, written = run.write_result(out, pairs, target.code, keep_all=keep_all, examples=show, filters=filters)
    print_check(stdout, found)
    _print_rows_done(steps, rows, done)
    others = f"the {'flagged ones' if keep_all else 'others'} and why in {report_path(out)}"
    stdout.print(f"[bold]written[/]  {safe(f'{counted(written)} in {out}; {others}')}", soft_wrap=True)
    if not written:
        raise UsageError(
            f"{found.source}: every row has a defect; {report_path(out)} says which, --keep-all writes them"
        )


def self_answers(
    data: Annotated[str, typer.Argument(help="English or parallel rows: a file or Hub dataset, in any form of a row.")],
    model: Annotated[str, typer.Option(help="Model that answers: Hub name, folder, run folder or bundled model.")],
    out: Annotated[Path, typer.Option(help="File of the rows (.jsonl); the same command continues it.")],
    template: Annotated[str | None, typer.Option(help="chat, alpaca or a Jinja file; default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Answers that are longer are left out.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first usable rows.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew.")] = False,
) -> None:
    """Replace the English answers by the model's own greedy ones, for `method: sdrrl`; cut or empty ones are left out."""
    from pivotune.data.check import check_clean_path, report_path
    from pivotune.translate.steps import StepFile

    settings = {"source": data, "model": model, "template": template, "max_new_tokens": max_new_tokens}
    steps = StepFile(out, "answered", settings)
    for path in (out, steps.path):
        check_clean_path(path, data, option="--out")
    check_inputs([model], [data])
    from pivotune.cli.chat import prepare_encoder
    from pivotune.models.loading import load_on_device, read_config
    from pivotune.training.preparation import context_length
    from pivotune.translate import self_answers as answers
    from pivotune.translate.run import load_english

    quiet_libraries()
    with own_options():
        encoder = prepare_encoder(model, template, None)
    context = context_length(read_config(model))
    if context is not None and max_new_tokens >= context:
        raise UsageError(f"--max-new-tokens: {max_new_tokens} found; the model reads {context} tokens, prompt included")
    rows = load_english(data, limit, "data self-answers")
    has_target = any(row.prompt for row in rows)
    done = 0 if overwrite else steps.count_done(rows, answers.is_answer_to)
    with stderr.status(f"Loading {safe(model)}"):
        loaded = load_on_device(model) if done < len(rows) else None
    steps.begin(overwrite=overwrite)
    if loaded is not None:
        answerer = answers.Answerer(loaded, encoder, context, max_new_tokens, batch_size)
        with progress("Answering rows", len(rows)) as advance:
            steps.append(rows, done, answerer, 4 * batch_size, advance)
    written, left_out = answers.write_answered(steps, rows, has_target=has_target)
    for reason, count in (*rows.skipped.items(), *((answers.REASONS[name], left_out[name]) for name in left_out)):
        stdout.print(f"left out: {counted(count)}: {safe(reason)}", soft_wrap=True)
    for note in rows.notes:
        stdout.print(f"[bold yellow]note[/]     {safe(note)}", soft_wrap=True)
    if has_target:
        note = "the target answers are kept, and are no translations of these: train with sdrrl.translation: 0"
        stdout.print(f"[bold yellow]note[/]     {note}", soft_wrap=True)
    _print_rows_done(steps, rows, done)
    line = f"{counted(written)} in {out}; the others and why in {report_path(out)}"
    stdout.print(f"[bold]written[/]  {safe(line)}", soft_wrap=True)


def _print_rows_done(steps: StepFile, rows: Rows, earlier: int) -> None:
    """Print the number of rows that have their record in the file of the steps."""
    note = f", {earlier:,} of them earlier" if earlier else ""
    stdout.print(f"[bold]rows[/]     {len(rows):,} {steps.made}{note}: {safe(steps.path)}", soft_wrap=True)
