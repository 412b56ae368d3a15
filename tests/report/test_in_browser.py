"""A report in headless Chromium: nothing is fetched, nothing fails, controls work, and it can be used without a mouse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planted import HOSTILE as CONTROLS
from result_folders import F1, write_run

from pivotune.report.page import shown
from pivotune.report.report import render_report, report_sections
from pivotune.report.runs import read_material
from pivotune.results.metrics import Metric

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

IN_LANGUAGE = Metric("in_language", "mean", ("in_language",), 100.0)
LONG = "x" * 100_000
HOSTILE = f"{CONTROLS}</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'javascript:alert(1)\x00\u200b"
VIEWS = [(width, theme) for width in (380, 1600) for theme in ("light", "dark")]


def answers(shift: int, language: str) -> list[dict[str, Any]]:
    """Return 30 items: a hostile one, an empty one, one of 100,000 letters, one in Arabic and plain ones."""
    special = {0: HOSTILE, 1: "", 2: LONG, 3: "مرحبا بالعالم"}
    return [
        {
            "item": f"q{n:02d}",
            "f1": ((n + shift) % 5) / 5,
            "in_language": int(n % 7 > 0),
            "answer": special.get(n, f"answer {n % (4 + shift)} in {language}"),
            "question": HOSTILE if n == 0 else f"question {n}",
            "gold": f"answer {n}",
        }
        for n in range(30)
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Return a report of runs with layers, training, answers, a sweep and a data check, all named by hostile text."""
    folder = tmp_path_factory.mktemp("runs")
    profile = {"entropy": [3.0, 2.0, 1.5, 1.0], "entropy_stderr": [0.1] * 4, "agreement": [0.0, 0.2, 0.6, 1.0]}
    layers = {"model": HOSTILE, "language": "vi", "num_layers": 3, "conversion": 1, "thinking": 2, "method": "reading"}
    layers |= {"target": profile, "english": profile, "reason": HOSTILE, "reading": None}
    steps = [
        {"step": n, "loss": 3 - n / 10, "tft_loss": 2 - n / 10, "thinking_gradient_share": 0.5} for n in range(1, 9)
    ]
    problem = {"name": "x", "title": HOSTILE, "count": 1, "defect": True, "advice": HOSTILE, "numbers": [1]}
    texts = dict.fromkeys(("prompt", "completion", "prompt_en", "completion_en"), HOSTILE)
    problem["examples"] = [{"number": 1, "note": HOSTILE, **texts}]
    check = {"verdict": HOSTILE, "source": HOSTILE, "total": 10, "usable": 9, "problems": [problem], "lengths": {}}
    for shift, method in enumerate(("tft", "deep-supervision")):
        items = {f"xquad_{language}": answers(shift, language) for language in ("vi", "en")}
        config = {"data": {"train": HOSTILE, "language": "vi"}}
        path = write_run(folder / f"{method}<b>", items, metrics=(F1, IN_LANGUAGE), method=method, config=config)
        (path / "layers.json").write_text(json.dumps(layers))
        (path / "layers-after.json").write_text(json.dumps(layers))
        (path / "data-check.json").write_text(json.dumps(check))
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
        (path / "environment.json").write_text(json.dumps({"python": HOSTILE, "libraries": {}, "command": [HOSTILE]}))
    for name, layer, lens in (("1", 1, HOSTILE), ("2", 2, HOSTILE), ("3", 2, "logit")):
        signals = {term: {"signal": "logits", "layer": layer} for term in ("conversion", "thinking")}
        config = {"data": {"train": HOSTILE, "language": "vi"}, "supervision": {**signals, "lens": lens}}
        config["supervision"]["conversion"]["layer"] = "auto"
        items = {f"xcopa_{HOSTILE}": answers(layer, "vi")}
        path = write_run(folder / f"layer<i>{name}", items, method="deep-supervision", config=config)
        (path / "layers.json").write_text(json.dumps({**layers, "thinking": layer}))
    page = folder / "report.html"
    page.write_text(render_report(report_sections(read_material([folder])), HOSTILE), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, report):
    """Return a function that opens the report; fail at its end for any console error and any request."""
    faults: list[str] = []

    def open_page(width: int = 1600, theme: Any = "light"):
        page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme).new_page()
        page.on(
            "console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url == report.as_uri() else faults.append(request.url))
        page.on("dialog", lambda dialog: (faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
        return page

    yield open_page
    assert faults == []


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_all_is_drawn_and_nothing_leaves_the_screen(opened, width, theme):
    page = opened(width, theme)
    assert page.locator(".chart svg").count() == page.locator("figure[id]").count() >= 6
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in page.locator(".chart").all():
        assert chart.locator("svg").bounding_box()["width"] <= chart.bounding_box()["width"] + 1


def test_hostile_text_is_text(opened):
    page = opened()
    assert page.locator("img, iframe, object").count() == 0
    assert f"lens=...{shown(HOSTILE[-37:])}" in page.locator("#ablation table").inner_text()
    assert f"xcopa_{shown(HOSTILE)}" in page.locator("#layer-sweep figure select").inner_text()
    assert page.locator("h1").inner_text() == page.title() == shown(HOSTILE)
    first = page.locator("#sample-list article").first
    assert first.locator(".answer .text").all_inner_texts() == [shown(HOSTILE)] * 2
    assert (
        page.locator("#sample-list article")
        .nth(2)
        .locator(".answer .text")
        .first.inner_text()
        .startswith("x" * 2000 + "… (100,000")
    )


@pytest.mark.parametrize(("width", "theme"), VIEWS)
def test_axe_finds_no_serious_fault(opened, width, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(opened(width, theme)).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [
        (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"][:300]) for one in serious
    ] == []


def test_every_chooser_changes_its_chart(opened):
    page = opened()
    changed = 0
    for figure in page.locator("figure[id]").all():
        for chooser in figure.locator(".controls select").all():
            before = figure.locator(".chart svg").inner_html()
            chooser.select_option(index=1)
            page.wait_for_timeout(400)
            assert figure.locator(".chart svg").inner_html() != before, chooser.inner_text()
            chooser.select_option(index=0)
            page.wait_for_timeout(300)
            changed += 1
    assert changed >= 8


def test_ctrl_and_the_wheel_zoom_and_the_wheel_alone_scrolls_the_page(opened):
    page = opened()
    figure = page.locator("#layers-1")
    figure.scroll_into_view_if_needed()
    box = figure.locator(".chart svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 120)

    ticks = figure.locator(".chart .role-axis-label").first
    before, place = ticks.text_content(), page.evaluate("scrollY")
    for distance, wanted in ((-60, place - 60), (60, place)):
        page.mouse.wheel(0, distance)
        for _ in range(100):
            if page.evaluate("scrollY") == wanted:
                break
            page.wait_for_timeout(20)
        assert page.evaluate("scrollY") == wanted
    assert ticks.text_content() == before
    page.keyboard.down("Control")
    page.mouse.wheel(0, -600)
    page.keyboard.up("Control")
    playwright.expect(ticks).not_to_have_text(before)
    assert page.evaluate("scrollY") == place
    figure.get_by_role("button", name="Reset zoom").click()
    playwright.expect(ticks).to_have_text(before)


def test_samples_are_searched_and_filtered(opened):
    page = opened()
    count, chooser = page.locator("#sample-count"), page.locator("#sample-controls select")

    def questions() -> int:
        return int(count.inner_text().split()[0])

    assert questions() == 30
    chooser.nth(1).select_option("empty")
    assert questions() == 1
    chooser.nth(1).select_option("in another language")
    assert questions() == 5
    chooser.nth(1).select_option("where the answers differ")
    assert 0 < questions() < 30
    chooser.nth(1).select_option("")
    page.locator("#sample-search").fill("QUESTION 17")
    playwright.expect(count).to_have_text(re.compile("^1 of 30 "))
    assert "question 17" in page.locator("#sample-list article").inner_text()
    page.locator("#sample-search").fill("")
    playwright.expect(count).to_have_text(re.compile("^30 of 30 "))
    page.get_by_role("button", name="Next").click()
    assert "page 2 of 2" in count.inner_text()
    page.locator("#sample-controls input[type=checkbox]").first.uncheck()
    assert page.locator("#sample-list article").first.locator(".answer").count() == 1
    chooser.nth(0).select_option("xquad_en")
    assert "in en" in page.locator("#sample-list").inner_text()


def test_the_theme_can_be_switched(opened):
    page = opened()
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.locator("#theme").select_option("dark")
    assert page.evaluate(colour) != light == "rgb(255, 255, 255)"


@pytest.mark.parametrize("chosen", ["", "dark"])
def test_print_is_black_on_white_in_dark_themes_too(opened, chosen):
    page = opened(theme="dark")
    page.locator("#theme").select_option(chosen)
    page.emulate_media(media="print")
    style = "getComputedStyle(document.body)"
    assert page.evaluate(f"[{style}.color, {style}.backgroundColor]") == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


def test_arabic_is_written_from_the_right(opened):
    page = opened()
    arabic = page.get_by_text("مرحبا بالعالم").first
    assert arabic.evaluate("element => element.matches(':dir(rtl)')")


def test_tab_reaches_every_control(opened):
    page = opened()
    every = "[...document.querySelectorAll('summary, a, select, input, button')]"
    page.evaluate(f"{every}.forEach((element, n) => element.dataset.n = n)")
    wanted = page.evaluate(f"{every}.filter(element => !element.disabled && element.checkVisibility()).length")
    reached = set()
    for _ in range(3 * wanted):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.n ?? null"))
    assert len(reached - {None}) == wanted
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
