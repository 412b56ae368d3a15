"""The page shell: one file that asks for nothing, and shows hostile text as text."""

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from pivotune.report.page import (
    Figure,
    Lines,
    Preformatted,
    Section,
    Table,
    Text,
    anchor,
    html,
    packed,
    render_page,
    shown,
)

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&javascript:\x00\u202eevil\u200b\ud800"
SHOWN = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&javascript:⟨U+0000⟩⟨U+202E⟩evil⟨U+200B⟩⟨U+D800⟩"
)


class _Elements(HTMLParser):
    """Collect start tags with their attributes, and the text of everything but scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not self.tags or self.tags[-1][0] not in ("script", "style"):
            self.text += data


def _unpacked(text: str):
    return json.loads(gzip.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def page() -> str:
    blocks = [
        Text(HOSTILE, "lead"),
        Lines([HOSTILE]),
        Preformatted(HOSTILE, HOSTILE),
        Table([HOSTILE], [[HOSTILE, 1.5, None]], HOSTILE),
        html("<p class='x'>{}</p>", HOSTILE),
        Figure("chart", {"title": HOSTILE}, HOSTILE, Table(["a"], [[HOSTILE]], HOSTILE, folded=True)),
    ]
    return render_page(HOSTILE, [Section("Sample answers", blocks, {"own": [HOSTILE]})], subtitle=HOSTILE)


def test_hostile_text_is_shown_as_text_in_every_block(page):
    found = _Elements(page)
    assert not [tag for tag, _ in found.tags if tag == "img"]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
    # Title twice, subtitle, text, list, preformatted, the table's caption, head and cell, the page's own HTML, the figure's
    # title and caption; its table's summary, caption and cell.
    assert found.text.count(SHOWN) == 15
    assert not re.search("[\x00\u202e\u200b\ud800]", page)


def test_data_and_figures_hold_the_text_as_it_is_shown(page):
    by_id = dict(re.findall(r'class="data" id="([^"]+)">([^<]*)</script>', page))
    assert _unpacked(by_id["own"]) == [SHOWN]
    assert _unpacked(by_id["chart-spec"]) == {"title": SHOWN}


def test_the_policy_allows_exactly_the_scripts_and_styles_in_the_file(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    allowed = set(re.findall("&#39;(sha256-[^&]+)&#39;", policy[1]))
    inline = re.findall(r"<script>(.*?)</script>|<style>(.*?)</style>", page, flags=re.DOTALL)
    contents = [(script or style).encode() for script, style in inline]
    digests = {"sha256-" + base64.b64encode(hashlib.sha256(content).digest()).decode() for content in contents}
    assert allowed == digests
    assert len(digests) == 3  # page.css, Vega, page.js
    assert "default-src &#39;none&#39;" in policy[1]
    assert "unsafe" not in policy[1]


def test_the_page_names_nothing_outside_of_the_file(page):
    for tag, attributes in _Elements(page).tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)


def test_a_page_without_figures_has_no_vega():
    assert len(render_page("Title", [Section("One", [Text("text")])])) < 30_000


def test_headings_are_in_order_and_the_contents_lead_to_the_sections():
    page = render_page("Title", [Section("First part", []), Section("Second: part", [])])
    assert re.findall("<h([1-6])", page) == ["1", "2", "2"]
    links, ids = re.findall('<li><a href="#([^"]+)"', page), re.findall('<section id="([^"]+)"', page)
    assert links == ids == ["first-part", "second-part"] == [anchor("First part"), anchor("Second: part")]


def test_letters_that_scripts_need_are_kept():
    arabic = "\u061cمی‌خواهم\u200f ‍क्‍ष"
    assert shown(arabic) == arabic


def test_packed_data_is_the_same_each_time_and_has_no_numbers_that_json_lacks():
    assert packed({"a": float("nan")}) == packed({"a": None})
    assert _unpacked(packed({"a\x00": ["\u2028"]})) == {"a⟨U+0000⟩": ["⟨U+2028⟩"]}
