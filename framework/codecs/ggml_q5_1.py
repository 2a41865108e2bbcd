"""ggml's q5_1: blocks of 32 values, 5 bits each, and a float16 scale and minimum: 6 bits a value.

d is the range of the block over 31, m its minimum. A code is min(31, trunc((x - m) (1 / d) + 0.5)), with d and m in
float32; both are then stored in float16, and the code read as code d + m.

ggml's block of 24 bytes is its `scales` (2 bytes), its `minima` (2) and its `codes`: 4 bytes of fifth bits, bit k of
byte j that of value 8 j + k, and 16 bytes, byte j with the low bits of value j in its low half and those of value
j + 16 in its high half.

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
class GgmlQ51(Blocks):
    """5 bits a value, and a scale and a minimum for 32 of them."""

    depth: ClassVar[int] = 5
    halves: ClassVar[int] = 2

    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        d, m = span(xp, x, 31)
        codes = xp.astype(xp.minimum(steps(xp, x - m, d) + 0.5, 31.0), xp.uint8)
        return {
            "codes": pack_codes(xp, codes, 5),
            "scales": half(xp, d),
            "minima": half(xp, m),
        }

    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        codes = unpack_codes(xp, parts["codes"], 5)
        return codes * xp.astype(parts["scales"], xp.float32) + xp.astype(parts["minima"], xp.float32)
