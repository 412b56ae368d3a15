"""Parallel text in a language and English, its translation in both directions, and its alignment by layer.

Sets: FLORES-200 (NLLB team 2022; devtest, as usual), NTREX-128 (Federmann et al. 2022), Tatoeba (Artetxe and Schwenk
2019) and the user's own pairs. Text files hold one sentence a line, and line n of both files belongs together. Pairs
with two empty lines are left out and counted. An empty line on one side only is refused: it usually shifts every
following line. Translations are measured by chrF++ and BLEU, and by COMET (the paper's metric) if it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from pivotune.data.formats import describe_file_types, is_data_file_name, read_lines
from pivotune.data.sources import load_rows
from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import Benchmark, Item, Task, TaskData
from pivotune.evaluation.tasks.tables import MissingDataError, Source, Split
from pivotune.results.corpus_metrics import bleu_statistics, chrf_from_statistics, chrf_statistics
from pivotune.results.metrics import Metric
from pivotune.text.languages import Language, find_language, flores_languages

TRANSLATION_METRICS = (Metric("chrf++", "chrf", ("chrf_stats",)), Metric("bleu", "bleu", ("bleu_stats",)))
# Means over the layers 1..L.
ALIGNMENT_METRICS = (
    Metric("retrieval_accuracy", "mean", ("retrieval",), scale=100.0),
    Metric("centered_retrieval_accuracy", "mean", ("centered_retrieval",), scale=100.0),
    Metric("cosine", "mean", ("cosine",)),
)
ALIGNMENT = "alignment"
# A sentence of FLORES has 40 tokens in English and up to five times that in a script unknown to the tokenizer.
_MAX_NEW_TOKENS = 256

# FLORES+ renamed some languages of FLORES-200.
_FLORES_PLUS = {"zho_Hans": "cmn_Hans", "zho_Hant": "cmn_Hant", "tgl_Latn": "fil_Latn", "tzm_Tfng": "zgh_Tfng"}
_FLORES_HOMEPAGE = "https://github.com/facebookresearch/flores/tree/main/flores200"
_NTREX_HOMEPAGE = "https://github.com/MicrosoftTranslator/NTREX"
_TATOEBA_HOMEPAGE = "https://github.com/facebookresearch/LASER/tree/main/data/tatoeba/v1"
# The languages of XTREME's Tatoeba (Hu et al., ICML 2020), by the names of its configurations.
_XTREME_CODES = (
    "afr", "ara", "ben", "bul", "cmn", "deu", "ell", "est", "eus", "fin", "fra", "heb",
    "hin", "hun", "ind", "ita", "jav", "jpn", "kat", "kaz", "kor", "mal", "mar", "nld",
    "pes", "por", "rus", "spa", "swh", "tam", "tel", "tgl", "tha", "tur", "urd", "vie",
)  # fmt: skip


class SentencePair(NamedTuple):
    """One sentence in the target language and in English; the id is equal in every run."""

    id: str
    target: str
    english: str


def read_parallel(set_name: str, task: str, source: Source, language: str) -> TaskData:
    """Read the sentence pairs of one set (a key of `PARALLEL_READERS`) in a language and English.

    Raises:
        MissingDataError: the set is absent from the source.
    """
    return PARALLEL_READERS[set_name](task, source, find_language(language))


def _read_flores(task: str, source: Source, language: Language) -> TaskData:
    codes = [_FLORES_PLUS.get(code, code) for code in (language.flores, "eng_Latn")]
    splits = [
        Split(
            name,
            [f"{language.flores}.{name}", f"{name}/{codes[0]}.jsonl"],
            [alias],
            files=f"{language.flores}.{name} with eng_Latn.{name} (FLORES+: {name}/{codes[0]}.jsonl with eng_Latn.jsonl)",
        )
        for name, alias in (("devtest", "test"), ("dev", "validation"))
    ]
    if source.data_dir is not None:

        def english_name(target: Path) -> str:
            of_plus = target.suffix == ".jsonl"
            return f"{target.parent.name}/eng_Latn.jsonl" if of_plus else f"eng_Latn{target.suffix}"

        return _read_files(task, source, splits, _FLORES_HOMEPAGE, english_name)
    split, _ = tables.choose_split(task, source, splits, _FLORES_HOMEPAGE)
    # FLORES+ is FLORES-200 with corrections; the Hub asks for agreement to its terms.
    hubs = [("openlanguagedata/flores_plus", code) for code in codes]
    target, english = (
        [record.text("text") for record in tables.read_hub(task, hub, split.name, {"text": ["text"]})] for hub in hubs
    )
    return _align(target, english, [tables.hub_name(*hub) for hub in hubs], split.name, "row")


def _read_ntrex(task: str, source: Source, language: Language) -> TaskData:
    names, english = [f"newstest2019-ref.{code}.txt" for code in language.ntrex], "newstest2019-src.eng.txt"
    problem = "NTREX-128 is read from the publisher's files"
    try:
        if source.data_dir is not None:
            return _read_files(task, source, [Split("test", names)], _NTREX_HOMEPAGE, lambda target: english)
    except MissingDataError:
        problem = f"no {' or '.join(names)}, with {english} below {source.data_dir}"
    raise MissingDataError(f"{task}: {problem}; get {_NTREX_HOMEPAGE} and give its folder as --data-dir")


def _read_tatoeba(task: str, source: Source, language: Language) -> TaskData:
    if not language.iso639_3:
        raise UsageError(f"{task}: Tatoeba has no code for {language.name}")
    names = [f"tatoeba.{code}-eng.{code}" for code in language.iso639_3]
    files = f"{' or '.join(names)}, with the .eng file beside it"
    splits = [Split("test", names, aliases=["validation"], hub="validation", files=files)]
    if source.data_dir is not None:
        return _read_files(task, source, splits, _TATOEBA_HOMEPAGE, lambda target: f"{target.stem}.eng")
    split, _ = tables.choose_split(task, source, splits, _TATOEBA_HOMEPAGE)
    code = next((code for code in language.iso639_3 if code in _XTREME_CODES), None)
    if code is None:
        has = f"the Hub has this set in {', '.join(TATOEBA.languages)}"
        raise MissingDataError(f"{task}: {has}; another language needs its files and --data-dir")
    # Part of XTREME, which names its only split validation.
    hub = ("google/xtreme", f"tatoeba.{code}")
    columns = {name: [name] for name in ("source_sentence", "target_sentence", "source_lang")}
    pairs = []
    for record in tables.read_hub(task, hub, split.hub_name, columns):
        sides = [record.text("source_sentence"), record.text("target_sentence")]
        pairs.append(sides[::-1] if record.text("source_lang") == "eng" else sides)
    target, english = ([sides[index] for sides in pairs] for index in (0, 1))
    return _align(target, english, [tables.hub_name(*hub)] * 2, split.name, "row")


def _read_own(task: str, source: Source, language: Language) -> TaskData:
    if source.pairs is None:
        raise UsageError(f"{task}: needs the option --pairs FILE (and --english FILE for a separate English side)")
    target, english = source.pairs
    is_data = is_data_file_name(target)
    if english is not None and is_data_file_name(english) != is_data:
        plain, data = (english, target) if is_data else (target, english)
        raise UsageError(f"{task}: {plain} is plain text and {data} is not; give two files of the same form")
    if not is_data:
        if english is None:
            other = f"give the other with --english FILE, or both in one of {describe_file_types()}"
            raise UsageError(f"{target}: holds one side only; {other}")
        return _align_files(target, english, [str(target), str(english)], "all")
    try:
        rows = load_rows(target, english=english, needed_by="parallel text")
    except UsageError as error:
        # Rows cannot be left out here: the message must not name the training option that does so.
        raise UsageError(str(error).split(" (use data.on_bad_row")[0]) from error

    def one_line(text: str) -> str:
        return " ".join(line.strip() for line in text.splitlines() if line.strip())

    ids = [row.id for row in rows]
    if "" in ids or len(set(ids)) < len(ids):
        ids = [str(row.number) for row in rows]
    texts = ((one_line(row.prompt), one_line(row.prompt_en)) for row in rows)
    pairs = [SentencePair(id, *sides) for id, sides in zip(ids, texts, strict=True)]
    return TaskData(pairs, "all", [str(path) for path in (target, english) if path is not None])


def _read_files(
    task: str, source: Source, splits: Sequence[Split], homepage: str, english_name: Callable[[Path], str]
) -> TaskData:
    """Read the first split with both sides; `english_name` names the English file of a target's path without `.gz`."""

    def english_files(target: Path) -> list[Path]:
        return source.find(english_name(target.with_name(target.name.removesuffix(".gz"))))

    split, targets = tables.choose_split(task, source, splits, homepage, lambda path: bool(english_files(path)))
    target = tables.only_file(task, targets)
    english = tables.only_file(task, english_files(target))
    return _align_files(target, english, tables.origin_of(source, (target, english)), split.name)


