"""XQuAD and MLQA: real files, files in other languages, splits, the Hub's records, and malformed files."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from benchmark_files import read_task, write_file

from pivotune.errors import UsageError
from pivotune.evaluation.tasks import tables
from pivotune.evaluation.tasks.base import Item, TaskData
from pivotune.evaluation.tasks.question_answering import MLQA, XQUAD

PASSAGE = "Der Rhein fließt durch Köln."


def question(identity: Any = "q1", text: Any = "Wo fließt der Rhein?", answers: Any = ("Köln", "durch Köln")) -> dict:
    listed = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": identity, "question": text, "answers": listed}


def squad_file(*questions: Any, context: Any = PASSAGE) -> dict:
    paragraph = {"context": context, "qas": list(questions)}
    return {"version": "1.1", "data": [{"title": "Rhein", "paragraphs": [paragraph]}]}


def score_of_copied_gold(benchmark, language: str, data: TaskData) -> list[float]:
    """Sum each metric's numbers for predictions equal to the first gold answer."""
    (task,) = benchmark.tasks(language)
    scores = [task.score(item.gold_answer, item) for item in data.items]
    return [sum(score[name] for score in scores) for name in ("f1", "exact_match")]


@pytest.mark.parametrize("language", ["vi", "en", "zh", "ar"])
@pytest.mark.parametrize(
    ("benchmark", "counts"),
    [(XQUAD, dict.fromkeys(("vi", "en", "zh", "ar"), 1190)), (MLQA, {"vi": 511, "en": 1148, "zh": 504, "ar": 517})],
)
def test_publishers_files(benchmark, counts, language, shared_data):
    data = read_task(benchmark, language, shared_data / "eval")
    count = counts[language]
    assert len(data.items) == len({item.id for item in data.items}) == count
    assert data.split == "validation"
    assert [name.split("/")[0] for name in data.origin] == [benchmark.name]
    assert data.left_out == {}
    assert score_of_copied_gold(benchmark, language, data) == [count, count]


def test_a_real_question(shared_data):
    raw = json.loads((shared_data / "eval" / "xquad" / "xquad.vi.json").read_text(encoding="utf-8"))
    paragraph = raw["data"][3]["paragraphs"][1]
    asked = paragraph["qas"][2]
    item = next(item for item in read_task(XQUAD, "vi", shared_data / "eval").items if item.id == asked["id"])
    assert item.query == f"Bối cảnh: {paragraph['context']}\n\nCâu hỏi: {asked['question']}\n\nTrả lời:"
    assert item.references == (asked["answers"][0]["text"],)


def test_task():
    (task,) = XQUAD.tasks("vi")
    assert (task.name, task.benchmark, task.language, task.answer_language) == ("xquad_vi", "xquad", "vi", "vi")
    assert (task.kind, task.max_new_tokens) == ("answer", 64)
    assert [metric.name for metric in task.metrics] == ["f1", "exact_match"]
    assert MLQA.tasks("ar")[0].name == "mlqa_ar"
    assert "de" in XQUAD.languages
    assert "ru" not in MLQA.languages


def test_german_file(tmp_path):
    write_file(tmp_path / "deep" / "xquad.de.json", squad_file(question(), question("q2", answers=["der Rhein"])))
    data = read_task(XQUAD, "de", tmp_path)
    expected = f"Kontext: {PASSAGE}\n\nFrage: Wo fließt der Rhein?\n\nAntwort:"
    assert data.items == [
        Item("q1", expected, references=("Köln", "durch Köln"), cuttable=(9, 9 + len(PASSAGE))),
        Item("q2", expected, references=("der Rhein",), cuttable=(9, 9 + len(PASSAGE))),
    ]
    (task,) = XQUAD.tasks("de")
    # rhein (1 token, "der" is an article) against am rhein (2), 1 common: 2 / 3
    assert task.score("am Rhein", data.items[1]) == {"f1": pytest.approx(2 / 3), "exact_match": 0.0}
    assert task.score("Durch Köln!", data.items[0]) == {"f1": 1.0, "exact_match": 1.0}
    assert task.score("", data.items[0]) == {"f1": 0.0, "exact_match": 0.0}


