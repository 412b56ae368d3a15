"""LayerSelection of the critical layers on curves of known shape."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivotune.errors import UsageError
from pivotune.layers.selection import PLATEAU_SHARE, Fall, LayerSelection, relative_depth, resolve_layers, select_layers


def two_falls(num_layers=32, conversion=2, thinking=15, *, end=None, slope=0.02, levels=(10.2, 7.5, 2.5)):
    """High at the bottom, a sharp fall that ends at `conversion`, a plateau to `thinking`, a fall that ends at `end`."""
    end = end or num_layers
    top, middle, bottom = levels
    curve = [top - (top - middle) * (layer / conversion) ** 2 for layer in range(conversion + 1)]
    curve += [middle - slope * step for step in range(1, thinking - conversion + 1)]
    fall = (curve[-1] - bottom) / (end - thinking)
    curve += [curve[thinking] - fall * step for step in range(1, end - thinking + 1)]
    return curve + [bottom] * (num_layers - end)


def smollm2_like(embeddings):
    """Method notes: falls gently from layer 1 (1.5 nats) to 16 (0.9), stays, rises from 25 to the output (3.1)."""
    gentle = [1.5 - 0.6 * step / 15 for step in range(16)]
    return [embeddings, *gentle, *[0.9] * 9, *[0.9 + 2.2 * step / 5 for step in range(1, 6)]]


def noisy(curve, seed, nats):
    generator = random.Random(seed)
    return [value + generator.gauss(0, nats) for value in curve]


def assert_falls_back(selection, num_layers):
    assert selection.method == "relative-depth"
    assert (selection.conversion, selection.thinking) == relative_depth(num_layers)
    assert "relative depths 2/32 and 15/32" in selection.reason
    assert "\n" not in selection.reason


def test_llama2_like_curve_gives_the_papers_layers():
    selection = select_layers(two_falls())
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")
    assert [(fall.start, fall.end) for fall in selection.falls] == [(0, 2), (15, 32)]
    assert selection.falls[0].drop == pytest.approx(2.7)
    assert "2.70 nats from layer 0 to 2" in selection.reason
    assert "layer 15" in selection.reason


@pytest.mark.parametrize("seed", range(8))
def test_noise_between_layers_does_not_move_the_layers(seed):
    selection = select_layers(noisy(two_falls(), seed, nats=0.02))
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")


@pytest.mark.parametrize(
    ("num_layers", "conversion", "thinking", "end"),
    [
        (12, 1, 5, 12),
        (16, 2, 8, 16),
        (26, 2, 12, 20),
        (48, 4, 25, 48),
        (80, 5, 40, 80),
        (32, 6, 20, 24),
        (32, 2, 26, 32),
    ],
)
def test_other_depths_and_places(num_layers, conversion, thinking, end):
    selection = select_layers(two_falls(num_layers, conversion, thinking, end=end, slope=0.005))
    assert (selection.conversion, selection.thinking, selection.method) == (conversion, thinking, "entropy-falls")


def test_second_fall_may_steepen_gradually():
    curve = two_falls()
    curve[15:] = [curve[15] - 4.5 * (0.5 * x + 0.5 * x * x) for x in (step / 17 for step in range(18))]
    selection = select_layers(curve)
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")


def test_low_entropy_of_tied_embeddings_is_not_part_of_the_first_fall():
    curve = two_falls(levels=(9.5, 7.0, 2.0), conversion=4)
    curve[0] = 0.1
    selection = select_layers(curve)
    assert (selection.conversion, selection.thinking, selection.method) == (4, 15, "entropy-falls")
    assert selection.falls[0].start == 1


def test_fall_over_at_layer_2_after_low_embeddings_is_no_spike():
    curve = two_falls()
    curve[:3] = [0.1, 9.5, 7.5]
    selection = select_layers(curve)
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")


@pytest.mark.parametrize("layer", [20, 24, 28])
def test_one_layer_that_does_not_fall_does_not_split_a_fall(layer):
    curve = two_falls()
    curve[layer] = curve[layer - 1] + 0.02
    selection = select_layers(curve)
    assert [(fall.start, fall.end) for fall in selection.falls] == [(0, 2), (15, 32)]


def test_two_layers_that_do_not_fall_split_it():
    curve = two_falls(end=26)
    step = curve[20] - curve[21]
    curve[20:] = [curve[20], curve[20], curve[20], *(curve[20] - step * k for k in range(1, 11))]
    selection = select_layers(curve)
    assert_falls_back(selection, 32)
    assert "3 clear falls" in selection.reason
    assert [fall.start for fall in selection.falls] == [0, 15, 22]


@pytest.mark.parametrize("height", [2.0, -2.0])
@pytest.mark.parametrize("layer", [7, 10])
def test_spike_or_dip_of_one_layer_is_no_fall(layer, height):
    curve = two_falls()
    curve[layer] += height
    selection = select_layers(curve)
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")
    assert len(selection.falls) == 2


def test_uneven_plateau_is_no_fall():
    curve = two_falls()
    curve[8:12] = [curve[7] + 0.1, curve[7] + 0.2, curve[7] - 0.1, curve[7] - 0.3]  # 0.5 nats of a range of 7.7
    selection = select_layers(curve)
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")


def test_plateau_may_rise_a_little():
    selection = select_layers(two_falls(slope=-0.05))
    assert (selection.conversion, selection.thinking, selection.method) == (2, 15, "entropy-falls")


@pytest.mark.parametrize(
    ("embeddings", "said"),
    [(1.5, "only one clear fall (by 0.60 nats from layer 1 to 16)"), (0.06, "no clear fall")],
)
def test_smollm2_like_curve_falls_back_and_says_what_was_found(embeddings, said):
    selection = select_layers(smollm2_like(embeddings))
    assert_falls_back(selection, 30)
    assert (selection.conversion, selection.thinking) == (2, 14)
    assert said in selection.reason
    assert "3.10 at layer 30" in selection.reason


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        pytest.param([10 - 0.25 * k for k in range(33)], "only one clear fall", id="straight line down"),
        pytest.param([2 + 0.25 * k for k in range(33)], "no clear fall", id="rise"),
        pytest.param([3.0] * 33, "flat (from 3.00 to 3.00", id="flat"),
        pytest.param([9.0, 6.0, 3.0, *[3.0] * 30], "only one clear fall", id="first fall only"),
        pytest.param([*[9.0] * 16, *[9 - 0.4 * k for k in range(1, 18)]], "only one clear fall", id="second fall only"),
        pytest.param([8 * math.exp(-k / 4) for k in range(33)], "only one clear fall", id="decay"),
        pytest.param([*[9.0] * 17, *[6.0] * 11, *[3.0] * 5], "upper half", id="first fall too high up"),
        pytest.param([9.0, 7.0, *[6.0] * 28, 6.0, 4.0, 2.0], "in the last 2 layers", id="second in the last layers"),
        pytest.param([9.0, 7.0, *[6.0] * 8, *[10.0] * 8, *[7.0] * 15], "undone by layer 17", id="first fall undone"),
        pytest.param([9.0, 7.0, *[6.0] * 11, *[4.0] * 8, *[6.5] * 12], "undone by layer 32", id="second fall undone"),
        pytest.param([9.0, 6.0, 6.0, *[8.0] * 12, *[7.0] * 12, *[6.0] * 6], "3 clear falls", id="three falls"),
        pytest.param([9.0, 6.0, 6.0, *[8.5] * 12, *[6.0] * 18], "rises by 2.50 nats", id="rises nearly as much"),
    ],
)
def test_other_shapes_fall_back_with_what_was_found(curve, said):
    assert len(curve) == 33
    selection = select_layers(curve)
    assert_falls_back(selection, 32)
    assert said in selection.reason


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_value_falls_back_naming_its_layer(value):
    curve = two_falls()
    curve[7] = value
    selection = select_layers(curve)
    assert_falls_back(selection, 32)
    assert f"the entropy at layer 7 is {value}" in selection.reason
    assert selection.falls == ()


def test_the_shape_of_two_falls_in_numerical_noise_is_flat():
    selection = select_layers([3 + 0.01 * value for value in two_falls()])
    assert_falls_back(selection, 32)
    assert "flat" in selection.reason


def test_white_noise_is_never_read_as_stages():
    generator = random.Random(0)
    for _ in range(300):
        selection = select_layers([generator.gauss(5, 1) for _ in range(33)])
        assert_falls_back(selection, 32)


def line(num_layers, *, still=()):
    """Return a straight fall from 10 to 1 nats, but for the layers that stand still."""
    step = 9 / (num_layers - len(still))
    curve = [10.0]
    for layer in range(1, num_layers + 1):
        curve.append(curve[-1] - (0 if layer in still else step))
    return curve


@pytest.mark.parametrize("num_layers", [12, 24, 32, 80])
def test_a_line_that_stands_still_for_a_few_layers_has_no_plateau(num_layers):
    for first in range(1, num_layers - 3):
        for length in (2, num_layers // 5):
            assert_falls_back(select_layers(line(num_layers, still=range(first, first + length))), num_layers)


def test_a_line_that_stands_still_for_a_third_of_its_layers_has_one():
    selection = select_layers(line(30, still=range(4, 14)))
    assert (selection.conversion, selection.thinking, selection.method) == (3, 13, "entropy-falls")


@pytest.mark.parametrize(("num_layers", "nats"), [(24, 0.2), (32, 0.2), (48, 0.1), (80, 0.05), (96, 0.05)])
def test_a_noisy_line_is_never_read_as_stages(num_layers, nats):
    for seed in range(300):
        assert_falls_back(select_layers(noisy(line(num_layers), seed, nats), [nats] * (num_layers + 1)), num_layers)


def test_a_plateau_must_be_larger_than_the_noise_over_rows():
    curve = two_falls(num_layers=80, conversion=4, thinking=40)
    for error, method in ((0.05, "entropy-falls"), (0.3, "entropy-falls"), (0.6, "relative-depth")):
        selection = select_layers(curve, [0.0] * 80 + [error])
        assert (selection.method, error > 0.5) == (method, "a noise of 1.70: no plateau" in selection.reason)
    # A fall that is smaller than the noise is not clear.
    assert "only one clear fall" in select_layers(two_falls(levels=(8.5, 7.5, 2.5)), [0.4] * 33).reason


@given(st.lists(st.floats(), min_size=4, max_size=90))
def test_layers_are_always_in_order(curve):
    selection = select_layers(curve)
    assert 1 <= selection.conversion < selection.thinking < len(curve) - 1


@given(
    num_layers=st.integers(10, 80),
    data=st.data(),
    power=st.integers(0, 6),
    offset=st.sampled_from([0.0, 4.0, 64.0]),
)
def test_scale_and_offset_do_not_change_the_choice(num_layers, data, power, offset):
    # Multiples of 1/64 and a power of two: the scaled curve is the same numbers, not a rounding of them.
    steps = data.draw(st.lists(st.integers(-64, 64), min_size=num_layers, max_size=num_layers))
    curve = [0.0]
    for step in steps:
        curve.append(curve[-1] + step / 64)
    curve[0] = max(curve) + 1
    plain, scaled = select_layers(curve), select_layers([value * 2**power + offset for value in curve])
    assert (plain.conversion, plain.thinking, plain.method) == (scaled.conversion, scaled.thinking, scaled.method)


@given(num_layers=st.integers(12, 80), data=st.data(), scale=st.floats(0.4, 20), middle=st.floats(0.5, 0.7))
def test_clean_two_falls_are_found_wherever_they_are(num_layers, data, scale, middle):
    conversion = data.draw(st.integers(1, num_layers // 6))
    thinking = data.draw(st.integers(conversion + math.ceil(PLATEAU_SHARE * num_layers), num_layers // 2))
    levels = (scale, scale * middle, 0.0)
    selection = select_layers(two_falls(num_layers, conversion, thinking, slope=0.0, levels=levels))
    assert (selection.method, selection.thinking) == ("entropy-falls", thinking)
    assert selection.conversion == conversion


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (3, (1, 2)),
        (4, (1, 2)),
        (12, (1, 6)),
        (16, (1, 8)),
        (26, (2, 12)),
        (30, (2, 14)),
        (32, (2, 15)),
        (48, (3, 23)),
        (80, (5, 38)),
    ],
)
def test_relative_depth(num_layers, expected):
    assert relative_depth(num_layers) == expected


@pytest.mark.parametrize("num_layers", [1, 2])
def test_too_few_layers_are_refused(num_layers):
    with pytest.raises(UsageError, match=f"the model has {num_layers} layers; .* need at least 3"):
        relative_depth(num_layers)
    with pytest.raises(UsageError, match="need at least 3"):
        select_layers([1.0] * (num_layers + 1))


def test_to_dict_is_plain():
    assert LayerSelection(
        conversion=2, thinking=15, method="entropy-falls", reason="why", falls=(Fall(0, 2, 2.5),)
    ).to_dict() == {
        "conversion": 2,
        "thinking": 15,
        "method": "entropy-falls",
        "reason": "why",
        "falls": [{"start": 0, "end": 2, "drop": 2.5}],
        "reasons": {},
    }


class TestResolve:
    read = LayerSelection(conversion=3, thinking=20, method="entropy-falls", reason="two falls")

    def test_auto_is_the_selection(self):
        assert resolve_layers("auto", "auto", 30, self.read) is self.read

    def test_auto_without_a_selection_is_relative_depth(self):
        layers = resolve_layers("auto", "auto", 30)
        assert (layers.conversion, layers.thinking, layers.method) == (2, 14, "relative-depth")
        assert "no entropy profile was made" in layers.reason

    def test_both_asked_for(self):
        layers = resolve_layers(4, 29, 30, self.read)
        assert (layers.conversion, layers.thinking, layers.method) == (4, 29, "explicit")

    @pytest.mark.parametrize("layer", [0, -1, 30, 31])
    @pytest.mark.parametrize("term", ["conversion", "thinking"])
    def test_outside_the_model(self, term, layer):
        requested = {"conversion": 2, "thinking": 14, term: layer}
        with pytest.raises(UsageError) as error:
            resolve_layers(requested["conversion"], requested["thinking"], 30)
        assert str(error.value) == (
            f"supervision.{term}.layer: {layer} is not allowed; the model has 30 layers, choose 1 to 29"
        )

    @pytest.mark.parametrize("conversion", [14, 20])
    def test_conversion_not_below_thinking(self, conversion):
        with pytest.raises(
            UsageError, match=f"conversion.layer: {conversion} .* below supervision.thinking.layer, .* 14"
        ):
            resolve_layers(conversion, 14, 30)

    @pytest.mark.parametrize(
        ("conversion", "thinking", "expected", "said"),
        [
            (5, "auto", (5, 20), "thinking layer 20 was chosen automatically"),
            ("auto", 10, (3, 10), "conversion layer 3 was chosen automatically"),
            (25, "auto", (25, 26), "thinking layer 26 was chosen automatically (20 is not above it)"),
            ("auto", 3, (2, 3), "conversion layer 2 was chosen automatically (3 is not below it)"),
            ("auto", 2, (1, 2), "conversion layer 1 was chosen automatically (3 is not below it)"),
        ],
    )
    def test_one_asked_for_one_automatic(self, conversion, thinking, expected, said):
        layers = resolve_layers(conversion, thinking, 30, self.read)
        assert (layers.conversion, layers.thinking, layers.method) == (*expected, "entropy-falls")
        assert said in layers.reason
        assert layers.reason.endswith("two falls")

    def test_automatic_thinking_too_low_goes_to_relative_depth(self):
        low = LayerSelection(conversion=1, thinking=4, method="entropy-falls", reason="two falls")
        layers = resolve_layers(5, "auto", 30, low)
        assert (layers.conversion, layers.thinking) == (5, 14)
        assert "thinking layer 14 was chosen automatically (4 is not above it)" in layers.reason

    def test_the_neighbour_is_the_nearest_layer(self):
        high = LayerSelection(conversion=10, thinking=40, method="entropy-falls", reason="two falls")
        layers = resolve_layers("auto", 4, 80, high)
        assert (layers.conversion, layers.thinking) == (3, 4)

    @pytest.mark.parametrize(("conversion", "thinking", "allowed"), [(29, "auto", "1 to 28"), ("auto", 1, "2 to 29")])
    def test_no_room_for_the_other(self, conversion, thinking, allowed):
        with pytest.raises(UsageError, match=f"choose {allowed} so that the other term has a layer too"):
            resolve_layers(conversion, thinking, 30)

    def test_selection_of_a_deeper_model(self):
        with pytest.raises(
            UsageError, match="thinking layer 20, but this model has 12 layers; it was made for another"
        ):
            resolve_layers("auto", "auto", 12, self.read)


def test_no_torch_is_imported():
    code = "import sys, pivotune.layers.selection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