def _align_files(target: Path, english: Path, names: Sequence[str], split: str) -> TaskData:
    def sentences(path: Path) -> list[str]:
        if is_data_file_name(path):
            return [record.text("text").strip() for record in tables.read_objects(path, {"text": ["text"]})]
        return [line.strip() for line in read_lines(path)]

    return _align(sentences(target), sentences(english), names, split, "line")


def _align(target: Sequence[str], english: Sequence[str], names: Sequence[str], split: str, unit: str) -> TaskData:
    """Join two sides in order; `names` (of both sides) and `unit` are for messages."""
    if len(target) != len(english):
        counts = f"{names[0]} has {len(target)} {unit}s, {names[1]} has {len(english)}"
        raise UsageError(f"{counts}: they are joined in order and must be equally many")
    pairs = []
    for number, sides in enumerate(zip(target, english, strict=True), start=1):
        if all(sides):
            pairs.append(SentencePair(f"{split}-{number}", *sides))
        elif any(sides):
            empty, other = names if not sides[0] else reversed(names)
            allowed = "allowed: a sentence in both, or none in both"
            raise UsageError(f"{empty}, {unit} {number}: is empty, but {other} has a sentence there; {allowed}")
    if not pairs:
        raise UsageError(f"{names[0]}: holds no sentence")
    left_out = {"both sides are empty": len(target) - len(pairs)} if len(pairs) < len(target) else {}
    return TaskData(pairs, split, list(dict.fromkeys(names)), left_out)


