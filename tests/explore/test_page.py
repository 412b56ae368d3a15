from __future__ import annotations

import random

from pivotune.explore.page import explorer_page

POSITIONS, ROWS = 64, 33  # a text of 64 tokens in a model of 32 layers


def item(num_models: int) -> dict:
    """Random numbers, which compress worst, in the shape of `LensReader.read`."""
    draw = random.Random(0)

    def numbers(count: int) -> list[float]:
        return [float(f"{draw.random():.3g}") for _ in range(count * POSITIONS * ROWS)]

    def grid() -> dict:
        likeliest = [[draw.randrange(9000) for _ in range(10)] for _ in range(POSITIONS * ROWS)]
        return {
            "likeliest": likeliest,
            "probabilities": numbers(10),
            "entropy": numbers(1),
            "output": numbers(1),
            "letters": numbers(2),
        }

    change = {lens: {"kl": numbers(1), "change": numbers(1)} for lens in ("logit", "tuned")}
    side = {
        "name": "text", "prompt": "a", "answer": "b", "hidden": 0, "rtl": False, "positions": POSITIONS,
        "columns": [["a", 1, "query"]] * POSITIONS, "texts": [f"token-{n}" for n in range(9000)],
        "grids": [{"logit": grid(), "tuned": grid()} for _ in range(num_models)], "differences": change,
    }  # fmt: skip
    return {"label": "a", "notes": [], "sides": [side]}


def test_two_models_and_two_lenses_stay_below_3_mb():
    assert len(explorer_page(["one", "two"], [], [item(2)])) < 3_000_000


def test_only_a_served_page_asks_and_may_reach_its_server():
    offline, served = (explorer_page(["one"], [], [], served=served) for served in (False, True))
    assert "connect-src" not in offline
    assert 'id="ask"' not in offline
    assert "connect-src &#39;self&#39;" in served
    assert '<option value="0">one</option>' in served


def test_names_are_text():
    page = explorer_page(["<b>\u202e</script>"], ["<i>\x00"], [], served=True)
    assert "<b>" not in page
    assert "<i>" not in page
    assert page.index("&lt;i&gt;") < page.rindex("How to read it")  # lens and template stand beside the grid
    assert not {"\u202e", "\x00"} & set(page)
    assert '<option value="0">&lt;b&gt;⟨U+202E⟩&lt;/script&gt;</option>' in page
