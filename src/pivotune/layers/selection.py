"""Choose the layers at which conversion to English and thinking in English end.

They are read from the entropy curve of the layers, which `pivotune.layers.profile` measures. Needs no torch.
Layer k means "after k decoder blocks"; 0 = embeddings, L = after the last block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pivotune.errors import UsageError

if TYPE_CHECKING:
    from pivotune.layers.reading import LayerReading

SelectionMethod = Literal["reading", "entropy-falls", "relative-depth", "explicit"]
TermName = Literal["conversion", "thinking"]

# The paper's own layers on LLaMA-2-7B (arXiv 2503.01275, "Critical layers"): 2 and about 15 of 32.
PAPER_CONVERSION, PAPER_THINKING, PAPER_DEPTH = 2, 15, 32

# A straight line from the highest to the lowest entropy over the whole depth falls by range / L per layer. A falling
# layer falls at least half as fast: slower is the slight slope of a plateau.
FALLING_STEP = 0.5
# A fall is clear from a tenth of the range on (less looks like the unevenness of a plateau), and from 0.1 nats on, twice
# the standard error of a mean entropy over a few dozen sequences.
CLEAR_SHARE, CLEAR_NATS = 0.1, 0.1
# Layers. One layer that does not fall is an interruption.
INTERRUPTION = 1
# Layers between the two falls, as a share of the depth (paper: 13 of 32). A line that stands still for a few layers has no
# plateau.
PLATEAU_SHARE = 0.3
# Standard errors of a difference beyond which it is not noise.
NOISE_ERRORS = 2.0
# Rises after the first fall began, as a share of the two drops together. White noise rises as much as it falls.
LARGEST_RISE = 0.25
# The first fall ends in the lower half (paper: at 2 of 32), the second begins before the last two layers.
CONVERSION_BY, LAST_LAYERS = 0.5, 2
# Shares of the gain in likelihood at which a layer is chosen by reading (docs/experiments.md).
CONVERSION_SHARE, THINKING_SHARE = 0.15, 0.5
# Depths of the layers that were measured, 3 and 20 of 30 (docs/experiments.md).
CONVERSION_DEPTH, THINKING_DEPTH = 0.1, 2 / 3
# i, j and the last layer above them: fewer layers have no place for both.
SMALLEST_DEPTH = 3


@dataclass(frozen=True)
class Fall:
    """One fall of the entropy curve: from layer `start` to layer `end`, by `drop` nats."""

    start: int
    end: int
    drop: float


@dataclass(frozen=True)
class LayerSelection:
    """The critical layers of a model and the reason for them.

    Attributes:
        conversion, thinking: i and j, where conversion to English and thinking in English end; 1 <= i < j < L.
        method: `reading` (from what each layer can say), `entropy-falls` (from the entropy curve), `relative-depth` (the
            paper's 2/32 and 15/32 of the depth) or `explicit` (both set by the user).
        falls: every clear fall that was found, from the bottom up.
        reasons: the parts of the reason by loss, where each layer has its own (`reading`).
    """

    conversion: int
    thinking: int
    method: SelectionMethod
    reason: str
    falls: tuple[Fall, ...] = ()
    reasons: Mapping[TermName, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "falls": [asdict(fall) for fall in self.falls]}


def select_by_reading(reading: LayerReading) -> LayerSelection:
    """Choose the layers from what each can say, read through a tuned lens (`LayerReading`).

    The likelihood of the English text improves from layer to layer. Let N_k be -log P at layer k and N* the lowest value
    of the layers below L. The thinking layer j is the first at which y_en has `THINKING_SHARE` of the gain from layer 1 to
    N*: the loss has something to work with, and layers are left to convert back. The conversion layer i is the first with
    `CONVERSION_SHARE` of the gain for x_en. Conversion belongs to the lowest third of the layers and thinking above it; a
    layer that does not, or without a gain of `CLEAR_NATS`, is at `CONVERSION_DEPTH` or `THINKING_DEPTH` of L.
    """
    num_layers = len(reading.thinking) - 1
    check_depth(num_layers)
    conversion = max(1, round(CONVERSION_DEPTH * num_layers))
    layers = {"conversion": conversion, "thinking": max(conversion + 1, round(THINKING_DEPTH * num_layers))}
    rules: dict[TermName, Any] = {
        "conversion": (CONVERSION_SHARE, reading.conversion),
        "thinking": (THINKING_SHARE, reading.thinking),
    }
    reasons: dict[TermName, str] = {}
    for name, (share, values) in rules.items():
        inner = values[1:num_layers]
        gain = inner[0] - min(inner)
        if not all(map(math.isfinite, inner)) or gain < CLEAR_NATS:
            reasons[name] = f"{name}: no layer says the English text clearly better; layer {layers[name]} by its depth"
            continue
        found = 1 + next(k for k, value in enumerate(inner) if inner[0] - value >= share * gain)
        curve = f"({inner[0]:.2f} to {min(inner):.2f} nats per token)"
        where = f"{share:.0%} of the gain in likelihood {curve} at layer {found}"
        if (found > num_layers / 3) is (name == "thinking"):
            layers[name] = found
            reasons[name] = f"{name}: {where}"
        else:
            side = "in the lowest third" if name == "thinking" else "above the lowest third"
            reasons[name] = f"{name}: {where}, {side}; layer {layers[name]} by its depth"
    reason = "; ".join(reasons.values())
    return LayerSelection(layers["conversion"], layers["thinking"], "reading", reason, reasons=reasons)


def select_layers(entropy: Sequence[float], stderr: Sequence[float] | None = None) -> LayerSelection:
    """Choose the conversion layer i and the thinking layer j from the mean entropies H_0..H_L (nats).

    `stderr` holds their standard errors over rows; without it their noise is taken to be zero.

    The paper's definition (section "Critical layers"): the entropy falls twice; i is the end of the first fall, j the
    start of the second. The rule for L layers and range R = max H - min H:

    1. Layers 2..L-1 are replaced by the median of themselves and their two neighbours, so that a spike or dip of one
       layer is no fall. Layers 0 and 1 stay as measured, because the first fall may be over at layer 2.
    2. Layer k falls if H_{k-1} - H_k > `FALLING_STEP` * R / L. Falling layers in a row are one fall, also across
       `INTERRUPTION` layer that does not fall.
    3. A fall is clear if it drops by at least `CLEAR_SHARE` * R, by at least `CLEAR_NATS`, and by more than the noise:
       `NOISE_ERRORS` standard errors of a difference of two layers, sqrt(2) * the largest of `stderr`.
    4. i and j are read from the curve if there are exactly two clear falls; between them lies a plateau; the first ends
       in the lower half of the model; the second begins before the last `LAST_LAYERS` layers; neither is undone (the
       entropy has climbed back to where the fall began when the next one begins, or at the output); and the curve rises
       in all by no more than `LARGEST_RISE` of the two drops.
    5. A plateau has at least `PLATEAU_SHARE` * L layers, and its drop and the noise together stay below `FALLING_STEP` * R
       / L per layer.

    Otherwise i and j are the paper's relative depths (see `relative_depth`) and the reason names the falls.

    Raises:
        UsageError: fewer than 4 values, that is fewer than 3 layers.
    """
    num_layers = len(entropy) - 1
    check_depth(num_layers)
    if broken := [layer for layer, value in enumerate(entropy) if not math.isfinite(value)]:
        return _fall_back(num_layers, f"the entropy at layer {broken[0]} is {entropy[broken[0]]}, not a finite number")
    medians = [sorted(entropy[k - 1 : k + 2])[1] for k in range(2, num_layers)]
    curve = [*entropy[:2], *medians, entropy[num_layers]]
    noise = NOISE_ERRORS * math.sqrt(2) * max(stderr) if stderr else 0.0
    falls = find_falls(curve, noise)
    if objection := _objection(curve, falls, noise):
        return _fall_back(num_layers, objection, falls)
    first, second = falls
    reason = (
        f"the entropy falls twice: {_describe(first)} and {_describe(second)}; conversion ends "
        f"where the first fall ends (layer {first.end} of {num_layers}), thinking where the second begins "
        f"(layer {second.start})"
    )
    return LayerSelection(first.end, second.start, "entropy-falls", reason, (first, second))


def find_falls(curve: Sequence[float], noise: float = 0.0) -> list[Fall]:
    """Return the clear falls of a finite curve H_0..H_L, from the bottom up (steps 2 and 3 of `select_layers`)."""
    height = max(curve) - min(curve)
    falling_step = FALLING_STEP * height / (len(curve) - 1)
    falling = [k for k in range(1, len(curve)) if curve[k - 1] - curve[k] > falling_step]
    # (start, end) of each run of falling layers; start is the layer before the first one that falls.
    runs: list[tuple[int, int]] = []
    for layer in falling:
        if runs and layer - runs[-1][1] <= 1 + INTERRUPTION:
            runs[-1] = (runs[-1][0], layer)
        else:
            runs.append((layer - 1, layer))
    falls = [Fall(start, end, curve[start] - curve[end]) for start, end in runs]
    return [fall for fall in falls if fall.drop >= max(CLEAR_SHARE * height, CLEAR_NATS, noise)]


def relative_depth(num_layers: int) -> tuple[int, int]:
    """Return the paper's layers at another depth: 2/32 and 15/32 of L, rounded half up, with 1 <= i < j < L."""
    check_depth(num_layers)
    conversion = max(1, math.floor(num_layers * PAPER_CONVERSION / PAPER_DEPTH + 0.5))
    thinking = max(conversion + 1, math.floor(num_layers * PAPER_THINKING / PAPER_DEPTH + 0.5))
    return conversion, thinking


def check_depth(num_layers: int) -> None:
    """Refuse a model with too few layers for 1 <= i < j < L."""
    if num_layers < SMALLEST_DEPTH:
        raise UsageError(
            f"the model has {num_layers} layers; a conversion layer and a thinking layer below the last one need at "
            f"least {SMALLEST_DEPTH}"
        )


def _objection(curve: Sequence[float], falls: Sequence[Fall], noise: float) -> str | None:
    """Return why these falls are not the paper's two (steps 4 and 5 of `select_layers`); None if they are."""
    if len(falls) != 2:
        lowest, highest = min(curve), max(curve)
        if highest - lowest < CLEAR_NATS:
            return f"the entropy is flat (from {lowest:.2f} to {highest:.2f} nats over all layers)"
        count = {0: "no clear fall", 1: "only one clear fall"}.get(len(falls), f"{len(falls)} clear falls")
        found = f" ({'; '.join(map(_describe, falls))})" if falls else ""
        output = f"from {curve[0]:.2f} nats at layer 0 to {curve[-1]:.2f} at layer {len(curve) - 1}"
        return f"the entropy has {count}{found} where two are needed; it goes {output}"
    first, second = falls
    num_layers = len(curve) - 1
    plateau, drop = second.start - first.end, curve[first.end] - curve[second.start]
    between = f"between two falls ({_describe(first)}; {_describe(second)})"
    if plateau < PLATEAU_SHARE * num_layers:
        return f"{between} lie {plateau} layers, a plateau has at least {PLATEAU_SHARE:.0%} of {num_layers}"
    if drop + noise >= FALLING_STEP * (max(curve) - min(curve)) * plateau / num_layers:
        return f"{between} the entropy falls by {drop:.2f} nats, with a noise of {noise:.2f}: no plateau"
    if first.end > CONVERSION_BY * num_layers:
        return f"the first of two falls ({_describe(first)}) ends in the upper half of the {num_layers} layers"
    if second.start >= num_layers - LAST_LAYERS:
        return f"the second of two falls ({_describe(second)}) lies in the last {LAST_LAYERS} layers"
    for fall, until in ((first, second.start), (second, num_layers)):
        if curve[until] >= curve[fall.start]:
            return (
                f"a fall ({_describe(fall)}) is undone by layer {until}, where the entropy is {curve[until]:.2f} nats"
            )
    rise = sum(max(0.0, above - below) for below, above in pairwise(curve[first.start :]))
    if rise > LARGEST_RISE * (first.drop + second.drop):
        return f"beside two falls ({_describe(first)}; {_describe(second)}) the entropy rises by {rise:.2f} nats in all"
    return None


def _describe(fall: Fall) -> str:
    return f"by {fall.drop:.2f} nats from layer {fall.start} to {fall.end}"


def _fall_back(num_layers: int, objection: str, falls: Sequence[Fall] = ()) -> LayerSelection:
    conversion, thinking = relative_depth(num_layers)
    reason = (
        f"{objection}; fell back to the paper's relative depths {PAPER_CONVERSION}/{PAPER_DEPTH} and "
        f"{PAPER_THINKING}/{PAPER_DEPTH} of {num_layers} layers: {conversion} and {thinking}"
    )
    return LayerSelection(conversion, thinking, "relative-depth", reason, tuple(falls))


def resolve_layers(
    requested_conversion: int | Literal["auto"],
    requested_thinking: int | Literal["auto"],
    num_layers: int,
    selection: LayerSelection | None = None,
) -> LayerSelection:
    """Return the layers to supervise: those that the user set, with `auto` taken from `selection`.

    Without a selection `auto` is the paper's relative depth. An `auto` layer that does not fit the requested one
    (1 <= i < j < L) is replaced by its relative depth, and if that does not fit either by the requested layer's
    neighbour; the reason says so.

    Raises:
        UsageError: a requested layer is not among 1..L-1, the conversion layer is not below the thinking layer, a
            requested layer leaves no room for the other one, or the selection was made for a deeper model.
    """
    check_depth(num_layers)
    alone = "auto" in (requested_conversion, requested_thinking)
    check_layer("conversion", requested_conversion, num_layers, alone=alone)
    check_layer("thinking", requested_thinking, num_layers, alone=alone)
    automatic = selection or _fall_back(num_layers, "no entropy profile was made")
    if automatic.thinking >= num_layers:
        raise UsageError(
            f"the layer analysis chose thinking layer {automatic.thinking}, but this model has {num_layers} layers; "
            "it was made for another model, run `pivotune analyze` on this one"
        )
    conversion, thinking = requested_conversion, requested_thinking
    relative = relative_depth(num_layers)
    if conversion == "auto" and thinking == "auto":
        return automatic
    if conversion == "auto":
        assert thinking != "auto"
        candidates, allowed = (automatic.conversion, relative[0]), range(thinking - 1, 0, -1)
        conversion = layer = next((k for k in candidates if k in allowed), allowed[0])
        how = f"thinking layer {thinking} was asked for; conversion layer {layer} was chosen automatically"
        misfit = "" if layer == candidates[0] else f" ({candidates[0]} is not below it)"
    elif thinking == "auto":
        candidates, allowed = (automatic.thinking, relative[1]), range(conversion + 1, num_layers)
        thinking = layer = next((k for k in candidates if k in allowed), allowed[0])
        how = f"conversion layer {conversion} was asked for; thinking layer {layer} was chosen automatically"
        misfit = "" if layer == candidates[0] else f" ({candidates[0]} is not above it)"
    elif conversion < thinking:
        return LayerSelection(conversion, thinking, "explicit", f"layers {conversion} and {thinking} were asked for")
    else:
        raise UsageError(
            f"supervision.conversion.layer: {conversion} is not allowed; it must be below "
            f"supervision.thinking.layer, which is {thinking}"
        )
    reason = f"{how}{misfit}; {automatic.reason}"
    return replace(automatic, conversion=conversion, thinking=thinking, reason=reason, reasons={})


def check_layer(term: TermName, layer: int | Literal["auto"], num_layers: int, *, alone: bool = False) -> None:
    """Refuse a layer that is not among 1..L-1; accept `auto`. With `alone` keep a layer free for the other term."""
    lowest, highest = 1 + (alone and term == "thinking"), num_layers - 1 - (alone and term == "conversion")
    if layer == "auto" or lowest <= layer <= highest:
        return
    room = " so that the other term has a layer too" if alone else ""
    choose = f"choose {lowest} to {highest}" if lowest < highest else f"only {lowest} is possible"
    raise UsageError(
        f"supervision.{term}.layer: {layer} is not allowed; the model has {num_layers} layers, {choose}{room}"
    )