PARALLEL_READERS: dict[str, Callable[[str, Source, Language], TaskData]] = {
    "flores": _read_flores,
    "ntrex": _read_ntrex,
    "tatoeba": _read_tatoeba,
    "pairs": _read_own,
}


def _parallel_benchmark(name: str, title: str, homepage: str, languages: Sequence[str] = ()) -> Benchmark:
    """Return translation in both directions; empty `languages` for files of any language."""

    def task(source: str, target: str, language: str) -> Task:
        task_name = f"{name}_{source}-{target}"
        read, score = partial(_read_translation, name, task_name, source, target), partial(score_translation, target)
        known = (task_name, name, language, "translation", TRANSLATION_METRICS, read)
        return Task(*known, answer_language=target, score=score, max_new_tokens=_MAX_NEW_TOKENS)

    def tasks(language: str) -> list[Task]:
        code = _code_beside_english(name, language)
        return [task("en", code, code), task(code, "en", code)]

    # File names are made from a language's codes, so files of any language can be read.
    return Benchmark(name, title, languages, tasks, homepage, open_ended=True)


def _code_beside_english(prefix: str, language: str) -> str:
    """Return the language's code; raise UsageError for an unknown one and for English."""
    code = find_language(language).code
    if code == "en":
        raise UsageError(f"{prefix}_en: English is one side already; name the other language: {prefix}_vi")
    return code


def _read_translation(set_name: str, task: str, source_code: str, target_code: str, source: Source) -> TaskData:
    if find_spec("sacrebleu") is None:
        raise UsageError(f"{task}: chrF++ and BLEU need sacrebleu; install it with: pip install 'pivotune[eval]'")
    into_english = target_code == "en"
    data = read_parallel(set_name, task, source, source_code if into_english else target_code)
    source_name, target_name = (find_language(code).name for code in (source_code, target_code))
    instruction = f"Translate the following sentence from {source_name} into {target_name}.\n"
    items = []
    for pair in data.items:
        sentence, reference = (pair.target, pair.english) if into_english else (pair.english, pair.target)
        cuttable, details = (len(instruction), len(instruction) + len(sentence)), {"source": sentence}
        query = f"{instruction}{sentence}"
        items.append(Item(pair.id, query, (reference,), delimiter="\n", cuttable=cuttable, details=details))
    return replace(data, items=items)


def score_translation(language: str, hypothesis: str, item: Item) -> dict[str, float | list[int]]:
    """Return counts for corpus chrF++ and BLEU (`corpus_metrics`), and the sentence's own chrF++ in 0..100."""
    hypothesis, reference = hypothesis.strip(), item.references[0]
    counts = chrf_statistics(hypothesis, reference)
    bleu = bleu_statistics(hypothesis, reference, language)
    return {"chrf_stats": counts, "bleu_stats": bleu, "chrf": float(chrf_from_statistics(counts))}


FLORES = _parallel_benchmark("flores", "FLORES-200", _FLORES_HOMEPAGE, flores_languages())
NTREX = _parallel_benchmark("ntrex", "NTREX-128", _NTREX_HOMEPAGE)
_TATOEBA_LANGUAGES = [find_language(code).code for code in _XTREME_CODES]
TATOEBA = _parallel_benchmark("tatoeba", "Tatoeba", _TATOEBA_HOMEPAGE, _TATOEBA_LANGUAGES)
PAIRS = _parallel_benchmark("pairs", "own pairs", "the option --pairs")


def alignment_task(set_name: str | None, language: str) -> Task:
    """Return the alignment of a language with English on one set: `alignment_flores_vi`, or `alignment_vi`.

    Args:
        set_name: a key of `PARALLEL_READERS`; None for the user's own pairs if given, else for the first published set
            in the source's folder (FLORES from the Hub).
    """
    code = _code_beside_english(ALIGNMENT, language)
    name = "_".join(part for part in (ALIGNMENT, set_name, code) if part)
    read = partial(_read_alignment, set_name, name, code)
    return Task(name, ALIGNMENT, code, "alignment", ALIGNMENT_METRICS, read)


def _read_alignment(set_name: str | None, task: str, code: str, source: Source) -> TaskData:
    if set_name is not None or source.pairs or source.data_dir is None:
        return read_parallel(set_name or ("pairs" if source.pairs else "flores"), task, source, code)
    published = (FLORES, NTREX, TATOEBA)
    for benchmark in published:
        try:
            return read_parallel(benchmark.name, task, source, code)
        except MissingDataError:
            continue
    titles = ", ".join(benchmark.title for benchmark in published)
    wanted = f"parallel text in {find_language(code).name} ({titles})"
    raise tables.missing_data(task, source, wanted, _FLORES_HOMEPAGE)
