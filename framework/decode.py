"""Choosing the next token: sampling settings, and one rule that gives the same token on every backend."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float32, Int32, Num

from framework.arrays import Array, Namespace
from framework.errors import KvtwinError

# Logits nearer to zero count as zero: some libraries flush the tiniest numbers and others do not.
_LEAST = 2.0**-63

Knob = int | float | Num[Array, ""] | Num[Array, "batch"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The default is greedy: the largest logit.

    `temperature`: divides the logits; 0 is greedy, whatever the filters say. `top_k`: the number of most probable
    tokens that stay; 0 for all. `top_p`: the smallest set of most probable tokens that has this probability stays.
    `min_p`: tokens with this share of the largest probability stay. They apply in this order, each to what the last
    one left, as in Hugging Face transformers. `seed`: see `framework.random.gumbel`.
    """

    temperature: float | int = 0.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, float, lambda x: 0 <= x < math.inf, "a finite number >= 0")
        _check("top_k", self.top_k, int, lambda x: 0 <= x < 2**31, "an integer >= 0; 0 keeps all")
        _check("top_p", self.top_p, float, lambda x: 0 < x <= 1, "a number above 0, at most 1; 1 keeps all")
        _check("min_p", self.min_p, float, lambda x: 0 <= x <= 1, "a number from 0 to 1; 0 keeps all")
        _check("seed", self.seed, int, lambda x: 0 <= x < 2**32, "an integer >= 0 and below 2^32")


def choose(
    xp: Namespace,
    logits: Float32[Array, "batch vocab"],
    noise: Float32[Array, "batch vocab"],
    temperature: Knob,
    top_k: Knob | None = None,
    top_p: Knob | None = None,
    min_p: Knob | None = None,
) -> Int32[Array, "batch"]:
    """The next token of each row: the largest logits / temperature + Gumbel noise among those that the filters leave.

    Equal tokens rank by lowest id, in every filter and at the end. Temperature 0 is the largest logit of all. Settings
    are one number or one per row, and may be traced; a filter that is None costs nothing, one that is off (0, 1, 0)
    costs the same as one that is on. Logits may be -inf, but not all of a row.
    """
    heat = _column(xp, temperature, logits, xp.float32)
    greedy = heat < _LEAST
    heat = xp.where(greedy, xp.ones_like(heat), heat)
    top = xp.max(logits, axis=-1, keepdims=True)
    # Rank is by the logits as they came: dividing them could make two of them equal.
    ranked = xp.where(xp.abs(logits) < _LEAST, xp.zeros_like(logits), logits)
    keep = xp.ones_like(logits, dtype=xp.bool)
    if top_k is not None:
        keep = _most(xp, ranked, _column(xp, top_k, logits, xp.int32))
    scaled = (logits - top) / heat
    weights = xp.where(keep, xp.exp(scaled), xp.zeros_like(scaled))
    if top_p is not None:
        keep = keep & _nucleus(xp, ranked, weights, _column(xp, top_p, logits, xp.float32))
    if min_p is not None:
        keep = keep & ((weights >= _column(xp, min_p, logits, xp.float32)) | (logits == top))
    drawn = xp.where(keep, scaled + noise, xp.full_like(scaled, -xp.inf))
    return xp.astype(xp.argmax(xp.where(greedy, logits, drawn), axis=-1), xp.int32)


def _most(
    xp: Namespace, x: Float32[Array, "batch vocab"], count: Int32[Array, "rows 1"]
) -> Bool[Array, "batch vocab"]:
    """True for the `count` largest of each row, lowest id first among equals; for all where the count is 0."""
    vocab = x.shape[-1]
    count = xp.where((count <= 0) | (count > vocab), xp.full_like(count, vocab), count)
    threshold = _largest(xp, x, lambda t: _sum(xp, x >= t, xp.int32) >= count)
    above, equal = x > threshold, x == threshold
    turn = xp.cumulative_sum(xp.astype(equal, xp.int32), axis=-1, dtype=xp.int32)
    return above | (equal & (turn <= count - _sum(xp, above, xp.int32)))


def _nucleus(
    xp: Namespace,
    x: Float32[Array, "batch vocab"],
    weights: Float32[Array, "batch vocab"],
    share: Float32[Array, "rows 1"],
) -> Bool[Array, "batch vocab"]:
    """True for the fewest of the largest of each row that hold this share of the weights; the crossing one stays.

    The largest weight must be 1. Lowest id first among equals. All stay where the share is 1.
    """
    nothing = xp.zeros_like(weights)
    # The largest token alone has weight 1, so a target this small keeps it.
    target = xp.clip(share * _sum(xp, weights, xp.float32), min=_LEAST)
    threshold = _largest(xp, x, lambda t: _sum(xp, xp.where(x >= t, weights, nothing), xp.float32) >= target)
    above, equal = x > threshold, x == threshold
    turn = xp.cumulative_sum(xp.astype(equal, xp.float32), axis=-1, dtype=xp.float32)
    before = _sum(xp, xp.where(above, weights, nothing), xp.float32) + (turn - 1) * weights
    return above | (equal & (before < target)) | (share >= 1)


def _largest(
    xp: Namespace,
    x: Float32[Array, "batch vocab"],
    reached: Callable[[Float32[Array, "rows 1"]], Bool[Array, "batch 1"]],
) -> Float32[Array, "batch 1"]:
    """The largest entry t of each row with `reached(t)`, exactly, where reached is true below t and false above it.

    The magnitude is built bit by bit, as float32 has it: 8 steps for the exponent (from 2^-64 up to 2^127), 23 for
    the mantissa. Its products and sums are exact. Below zero the search is for the largest magnitude that is NOT
    reached, and t is the next entry.
    """
    zero = xp.zeros_like(x[:, :1])
    positive = reached(zero)
    sign = xp.where(positive, zero + 1, zero - 1)
    magnitude = zero + _LEAST / 2
    for doublings in (64, 64, 32, 16, 8, 4, 2, 1):
        tried = magnitude * 2.0**doublings
        magnitude = xp.where(reached(sign * tried) == positive, tried, magnitude)
    magnitude = xp.where(magnitude < _LEAST, zero, magnitude)
    step = magnitude
    for _ in range(23):
        step = step * 0.5
        tried = magnitude + step
        magnitude = xp.where(reached(sign * tried) == positive, tried, magnitude)
    below = xp.where(x < -magnitude, x, xp.full_like(x, -xp.inf))
    return xp.where(positive, magnitude, xp.max(below, axis=-1, keepdims=True))


def _sum(xp: Namespace, x: Array, dtype: Any) -> Array:
    return xp.sum(xp.astype(x, dtype), axis=-1, keepdims=True, dtype=dtype)


def _column(xp: Namespace, value: Knob, like: Array, dtype: Any) -> Array:
    """[rows 1], where rows is 1 or the batch, on the device of `like`, which a traced array cannot name."""
    if isinstance(value, (int, float)):
        return xp.full_like(like[:1, :1], value, dtype=dtype)
    return xp.reshape(xp.astype(value, dtype), (-1, 1))


def _check(name: str, value: Any, kind: type, fits: Callable[[Any], bool], expected: str) -> None:
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed) or not fits(value):
        raise KvtwinError(f"{name} is {value!r}; expected {expected}")
