"""ggml's q5_1: blocks of 32 values, 5 bits each, and a float16 scale and minimum: 6 bits a value.

d is the range of the block over 31, m its minimum. A code is min(31, trunc((x - m) (1 / d) + 0.5)), with d and m in
float32; both are then stored in float16, and the code read as code d + m.

ggml's block of 24 bytes is its `scales` (2 bytes), its `minima` (2), its `fifths` (4) and its `codes` (16). Byte j of
`codes` has the low four bits of code j in its low four bits and those of code j + 16 in its high ones; bit k of byte j
of `fifths` is the fifth bit of code 8 j + k.

Deviations: those in framework/ggml.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float32

from framework.arrays import Array, Namespace
from framework.codec import Parts
from framework.ggml import Blocks, fifths, five, nibbles, span, steps
from framework.stepwise import half


@dataclass(frozen=True, kw_only=True)
class GgmlQ51(Blocks):
    """5 bits a value, and a scale and a minimum for 32 of them."""

    depth: ClassVar[int] = 5
    halves: ClassVar[int] = 2

    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        d, m = span(xp, x, 31)
        codes = xp.astype(xp.minimum(steps(xp, x - m, d) + 0.5, 31.0), xp.uint8)
        return {
            "codes": nibbles(xp, codes),
            "fifths": fifths(xp, codes),
            "scales": half(xp, d),
            "minima": half(xp, m),
        }

    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        codes = xp.astype(five(xp, parts["codes"], parts["fifths"]), xp.float32)
        return codes * xp.astype(parts["scales"], xp.float32) + xp.astype(parts["minima"], xp.float32)
