"""ggml's q5_0: blocks of 32 values, 5 bits each, and a float16 scale: 5.5 bits a value.

d is the value farthest from 0, with its sign, over -16. A code is min(31, trunc(x (1 / d) + 16.5)), with d in float32;
d is then stored in float16, and the code read as (code - 16) d.

ggml's block of 22 bytes is its `scales` (2 bytes) and its `codes`: 4 bytes of fifth bits, bit k of byte j that of value
8 j + k, and 16 bytes, byte j with the low bits of value j in its low half and those of value j + 16 in its high half.

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
class GgmlQ50(Blocks):
    """5 bits a value, and a scale for 32 of them."""

    depth: ClassVar[int] = 5
    halves: ClassVar[int] = 1

    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        d = farthest(xp, x) / -16
        codes = xp.astype(xp.minimum(steps(xp, x, d) + 16.5, 31.0), xp.uint8)
        return {"codes": pack_codes(xp, codes, 5), "scales": half(xp, d)}

    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        codes = unpack_codes(xp, parts["codes"], 5)
        return (codes - 16) * xp.astype(parts["scales"], xp.float32)
