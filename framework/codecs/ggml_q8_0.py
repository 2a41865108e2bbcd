"""ggml's q8_0: blocks of 32 values, 8 bits each, and a float16 scale: 8.5 bits a value.

d is the largest absolute value over 127. A code is x (1 / d) rounded to the nearest integer, halves away from 0, with
d in float32; d is then stored in float16, and the code read as code d.

ggml's block of 34 bytes is its `scales` (2 bytes) and its `codes` (32 signed bytes, in order).

Deviations: those in framework/ggml.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float32

from framework.arrays import Array, Namespace
from framework.codec import Parts
from framework.ggml import Blocks, over, steps
from framework.rounding import half, largest


@dataclass(frozen=True, kw_only=True)
class GgmlQ80(Blocks):
    """8 bits a value, and a scale for 32 of them."""

    depth: ClassVar[int] = 8
    halves: ClassVar[int] = 1

    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        d = over(xp, largest(xp, x), 127)
        exact = steps(xp, x, d)
        size = xp.abs(exact)
        whole = xp.floor(size)  # size + 0.5 would round 0.49999997 up
        codes = xp.sign(exact) * (whole + xp.astype(size - whole >= 0.5, xp.float32))
        return {"codes": xp.astype(codes, xp.int8), "scales": half(xp, d)}

    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        return xp.astype(parts["codes"], xp.float32) * xp.astype(parts["scales"], xp.float32)
