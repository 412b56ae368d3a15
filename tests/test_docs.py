"""Documents name functions and tests: they must exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def _named(pattern: str, text: str) -> list[str]:
    return sorted(set(re.findall(pattern, text)))


@pytest.mark.parametrize("name", _named(r"`(pivotune(?:\.\w+)+)`", METHOD))
def test_every_function_that_the_method_page_names_exists(name):
    module, _, attribute = name.rpartition(".")
    assert callable(getattr(import_module(module), attribute))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    for name in _named(r"`((?:src|tests|docs|recipes|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), f"{document.name} names {name}"
    for name in _named(r"`((?!src|tests|docs|benchmarks|configs|recipes)[a-z_]+/\w+\.py)`", text):
        assert (ROOT / "src" / "pivotune" / name).exists(), f"{document.name} names {name}"


def test_method_page_covers_every_loss():
    for name in (
        "next_token_loss",
        "inner_nll",
        "positional_targets",
        "feature_loss",
        "weighted_total",
        "term_counts",
    ):
        assert re.search(rf"`pivotune\.objectives\.\w+\.{name}`", METHOD), name


def test_documents_name_no_machine_and_no_session():
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md"]:
        text = document.read_text(encoding="utf-8")
        assert not re.search(r"/work/|/tmp/|/root/|\bsession\b", text), document.name
