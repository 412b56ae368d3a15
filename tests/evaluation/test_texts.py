from __future__ import annotations

import json

from pivotune.evaluation.registry import evaluation_texts


def test_labels_and_lines_of_the_prompt_are_no_texts_of_an_item(tmp_path):
    questions = [
        {"id": str(place), "question": f"Câu {place}: ai?", "answers": [{"text": f"Đáp {place}"}]} for place in range(3)
    ]
    article = {"paragraphs": [{"context": "Một đoạn\nhai dòng", "qas": questions}, {"context": "Đoạn khác", "qas": []}]}
    (tmp_path / "xquad.vi.json").write_text(json.dumps({"data": [article]}), encoding="utf-8")
    for code, lines in (("vie", "Xin chào\nTạm biệt\n"), ("eng", "Hello\nBye\n")):
        (tmp_path / f"tatoeba.vie-eng.{code}").write_text(lines, encoding="utf-8")
    found = evaluation_texts(["xquad", "tatoeba_vi-en", "alignment_vi"], ["vi"], tmp_path)
    asked = [[text.strip() for text in texts if text.strip()] for texts in found["xquad_vi"]]
    assert asked[1] == ["Câu 1: ai?", "Đáp 1"]
    assert found["tatoeba_vi-en"] == [["Xin chào", "Hello"], ["Tạm biệt", "Bye"]]
    assert found["alignment_vi"] == found["tatoeba_vi-en"]
