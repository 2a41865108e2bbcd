"""Groups of numbers in a few bits with a minimum and a scale each, along tokens or along channels (KIVI, 2402.02750).

A group is coded as code = round((x - minimum) / scale), ties to even, clipped to 0 .. 2^bits - 1, where the minimum is
that of the group and the scale its range over 2^bits - 1, both as they are stored, in float16; where nothing of the
scale is left in float16, as in a constant group, it is 1. It is read as code * scale + minimum.

Keys are grouped by channel: the numbers of one channel in `group` consecutive tokens. Values are grouped by token:
`group` consecutive channels of one token. The last group may be shorter; its codes beyond the end are 0. The codes of a
group lie together, in the planes of `framework/packing.py`. What cannot be coded gives a scale that is not finite.

Deviations: KIVI computes in float16 and takes no shorter groups; its codes lie in 32-bit words along tokens.
"""

import numpy as np
from jaxtyping import Float16, Float32, UInt8

from framework.arrays import Array, Namespace, device
from framework.errors import KvtwinError
from framework.packing import pack, unpack
from framework.rounding import half, quotient, rounded

HALF_MOST = 65520.0  # from here on a float16 is infinite
LEAST = 2.0**-100  # far above what XLA takes for 0


def encode_channels(
    xp: Namespace, x: Float32[Array, "*axes tokens width"], bits: int, group: int
) -> tuple[
    UInt8[Array, "*axes groups width bytes"],
    Float16[Array, "*axes groups width"],
    Float16[Array, "*axes groups width"],
]:
    """Codes, scales and minima of each group of tokens and channel."""
    codes, scale, low = encode_tokens(xp, xp.matrix_transpose(x), bits, group)
    return xp.moveaxis(codes, -2, -3), xp.matrix_transpose(scale), xp.matrix_transpose(low)


def read_channels(
    xp: Namespace,
    codes: UInt8[Array, "*axes groups width bytes"],
    scale: Float16[Array, "*axes groups width"],
    low: Float16[Array, "*axes groups width"],
    bits: int,
    tokens: int,
) -> Float32[Array, "*axes tokens width"]:
    """The numbers that were coded, of so many tokens."""
    codes, scale, low = xp.moveaxis(codes, -3, -2), xp.matrix_transpose(scale), xp.matrix_transpose(low)
    return xp.matrix_transpose(read_tokens(xp, codes, scale, low, bits, tokens))


def encode_tokens(
    xp: Namespace, x: Float32[Array, "*axes tokens width"], bits: int, group: int
) -> tuple[
    UInt8[Array, "*axes tokens groups bytes"],
    Float16[Array, "*axes tokens groups"],
    Float16[Array, "*axes tokens groups"],
]:
    """Codes, scales and minima of each token and group of channels."""
    if bits not in range(1, 9) or group < 8 or group % 8:
        raise KvtwinError(f"groups have bits={bits}, group={group}; expected 1 to 8, and a multiple of 8")
    width, most = x.shape[-1], 2.0**bits - 1
    beyond = -width % group
    x = xp.where(xp.isnan(x), xp.inf, rounded(xp, x))
    last = xp.broadcast_to(x[..., -1:], (*x.shape[:-1], beyond))
    x = xp.reshape(xp.concat([x, last], axis=-1), (*x.shape[:-1], -1, group))
    with np.errstate(over="ignore", invalid="ignore"):
        low = xp.min(x, axis=-1, keepdims=True)
        low = xp.where(xp.abs(low) < LEAST, 0.0, low)  # of 0 and -0 libraries take either
        span = xp.max(x, axis=-1, keepdims=True) - low
        size = quotient(xp, span, xp.full_like(span, most))
        fits = (xp.abs(low) < HALF_MOST) & (size < HALF_MOST)
        scale = half(xp, xp.where(fits, size, xp.inf))
        low = half(xp, xp.where(fits, low, 0.0))
        scale = xp.where(scale == 0, xp.ones_like(scale), scale)
        above = xp.where(fits, x - xp.astype(low, xp.float32), 0.0)
        ratio = quotient(xp, above, xp.astype(scale, xp.float32))
    codes = xp.astype(xp.clip(xp.round(ratio), 0.0, most), xp.uint8)
    if beyond:
        place = xp.reshape(xp.arange(width + beyond, device=device(x)), codes.shape[-2:])
        codes = xp.where(place < width, codes, xp.zeros_like(codes))
    return pack(xp, codes, bits), scale[..., 0], low[..., 0]


def read_tokens(
    xp: Namespace,
    codes: UInt8[Array, "*axes tokens groups bytes"],
    scale: Float16[Array, "*axes tokens groups"],
    low: Float16[Array, "*axes tokens groups"],
    bits: int,
    width: int,
) -> Float32[Array, "*axes tokens width"]:
    """The numbers that were coded, of so many channels."""
    x = xp.astype(unpack(xp, codes, bits), xp.float32) * xp.astype(scale, xp.float32)[..., None]
    x = x + xp.astype(low, xp.float32)[..., None]
    return xp.reshape(x, (*x.shape[:-2], -1))[..., :width]