def test_a_language_that_is_not_published_is_read_with_english_labels(tmp_path):
    write_file(tmp_path / "xquad.sw.json", squad_file(question()))
    assert read_task(XQUAD, "sw", tmp_path).items[0].query.startswith("Context: Der Rhein")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_gzip_byte_order_mark_indentation_and_whole_number_ids(tmp_path, encoding):
    content = json.dumps(squad_file(question(7, answers=[" Köln\n", "Köln"])), indent=2, ensure_ascii=False)
    (tmp_path / "xquad.de.json.gz").write_bytes(gzip.compress(content.encode(encoding)))
    (item,) = read_task(XQUAD, "de", tmp_path).items
    assert item.id == "7"
    assert item.references == ("Köln",)


def test_mlqa_reads_the_test_split_unless_another_is_asked_for_or_there_is_none(tmp_path):
    write_file(tmp_path / "dev" / "dev-context-de-question-de.json", squad_file(question("from dev")))
    write_file(tmp_path / "test" / "test-context-de-question-en.json", squad_file(question("of another pair")))
    assert read_task(MLQA, "de", tmp_path).split == "validation"
    with pytest.raises(UsageError, match=r"mlqa_de: no test-context-de-question-de\.json below"):
        read_task(MLQA, "de", tmp_path, "test")
    write_file(tmp_path / "test" / "test-context-de-question-de.json", squad_file(question("from test")))
    for split, identity, name in [
        (None, "from test", "test"),
        ("test", "from test", "test"),
        ("validation", "from dev", "validation"),
    ]:
        data = read_task(MLQA, "de", tmp_path, split)
        assert ([item.id for item in data.items], data.split) == ([identity], name)


def test_a_split_that_the_set_has_not(tmp_path):
    with pytest.raises(UsageError, match="xquad_de: has no split 'test'; allowed: validation"):
        read_task(XQUAD, "de", tmp_path, "test")
    with pytest.raises(UsageError, match="mlqa_de: has no split 'train'; allowed: test, validation"):
        read_task(MLQA, "de", tmp_path, "train")


def test_a_set_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"xquad_de: no xquad\.de\.json below .* get it from https://"):
        read_task(XQUAD, "de", tmp_path)
    with pytest.raises(UsageError, match=r"no test-context-de-question-de\.json or dev-context-de-question-de\.json"):
        read_task(MLQA, "de", tmp_path)


def test_two_files_of_one_name(tmp_path):
    for folder in "ab":
        write_file(tmp_path / folder / "xquad.de.json", squad_file(question()))
    with pytest.raises(UsageError, match=r"a.xquad\.de\.json and .*b.xquad\.de\.json are both"):
        read_task(XQUAD, "de", tmp_path)


FIRST = "article 1, paragraph 1, question 1"
MALFORMED = [
    ("{", "line 1, column 2: broken JSON"),
    ("", "the file is empty"),
    ({"version": "1.1"}, "holds no list of rows"),
    ({"data": ["x"]}, "article 1: found text, where an object with 'paragraphs' is needed"),
    ({"data": [{"title": "x"}]}, "article 1: no 'paragraphs'; found 'title'"),
    ({"data": [{}]}, "article 1: no 'paragraphs'; found nothing"),
    ({"data": [{"paragraphs": {}}]}, "article 1: 'paragraphs' is an object; a list is needed"),
    ({"data": [{"paragraphs": [{"qas": []}]}]}, "article 1, paragraph 1: no 'context'; found 'qas'"),
    ({"data": [{"paragraphs": [{"context": PASSAGE}]}]}, "article 1, paragraph 1: no 'qas'; found 'context'"),
    (squad_file(question(), context=" "), "article 1, paragraph 1: 'context' is empty"),
    (squad_file(3), f"{FIRST}: found a number, where an object with 'id' is needed"),
    (squad_file({"question": "?"}), f"{FIRST}: no 'id'; found 'question'"),
    (squad_file(question(identity=True)), f"{FIRST}: 'id' is a truth value; text is needed"),
    (squad_file(question(text=None)), f"{FIRST} (id q1): 'question' is null; text is needed"),
    (squad_file(question(text="half \ud83d")), f"{FIRST} (id q1): 'question' holds half of a surrogate pair"),
    (squad_file({"id": "q1", "question": "?"}), f"{FIRST} (id q1): no 'answers'; found 'id', 'question'"),
    (squad_file({**question(), "answers": {}}), f"{FIRST} (id q1): 'answers' is an object; a list is needed"),
    (squad_file(question(answers=[])), f"{FIRST} (id q1): 'answers' is empty; at least one gold answer is needed"),
    (squad_file(question(answers=["a", 5])), f"{FIRST} (id q1), answer 2: 'text' is a number; text is needed"),
    (squad_file({**question(), "answers": ["a"]}), f"{FIRST} (id q1), answer 1: found text, where an object"),
    (squad_file(question(answers=[" "])), f"{FIRST} (id q1), answer 1: 'text' is empty"),
]


