"""ggml's q4_0: blocks of 32 values, 4 bits each, and a float16 scale: 4.5 bits a value.

d is the value farthest from 0, with its sign, over -8. A code is min(15, trunc(x (1 / d) + 8.5)), with d in float32;
d is then stored in float16, and the code read as (code - 8) d.

ggml's block of 18 bytes is its `scales` (2 bytes) and its `codes` (16): byte j has the code of value j in its low half
and that of value j + 16 in its high half.

Deviations: those in framework/ggml.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float32

from framework.arrays import Array, Namespace
from framework.codec import Parts
from framework.ggml import Blocks, farthest, pack_codes, steps, unpack_codes
from framework.rounding import half


@dataclass(frozen=True, kw_only=True)
class GgmlQ40(Blocks):
    """4 bits a value, and a scale for 32 of them."""

    depth: ClassVar[int] = 4
    halves: ClassVar[int] = 1

    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        d = farthest(xp, x) / -8
        codes = xp.astype(xp.minimum(steps(xp, x, d) + 8.5, 15.0), xp.uint8)
        return {"codes": pack_codes(xp, codes, 4), "scales": half(xp, d)}

    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        codes = unpack_codes(xp, parts["codes"], 4)
        return (codes - 8) * xp.astype(parts["scales"], xp.float32)
