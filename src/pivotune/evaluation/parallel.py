"""Parallel sentences in a language and English: FLORES-200, NTREX-128, Tatoeba, or the user's own.

Text files hold one sentence a line, and line n of both files belongs together. Where both lines are empty the pair is left
out and counted; an empty line on one side only would shift everything after it by mistake, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pivotune.data.formats import describe_file_types, is_data_file_name, read_lines
from pivotune.data.sources import Row, load_rows
from pivotune.errors import UsageError
from pivotune.evaluation.sources import MissingDataError, Source, hub_name
from pivotune.evaluation.tasks.tables import Split, choose_split, only_file, origin_of, read_hub
from pivotune.text.languages import Language, find_language, flores_languages

_EMPTY_PAIRS = "both sides are empty"
_SKIP_HINT = " (use data.on_bad_row"
_ENGLISH = "eng_Latn"
_FLORES_HUB, _XTREME_HUB = "openlanguagedata/flores_plus", "google/xtreme"
# FLORES+ names some languages otherwise than FLORES-200.
_FLORES_PLUS = {"zho_Hans": "cmn_Hans", "zho_Hant": "cmn_Hant", "tgl_Latn": "fil_Latn", "tzm_Tfng": "zgh_Tfng"}
_FLORES_HOMEPAGE = "https://github.com/facebookresearch/flores/tree/main/flores200"
_NTREX_HOMEPAGE = "https://github.com/MicrosoftTranslator/NTREX"
_NTREX_ENGLISH = "newstest2019-src.eng.txt"
_TATOEBA_HOMEPAGE = "https://github.com/facebookresearch/LASER/tree/main/data/tatoeba/v1"
# The languages of XTREME's Tatoeba (Hu et al., ICML 2020), by the names of its configurations.
_XTREME_CODES = (
    "afr", "ara", "ben", "bul", "cmn", "deu", "ell", "est", "eus", "fin", "fra", "heb",
    "hin", "hun", "ind", "ita", "jav", "jpn", "kat", "kaz", "kor", "mal", "mar", "nld",
    "pes", "por", "rus", "spa", "swh", "tam", "tel", "tgl", "tha", "tur", "urd", "vie",
)  # fmt: skip


class Pair(NamedTuple):
    """One sentence in the target language and in English; the id is the same in every run."""

    id: str
    target: str
    english: str


@dataclass(frozen=True, slots=True)
class ParallelText:
    """What was read.

    Attributes:
        pairs: in the files' order.
        split: the split they are.
        origin: file names, or Hub names: the target side, then the English one where it is apart.
        left_out: how many pairs were left out, by reason.
    """

    pairs: Sequence[Pair]
    split: str
    origin: Sequence[str]
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParallelSet:
    """A published set of parallel text, or the user's own.

    Attributes:
        name: as in task names (`flores`).
        title: for tables and messages.
        homepage: where its files are.
        languages: codes it is published in; empty where files of any language will do.
        read: (task's name, source, language) -> the text; raises `UsageError` in one line, `MissingDataError` where there
            is none.
    """

    name: str
    title: str
    homepage: str
    languages: Sequence[str]
    read: Callable[[str, Source, Language], ParallelText]


def read_parallel(set_name: str, task: str, source: Source, language: str) -> ParallelText:
    """The sentences of one set in a language and English.

    Args:
        set_name: `flores`, `ntrex`, `tatoeba` or `pairs`.
        task: its name, for messages.
        language: any code of `find_language`.

    Raises:
        MissingDataError: there is no such set where the source looks.
        UsageError: malformed files, unknown language or split; one line.
    """
    return PARALLEL_SETS[set_name].read(task, source, find_language(language))


def _read_flores(task: str, source: Source, language: Language) -> ParallelText:
    splits = [_flores_split(language, "devtest", "test"), _flores_split(language, "dev", "validation")]
    if source.data_dir is not None:
        return _published_files(task, source, splits, _FLORES_HOMEPAGE, lambda path: f"{_ENGLISH}.{_endings(path)[-1]}")
    split, _ = choose_split(task, source, splits, _FLORES_HOMEPAGE)
    return _flores_from_hub(task, split.name, language)


def _flores_split(language: Language, name: str, alias: str) -> Split:
    target = f"{language.flores}.{name}"
    return Split(name, [target], aliases=[alias], files=f"{target} with {_ENGLISH}.{name}")


def _flores_from_hub(task: str, split: str, language: Language) -> ParallelText:
    """FLORES+, which is FLORES-200 with corrections; it asks for agreement to its terms on the Hub."""
    codes = (_FLORES_PLUS.get(language.flores, language.flores), _ENGLISH)
    columns = {"text": ["text"]}
    target, english = (
        [record.text("text") for record in read_hub(task, _FLORES_HUB, code, split, columns)] for code in codes
    )
    return _aligned(target, english, [hub_name(_FLORES_HUB, code) for code in codes], split, "rows")


def _read_ntrex(task: str, source: Source, language: Language) -> ParallelText:
    names = [f"newstest2019-ref.{code}.txt" for code in language.ntrex]
    wanted = f"{' or '.join(names)}, with {_NTREX_ENGLISH}"
    there = "NTREX-128 is read from the publisher's files"
    try:
        if source.data_dir is not None:
            splits = [Split("test", names)]
            return _published_files(task, source, splits, _NTREX_HOMEPAGE, lambda path: _NTREX_ENGLISH)
    except MissingDataError:
        there = f"no {wanted} below {source.data_dir}"
    raise MissingDataError(f"{task}: {there}; get {_NTREX_HOMEPAGE} and give its folder as --data-dir")


def _read_tatoeba(task: str, source: Source, language: Language) -> ParallelText:
    if not language.iso639_3:
        raise UsageError(f"{task}: Tatoeba has no code for {language.name}")
    names = [f"tatoeba.{code}-eng.{code}" for code in language.iso639_3]
    files = f"{' or '.join(names)}, with the .eng file beside it"
    splits = [Split("test", names, aliases=["validation"], hub="validation", files=files)]
    if source.data_dir is not None:
        return _published_files(
            task, source, splits, _TATOEBA_HOMEPAGE, lambda path: ".".join([*_endings(path)[:-1], "eng"])
        )
    split, _ = choose_split(task, source, splits, _TATOEBA_HOMEPAGE)
    return _tatoeba_from_hub(task, split, language)


def _tatoeba_from_hub(task: str, split: Split, language: Language) -> ParallelText:
    """As part of XTREME, which calls its only split validation."""
    code = next((code for code in language.iso639_3 if code in _XTREME_CODES), None)
    if code is None:
        raise MissingDataError(
            f"{task}: the Hub has this set in {', '.join(TATOEBA_SET.languages)}; another language needs its files and "
            "--data-dir"
        )
    columns = {name: [name] for name in ("source_sentence", "target_sentence", "source_lang")}
    sides: tuple[list[str], list[str]] = ([], [])
    for record in read_hub(task, _XTREME_HUB, f"tatoeba.{code}", split.hub_name, columns):
        pair = [record.text("source_sentence"), record.text("target_sentence")]
        if record.text("source_lang") == "eng":
            pair.reverse()
        for side, sentence in zip(sides, pair, strict=True):
            side.append(sentence)
    name = hub_name(_XTREME_HUB, f"tatoeba.{code}")
    return _aligned(sides[0], sides[1], [name, name], split.name, "rows")


def _published_files(
    task: str, source: Source, splits: Sequence[Split], homepage: str, english_of: Callable[[Path], str]
) -> ParallelText:
    """The first split of which both sides are there. `english_of`: target file -> name of its English side."""
    split, targets = choose_split(task, source, splits, homepage, lambda path: bool(source.find(english_of(path))))
    target = only_file(task, targets)
    english = only_file(task, source.find(english_of(target)))
    names = origin_of(source, (target, english))
    return _aligned(_read_lines(target), _read_lines(english), names, split.name, "lines")


def _endings(path: Path) -> list[str]:
    """The parts of a file's name, without `gz`."""
    return path.name.removesuffix(".gz").split(".")


def _read_own(task: str, source: Source, language: Language) -> ParallelText:
    if source.pairs is None:
        raise UsageError(f"{task}: needs the option --pairs FILE (and --english FILE, where the English side is apart)")
    target, english = source.pairs
    is_data = is_data_file_name(target)
    if english is not None and is_data_file_name(english) != is_data:
        plain, data = (english, target) if is_data else (target, english)
        raise UsageError(f"{task}: {plain} is plain text and {data} is not; give two files of the same form")
    if is_data:
        return _own_rows(target, english)
    if english is None:
        raise UsageError(
            f"{target}: holds one side only; give the other with --english FILE, or both in one of "
            f"{describe_file_types()}"
        )
    return _aligned(_read_lines(target), _read_lines(english), [str(target), str(english)], "all", "lines")


def _own_rows(target: Path, english: Path | None) -> ParallelText:
    try:
        rows = load_rows(target, english=english, needed_by="parallel text")
    except UsageError as error:
        # Rows cannot be left out here: the message must not name the training option that does so.
        raise UsageError(str(error).split(_SKIP_HINT)[0]) from error
    pairs = [
        Pair(id, _one_line(row.prompt), _one_line(row.prompt_en)) for id, row in zip(_ids(rows), rows, strict=True)
    ]
    return ParallelText(pairs, "all", [str(path) for path in (target, english) if path is not None])


def _ids(rows: Sequence[Row]) -> Iterable[str]:
    """The rows' own ids where each has one of its own, else their numbers."""
    own = {row.id for row in rows}
    return [row.id for row in rows] if len(own) == len(rows) and "" not in own else [str(row.number) for row in rows]


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or gzipped, without their ends and surrounding white space."""
    return [line.strip() for line in read_lines(path)]


def _aligned(
    target: Sequence[str], english: Sequence[str], names: Sequence[str], split: str, unit: str
) -> ParallelText:
    """Two sides joined in order; `names` and `unit` for messages."""
    if len(target) != len(english):
        raise UsageError(
            f"{names[0]} has {len(target)} {unit}, {names[1]} has {len(english)}: they are joined in order and must be "
            "equally many"
        )
    pairs = list(_numbered_pairs(target, english, names, split, unit))
    if not pairs:
        raise UsageError(f"{names[0]}: holds no sentence")
    left_out = {_EMPTY_PAIRS: len(target) - len(pairs)} if len(pairs) < len(target) else {}
    return ParallelText(pairs, split, list(dict.fromkeys(names)), left_out)


def _numbered_pairs(
    target: Sequence[str], english: Sequence[str], names: Sequence[str], split: str, unit: str
) -> Iterator[Pair]:
    for number, sides in enumerate(zip(target, english, strict=True), start=1):
        if all(sides):
            yield Pair(f"{split}-{number}", *sides)
        elif any(sides):
            empty, other = names if not sides[0] else reversed(names)
            raise UsageError(
                f"{empty}, {unit.removesuffix('s')} {number}: is empty, but {other} has a sentence there; allowed: a "
                "sentence in both, or none in both"
            )


FLORES_200 = ParallelSet("flores", "FLORES-200", _FLORES_HOMEPAGE, flores_languages(), _read_flores)
NTREX_128 = ParallelSet("ntrex", "NTREX-128", _NTREX_HOMEPAGE, (), _read_ntrex)
TATOEBA_SET = ParallelSet(
    "tatoeba", "Tatoeba", _TATOEBA_HOMEPAGE, tuple(find_language(code).code for code in _XTREME_CODES), _read_tatoeba
)
OWN_PAIRS = ParallelSet("pairs", "own pairs", "the option --pairs", (), _read_own)
PARALLEL_SETS = {known.name: known for known in (FLORES_200, NTREX_128, TATOEBA_SET, OWN_PAIRS)}