@pytest.mark.parametrize(("content", "message"), MALFORMED)
def test_malformed_files(tmp_path, content, message):
    # ASCII, so that half of a surrogate pair can be written as JSON spells it.
    path = write_file(tmp_path / "xquad.de.json", content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError) as caught:
        read_task(XQUAD, "de", tmp_path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [{"data": []}, squad_file()])
def test_a_file_without_questions(tmp_path, content):
    write_file(tmp_path / "deep" / "xquad.de.json", content)
    with pytest.raises(UsageError, match=r"xquad_de: no questions in deep/xquad\.de\.json$"):
        read_task(XQUAD, "de", tmp_path)


def test_an_id_that_stands_twice(tmp_path):
    write_file(tmp_path / "xquad.de.json", squad_file(question("q1"), question("q2"), question("q1")))
    with pytest.raises(UsageError, match=r"question 3 \(id q1\): the id 'q1' is that of .* question 1 \(id q1\) too"):
        read_task(XQUAD, "de", tmp_path)


def hub_record(**changes: Any) -> dict:
    answers = {"text": ["Köln"], "answer_start": [23]}
    return {"id": "h1", "context": PASSAGE, "question": "Wo?", "answers": answers, **changes}


@pytest.fixture
def hub(monkeypatch):
    """A Hub with `records` in every set; `asked` has the arguments of the last load."""

    class Hub:
        records = (hub_record(),)
        asked: tuple = ()

        def read(self, *asked):
            self.asked = asked
            return enumerate(self.records, start=1)

    fake = Hub()
    monkeypatch.setattr(tables, "read_hub_records", fake.read)
    return fake


@pytest.mark.parametrize(
    ("benchmark", "split", "asked"),
    [
        (XQUAD, None, ("xquad_de", "google/xquad", "xquad.de", "validation")),
        (MLQA, None, ("mlqa_de", "facebook/mlqa", "mlqa.de.de", "test")),
        (MLQA, "validation", ("mlqa_de", "facebook/mlqa", "mlqa.de.de", "validation")),
    ],
)
def test_hub(hub, tmp_path, benchmark, split, asked):
    data = read_task(benchmark, "de", None, split)
    assert hub.asked == asked
    assert (data.split, data.origin) == (asked[3], [f"{asked[1]}/{asked[2]}"])
    write_file(tmp_path / "xquad.de.json", squad_file(question("h1", "Wo?", ["Köln"])))
    assert data.items == read_task(XQUAD, "de", tmp_path).items


def test_hub_has_only_the_published_languages(hub):
    with pytest.raises(UsageError, match=r"mlqa_ru: the Hub has this set in ar, de, .*--data-dir"):
        read_task(MLQA, "ru", None)
    assert hub.asked == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": {"text": []}}, "'answers' is empty"),
        ({"answers": "a"}, "'answers' is text; a list is needed"),
        ({"context": None}, "'context' is null"),
    ],
)
def test_malformed_hub_records(hub, changes, message):
    hub.records = (hub_record(), hub_record(id="h2", **changes))
    with pytest.raises(UsageError, match=rf"^google/xquad/xquad\.de, row 2.*{message}"):
        read_task(XQUAD, "de", None)
