"""The explorer's page in headless Chromium: drawing, controls, keyboard; offline, and served."""

from __future__ import annotations

import shutil
import threading

import pytest
from conftest import build_tiny_model, build_tiny_tokenizer

from pivotune.data.examples import Encoder, Limits
from pivotune.data.rows import Row
from pivotune.data.templates import load_template
from pivotune.explore.page import explorer_page
from pivotune.explore.reader import LensReader, ReadModel
from pivotune.explore.server import ExplorerServer
from pivotune.lenses.tuned import TunedLens
from pivotune.models.architecture import find_architecture

sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)

HOSTILE = "</script><script>document.title='hacked'</script>\u202e\x00\u200b\"'<img src=x>"
NAMES = ("one <b>", "two")


@pytest.fixture(scope="module")
def reader() -> LensReader:
    import torch

    models = [ReadModel(name, build_tiny_model(seed=seed)) for seed, name in enumerate(NAMES)]
    lens = TunedLens(find_architecture(models[0].model))
    lens.maps = {k: (0.3 * torch.randn(32, 32), torch.randn(32)) for k in range(4)}
    tokenizer = build_tiny_tokenizer()
    return LensReader(models, Encoder(tokenizer, load_template(None, tokenizer), Limits()), lens, max_new_tokens=4)


@pytest.fixture(scope="module")
def content(reader) -> str:
    rows = (
        Row("Namba ế?", "Ni moja.", "Which?", "One.", number=1),
        Row("ما هي؟", "", "", "", number=2),
        Row(HOSTILE, HOSTILE, "", "", number=3),
    )
    return explorer_page(NAMES, [HOSTILE], [reader.read(row) for row in rows])


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open an address at a width; at the end nothing may have been logged and nothing asked for outside of it."""
    opened = []

    def opening(address: str, width: int = 1600, scheme: str = "light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        faults: list[str] = []
        # Chromium itself logs an answer that refuses a prompt.
        page.on("console", lambda message: "status of 400" in message.text or faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(address) or faults.append(request.url))
        page.goto(address)
        page.wait_for_selector("html[data-explored]")
        opened.append((page, faults))
        return page

    yield opening
    for page, faults in opened:
        page.close()
        assert faults == []


@pytest.fixture
def page(open_page, content, tmp_path):
    path = tmp_path / "lens.html"
    path.write_text(content, encoding="utf-8")
    return open_page(path.as_uri())


def cells(page) -> list[str]:
    return page.locator(".side:first-child table.lens td").all_inner_texts()


def colours(page) -> list[str]:
    return page.eval_on_selector_all(
        "table.lens td", "all => all.map((cell) => getComputedStyle(cell).backgroundColor)"
    )


def test_the_grid_shows_the_likeliest_tokens(page, reader):
    side = reader.read(Row("Namba ế?", "Ni moja.", "", "", number=1))["sides"][0]
    layers, positions = len(side["grids"][0]["tuned"]["likeliest"]) // side["positions"], side["positions"]
    grid = side["grids"][0]["tuned"]["likeliest"]
    expected = [side["texts"][grid[k * positions + n][0]] for k in reversed(range(layers)) for n in range(positions)]
    found = cells(page)
    assert len(found) == len(expected)
    # White space is drawn as signs.
    pairs = zip(found, expected, strict=True)
    drawn = [(a, b.strip()) for a, b in pairs if b.strip() and "\n" not in b and "\t" not in b]
    assert len(drawn) > 30
    assert all(a == b for a, b in drawn)
    assert page.locator("thead th.query", has_text="ế").first.get_attribute("colspan") == "3"


@pytest.mark.parametrize(
    ("name", "value"),
    [("item", "1"), ("model", "1"), ("model", "difference"), ("lens", "logit"),
     ("colour", "entropy"), ("colour", "language"), ("colour", "agreement")],
)  # fmt: skip
def test_every_control_changes_what_is_drawn(page, name, value):
    before = cells(page), colours(page)
    page.focus(f"select[name={name}]")
    page.select_option(f"select[name={name}]", value)
    after = cells(page), colours(page)
    assert before[1] != after[1]
    assert (before[0] == after[0]) == (name == "colour")
    assert page.evaluate("document.activeElement.name") == name


def test_the_difference_can_be_coloured_by_probability(page):
    page.select_option("select[name=model]", "difference")
    before = colours(page)
    page.select_option("select[name=change]", "probability change")
    assert colours(page) != before
    assert page.locator("table.lens td small").count() > 10


def test_the_english_parallel_stands_beside_the_text(page):
    boxes = [side.bounding_box() for side in page.locator(".side").all()]
    assert len(boxes) == 2
    assert boxes[0]["y"] == boxes[1]["y"]
    page.uncheck("input[name=english]")
    assert page.locator(".side").count() == 1


def test_arrows_move_and_enter_opens_the_ten_likeliest(page):
    page.locator("table.lens td").first.focus()
    at = "Number(document.activeElement.dataset.at)"
    start = page.evaluate(at)
    positions = int(page.evaluate("document.querySelector('table.lens tbody tr').cells.length")) - 1
    for key, expected in (("ArrowRight", 1), ("ArrowDown", 1 - positions), ("ArrowLeft", -positions), ("ArrowUp", 0),
                          ("End", positions - 1), ("ArrowRight", positions - 1), ("Home", 0)):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(at) - start == expected, key
    assert page.locator("#cell").inner_text().startswith("Layer 4, after “Namba”")
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] tbody tr").count() == 10
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate(at) == start
    page.locator("table.lens td").nth(3).click()
    assert page.locator("dialog[open] tbody tr").count() == 10


def test_arabic_runs_from_the_right_and_arrows_follow_the_eye(page):
    page.select_option("select[name=item]", "1")
    first, second = (page.locator("table.lens tbody tr").first.locator("td").nth(n).bounding_box() for n in (0, 1))
    assert first["x"] > second["x"]
    page.locator("table.lens td").first.focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getBoundingClientRect().x") == pytest.approx(second["x"], abs=1)


def test_hostile_text_is_text(page):
    page.select_option("select[name=item]", "2")
    shown = "</script><script>document.title='hacked'</script>⟨U+202E⟩⟨U+0000⟩⟨U+200B⟩\"'<img src=x>"
    assert page.title() == "one <b> and two"
    assert page.locator(".texts bdi").all_inner_texts() == [shown, shown]
    assert page.locator("main img").count() == 0
    assert shown in page.locator("main").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_telephone(open_page, content, tmp_path, scheme):
    (tmp_path / "lens.html").write_text(content, encoding="utf-8")
    page = open_page((tmp_path / "lens.html").as_uri(), 380, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_a_served_page_reads_what_is_typed(open_page, reader):
    def read(prompt, english, model):
        return reader.read(Row(prompt, "", english, "", number=1), answered_by=model)

    server = ExplorerServer(explorer_page(NAMES, [], [], served=True), read, num_models=2)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        page = open_page(server.address)
        assert page.locator("table.lens").count() == 0
        page.fill("textarea[name=prompt]", "Namba ế?")
        page.fill("textarea[name=english]", "Which?")
        page.select_option("select[name=model]", "1")
        page.click("#ask button")
        page.wait_for_selector("table.lens")
        assert page.locator("table.lens").count() == 2
        assert page.locator("#read").inner_text().startswith("answer of two")
        page.fill("textarea[name=prompt]", "\u00a0")
        page.click("#ask button")
        page.locator("#state", has_text="the prompt is empty").wait_for()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
