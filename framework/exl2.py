"""ExLlamaV2's quantised cache: rotated keys and values in 4 or 8 bits, one scale for 32 numbers.

A token's row of heads is cut into spans of 64 numbers. In a span the 32 numbers at even places and the 32 at odd ones
are each rotated by the unscaled Hadamard matrix, in float16. A group is the numbers 0 to 31 of a rotated span, or its
numbers 32 to 63; with m = 8 for 4 bits and m = 128 for 8, its scale is the largest absolute value over m, in float16,
and a code is w / largest * m + m, in float16, rounded to the nearest integer and clipped to 0 .. 2m - 1: the largest
positive number of a group comes back as (m - 1) / m of itself. A group of zeros has scale 0 and codes 0. A sum beyond
float16 gives a scale that is not finite: one on the way to the codes, or one on the way back from them, which comes
first. A span with one channel of 2000 can be stored there but not read.

Codes lie as they do there: a byte each, or two in a byte, the one at the even place low.

Source: ExLlamaV2, cache_q.cuh. Deviations: what is read is code times scale, rotated back, in float32; ExLlamaV2 rounds
each step to float16, and gives NaN where a sum is beyond it.
"""

from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float16

from framework.arrays import Array, Namespace, when
from framework.codec import Codec, Parts, Side
from framework.hadamard import blockwise, matrix, transform
from framework.packing import pack, pieces
from framework.rounding import half, largest, quotient
from framework.spec import Layer

SPAN, GROUP, LANES = 64, 32, 16


class Exl2(Codec):
    """Base of the three caches, which say how many bits keys and values have."""

    k_bits: ClassVar[int]
    v_bits: ClassVar[int]

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        axes, count = x.shape[:-1], x.shape[-1] // SPAN
        spans = xp.reshape(half(xp, x), (*axes, count, 2 * LANES, 2))
        turned = transform(xp, xp.matrix_transpose(spans))  # [.. span parity lane]
        halves = xp.moveaxis(
            xp.reshape(turned, (*axes, count, 2, 2, LANES)), -2, -3
        )  # [.. span half parity lane]
        if self._bits(side) == 8:
            halves = xp.matrix_transpose(halves)
        groups = xp.reshape(halves, (*axes, 2 * count, GROUP))
        most = largest(xp, groups)
        middle = 2.0 ** (self._bits(side) - 1)
        ratio = xp.where((most > 0) & xp.isfinite(most), quotient(xp, groups, most), -1.0)
        codes = xp.clip(xp.round(ratio * middle + middle), 0.0, 2 * middle - 1)
        packed = pack(xp, xp.astype(codes, xp.uint8), self._bits(side))
        scales = most * (1 / middle)
        # Below 60000 / 32 no sum of 32 numbers on the way back leaves float16.
        whole = when(
            xp,
            xp.any(most > 1875.0),
            lambda: self._returns(xp, codes - middle, scales, side),
            xp.isfinite(scales[..., 0]),
        )
        return {
            "codes": xp.reshape(packed, (*axes, x.shape[-1] * self._bits(side) // 8)),
            "scales": xp.where(whole, scales[..., 0], xp.inf),
        }

    def _returns(
        self,
        xp: Namespace,
        steps: Float[Array, "*axes groups 32"],
        scales: Float16[Array, "*axes groups 1"],
        side: Side,
    ) -> Bool[Array, "*axes groups"]:
        """True for the groups of a span that stays finite when it is rotated back in float16."""
        groups = half(xp, xp.astype(steps, xp.float32) * xp.astype(scales, xp.float32))  # rounded once
        axes, count = groups.shape[:-2], groups.shape[-2] // 2
        if self._bits(side) == 8:
            halves = xp.matrix_transpose(xp.reshape(groups, (*axes, count, 2, LANES, 2)))
        else:
            halves = xp.reshape(groups, (*axes, count, 2, 2, LANES))
        lanes = xp.reshape(xp.moveaxis(halves, -3, -2), (*axes, count, 2, 2 * LANES))
        finite = xp.all(xp.isfinite(transform(xp, lanes)), axis=(-2, -1))
        return xp.reshape(xp.broadcast_to(finite[..., None], (*axes, count, 2)), (*axes, 2 * count))

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        """The rotated numbers; of 4 bits, those at even places of all groups come before those at odd ones."""
        made = self.pieces(xp, parts, side)
        return made[0] if len(made) == 1 else xp.concat(made, axis=-1)

    def pieces(self, xp: Namespace, parts: Parts, side: Side) -> list[Float[Array, "*axes n"]]:
        bits, scales = self._bits(side), xp.astype(parts["scales"], xp.float32)[..., None]
        *axes, groups, _ = scales.shape
        made = []
        for codes in pieces(xp, xp.reshape(parts["codes"], (*axes, groups, GROUP * bits // 8)), bits):
            x = xp.astype((codes - 2 ** (bits - 1)).view(xp.int8), xp.float32)  # what is below 0 comes round
            x *= scales
            made.append(xp.reshape(x, (*axes, groups * codes.shape[-1])))
        return made

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"]:
        span = np.kron(matrix(2 * LANES), np.eye(2, dtype=np.float32)) / (2 * LANES)
        made = blockwise(span, width)
        if self._bits(side) == 4:
            made = np.moveaxis(made.reshape(-1, LANES, 2, width), -2, 0).reshape(width, width)
        return made

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return float(width * self._bits(side)), 16.0 * width / GROUP

    def joint(self, layer: Layer) -> bool:
        return layer.head_dim % SPAN != 0

    def unfit(self, layer: Layer) -> str | None:
        if layer.kv_heads * layer.head_dim % SPAN == 0:
            return None
        return (
            f"{layer.kv_heads} kv heads of head_dim {layer.head_dim} are "
            f"{layer.kv_heads * layer.head_dim} numbers; expected a multiple of {SPAN}"
        )

    def _bits(self, side: Side) -> int:
        return self.k_bits if side == "keys" else self.v_bits
