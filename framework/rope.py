"""Rotary angles (arXiv 2104.09864) in float64 from the definition: made once here, cast by the backends.

float32 angles are 6e-5 off at position 1000 and 4e-4 at 8000, so no backend computes its own.
"""

import math

import numpy as np
from jaxtyping import Float64, Int

from framework.errors import KvtwinError
from framework.spec import ModelSpec, Rope


def ropes(spec: ModelSpec) -> tuple[Rope, ...]:
    """The different ropes of the layers."""
    return tuple(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope is not None))


def frequencies(rope: Rope, length: int | None = None) -> tuple[Float64[np.ndarray, "half"], float]:
    """Radians per position of each pair of channels, and the factor that multiplies cos and sin.

    `length` is the final length of the text, prompt and generated tokens together; only `dynamic` reads it, and it
    must then be the same for every call on one cache. Without it `dynamic` is unscaled.
    """
    if rope.kind == "linear":
        return _plain(rope.theta, rope.dim) / rope.factor, 1.0
    if rope.kind == "dynamic":
        return _plain(_dynamic_theta(rope, length), rope.dim), 1.0
    if rope.kind == "yarn":
        return _yarn(rope), rope.attention_factor
    if rope.kind == "llama3":
        return _llama3(rope), 1.0
    return _plain(rope.theta, rope.dim), 1.0


def angles(
    rope: Rope, positions: Int[np.ndarray, "*shape"], length: int | None = None, beyond: bool = False
) -> tuple[Float64[np.ndarray, "*shape half"], Float64[np.ndarray, "*shape half"]]:
    """cos and sin of position times frequency, times the attention factor.

    Raises KvtwinError where `dynamic` meets a position beyond the length that it was made for, and no `length` (or a
    shorter one) was declared: its frequencies depend on the final length, so keys cached before it is known are wrong.
    With `beyond` it does not, for positions that no token will have.
    """
    if positions.size and not beyond:
        check_reach(rope, int(positions.max()), length)
    inverse, factor = frequencies(rope, length)
    turned = positions[..., None].astype(np.float64) * inverse
    return np.cos(turned) * factor, np.sin(turned) * factor


def reach(rope: Rope, length: int | None = None) -> int | None:
    """The number of positions that have angles; None where there is no end."""
    return max(rope.original, length or 0) if rope.kind == "dynamic" else None


def check_reach(rope: Rope, last: int, length: int | None) -> None:
    """Raises where a token at position `last` has no angles."""
    most = reach(rope, length)
    if most is not None and last >= most:
        declared = (
            "no final length is declared" if length is None else f"the declared final length is {length}"
        )
        raise KvtwinError(
            f"position {last} is beyond the {rope.original} of this model's dynamic rope, and {declared}\n"
            "its frequencies depend on the final length: declare it (prompt and new tokens together) with the cache"
        )


def _plain(theta: float, dim: int) -> Float64[np.ndarray, "half"]:
    return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def _dynamic_theta(rope: Rope, length: int | None) -> float:
    """The base that keeps the slowest channel within its trained range at `length` (NTK scaling)."""
    if length is None or length <= rope.original:
        return rope.theta
    stretch = rope.factor * length / rope.original - (rope.factor - 1)
    return rope.theta * stretch ** (rope.dim / (rope.dim - 2))


def _yarn(rope: Rope) -> Float64[np.ndarray, "half"]:
    """Fast channels as they are, slow ones divided by the factor, a ramp between (arXiv 2309.00071, section 3.2)."""
    plain = _plain(rope.theta, rope.dim)
    low, high = _yarn_channel(rope, rope.beta_fast), _yarn_channel(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float64) - low) / (high - low), 0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def _yarn_channel(rope: Rope, turns: float) -> float:
    """The channel pair that makes `turns` full turns within the original length."""
    return rope.dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _llama3(rope: Rope) -> Float64[np.ndarray, "half"]:
    """Wavelengths above original / low_frequency are stretched, those below original / high_frequency left alone."""
    plain = _plain(rope.theta, rope.dim)
    turns = rope.original * plain / (2 * math.pi)
    keep = np.clip((turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency), 0, 1)
    return plain / rope.factor * (1 - keep) + plain * keep
