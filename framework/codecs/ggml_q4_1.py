"""ggml's q4_1: blocks of 32 values, 4 bits each, and a float16 scale and minimum: 5 bits a value.

d is the range of the block over 15, m its minimum. A code is min(15, trunc((x - m) (1 / d) + 0.5)), with d and m in
float32; both are then stored in float16, and the code read as code d + m.

ggml's block of 20 bytes is its `scales` (2 bytes), its `minima` (2) and its `codes` (16): byte j has the code of value
j in its low half and that of value j + 16 in its high half.

Deviations: those in framework/ggml.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float32

from framework.arrays import Array, Namespace
from framework.codec import Parts
from framework.ggml import Blocks, pack_codes, span, steps, unpack_codes
from framework.rounding import half


@dataclass(frozen=True, kw_only=True)
class GgmlQ41(Blocks):
    """4 bits a value, and a scale and a minimum for 32 of them."""

    depth: ClassVar[int] = 4
    halves: ClassVar[int] = 2

    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        d, m = span(xp, x, 15)
        codes = xp.astype(xp.minimum(steps(xp, x - m, d) + 0.5, 15.0), xp.uint8)
        return {
            "codes": pack_codes(xp, codes, 4),
            "scales": half(xp, d),
            "minima": half(xp, m),
        }

    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        codes = unpack_codes(xp, parts["codes"], 4)
        return codes * xp.astype(parts["scales"], xp.float32) + xp.astype(parts["minima"], xp.float32)
