"""Student's t distribution, for tests over a handful of training seeds."""

from __future__ import annotations

import math

_PRECISION = 1e-15
_TINY = 1e-300
_MOST_TERMS = 1000  # a few dozen are needed for any number of seeds


def two_sided_p(t: float, degrees: int) -> float:
    """Probability of a value at least as far from zero as `t` under Student's distribution.

    That is I_x(degrees/2, 1/2), the regularised incomplete beta function, at x = degrees / (degrees + t^2)
    (Abramowitz and Stegun, 26.7.1 and 26.5.27).
    """
    if math.isnan(t) or degrees < 1:
        return math.nan
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(degrees / (degrees + square), square / (degrees + square), degrees / 2, 0.5)


def _incomplete_beta(x: float, rest: float, a: float, b: float) -> float:
    """I_x(a, b) with rest = 1 - x, given apart because it may be far smaller than x can tell."""
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest)
    factor = math.exp(logarithm)
    # The fraction converges fast on this side of the mean; the other side is one minus its mirror image.
    if x < (a + 1) / (a + b + 2):
        return factor * _fraction(x, a, b) / a
    return 1 - factor * _fraction(rest, b, a) / b


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of I_x(a, b), evaluated from its head (Lentz's method)."""
    numerator, denominator = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = denominator
    for m in range(1, _MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            denominator = 1 / _away_from_zero(1 + term * denominator)
            numerator = _away_from_zero(1 + term / numerator)
            value *= numerator * denominator
        if abs(numerator * denominator - 1) < _PRECISION:
            break
    return value


def _away_from_zero(number: float) -> float:
    return number if abs(number) > _TINY else _TINY
