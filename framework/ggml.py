"""What the block types of ggml share: blocks of 32 values along head_dim, float16 scales, and a rotation before them.

llama.cpp rotates keys and values before it codes them since its pull request 21038 (merged 2026-04-01), where head_dim
is a multiple of 64 and unless LLAMA_ATTN_ROT_DISABLE=1 is set; `rotated=False` is what it did before. The rotation is
Sylvester's Walsh-Hadamard matrix over sqrt(n): for keys n is the largest power of 2 that divides head_dim, for values
it is 64.

Blocks are those of `gguf.quants.quantize`, which are ggml's own. A block whose float32 scale is below 2^-100, of which
nothing is left in float16, is coded as zeros, since XLA takes numbers below 2^-126 for 0; so is such a minimum.

Deviations: llama.cpp also attends to the tokens of the current call as they are coded, and codes queries as q8_0; here
these tokens attend exactly, and queries are as they are. It rotates by a product with the matrix, here by sums in
pairs, which rounds otherwise. What does not fit in float16 is refused here, and infinite there. Zero scales have the
sign that ggml's C code gives them, zero minima none.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32, UInt8

from framework import hadamard, packing
from framework.arrays import Array, Namespace, device
from framework.codec import Codec, Parts, Side
from framework.rounding import quotient, rounded
from framework.spec import Layer

BLOCK = 32
ROTATED = 64  # a rotated head_dim is a multiple of it
LEAST = 2.0**-100
HALF_MOST = 65520.0  # from here on a float16 is infinite


@dataclass(frozen=True, kw_only=True)
class Blocks(Codec):
    """A block type: `depth` bits a code, and `halves` float16 numbers a block. Parts have the blocks of a vector side
    by side."""

    rotated: bool = True

    depth: ClassVar[int]
    halves: ClassVar[int]

    @abstractmethod
    def encode_blocks(self, xp: Namespace, x: Float32[Array, "*axes blocks 32"]) -> dict[str, Array]:
        """The parts of each block, along the last axis."""

    @abstractmethod
    def read_blocks(self, xp: Namespace, parts: Parts) -> Float32[Array, "*axes blocks 32"]:
        """The values of each block."""

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        size = self._rotation(x.shape[-1], side)
        with np.errstate(all="ignore"):
            if size > 1:
                pieces = xp.reshape(x, (*x.shape[:-1], -1, size))
                x = xp.reshape(hadamard.transform(xp, pieces) * _root(size), x.shape)
            x = xp.where(xp.isnan(x), xp.inf, rounded(xp, x))
            x = xp.reshape(x, (*x.shape[:-1], -1, BLOCK))
            parts = self.encode_blocks(xp, x)
        return {name: xp.reshape(part, (*part.shape[:-2], -1)) for name, part in parts.items()}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        blocks = parts["scales"].shape[-1]
        cut = {name: xp.reshape(part, (*part.shape[:-1], blocks, -1)) for name, part in parts.items()}
        x = self.read_blocks(xp, cut)
        return xp.reshape(x, (*x.shape[:-2], blocks * BLOCK))

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"] | None:
        size = self._rotation(width, side)
        return hadamard.blockwise(hadamard.matrix(size) * _root(size), width) if size > 1 else None

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return float(self.depth * width), 16.0 * self.halves * width / BLOCK

    def unfit(self, layer: Layer) -> str | None:
        if layer.head_dim % BLOCK:
            return f"head_dim {layer.head_dim}; expected a multiple of {BLOCK}, the size of a block"
        return None

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(), cls(rotated=False)]

    def _rotation(self, width: int, side: Side) -> int:
        """The size of the matrix; 1 for none."""
        if not self.rotated or width % ROTATED:
            return 1
        return width & -width if side == "keys" else ROTATED


def farthest(xp: Namespace, x: Float32[Array, "*axes 32"]) -> Float32[Array, "*axes 1"]:
    """The value farthest from 0, with its sign, of equal ones the first; 0 for one below 2^-100."""
    size = xp.abs(x)
    place = xp.arange(BLOCK, dtype=xp.int32, device=device(x))
    first = xp.min(
        xp.where(size == xp.max(size, axis=-1, keepdims=True), place, BLOCK), axis=-1, keepdims=True
    )
    return xp.sum(xp.where((place == first) & (size >= LEAST), x, 0.0), axis=-1, keepdims=True)


def span(
    xp: Namespace, x: Float32[Array, "*axes 32"], most: int
) -> tuple[Float32[Array, "*axes 1"], Float32[Array, "*axes 1"]]:
    """The range over the largest code, and the minimum; an infinite range where the minimum has no float16."""
    low = xp.min(x, axis=-1, keepdims=True)
    low = xp.where(xp.abs(low) < LEAST, 0.0, low)  # of 0 and -0 libraries take either
    scale = over(xp, xp.max(x, axis=-1, keepdims=True) - low, most)
    scale = xp.where(scale < LEAST, 0.0, scale)
    return xp.where(xp.abs(low) < HALF_MOST, scale, xp.inf), low


def over(xp: Namespace, x: Float32[Array, "*axes"], most: int) -> Float32[Array, "*axes"]:
    """x / most; infinite for NaN, which infinite minima make."""
    divided = rounded(xp, quotient(xp, x, xp.full_like(x, most)))
    return xp.where(xp.isnan(divided), xp.inf, divided)


def steps(
    xp: Namespace, x: Float32[Array, "*axes 32"], scale: Float32[Array, "*axes 1"]
) -> Float32[Array, "*axes 32"]:
    """x (1 / scale), each rounded; 0 under a scale that is 0, hardly more, or infinite."""
    fine = (xp.abs(scale) >= LEAST) & (xp.abs(scale) < xp.inf)
    inverse = xp.where(fine, 1 / xp.where(fine, scale, 1.0), 0.0)
    return xp.where(fine, rounded(xp, x * inverse), 0.0)


def pack_codes(xp: Namespace, codes: UInt8[Array, "*axes 32"], depth: int) -> UInt8[Array, "*axes bytes"]:
    """Codes of 4 or 5 bits as ggml lays them: byte j of the last 16 has the low four bits of code j in its low half and
    those of code j + 16 in its high half; before them, bit k of byte j of four has the fifth bit of code 8 j + k."""
    low = packing.pack(xp, codes & 15, 4)
    if depth == 4:
        return low
    apart = xp.matrix_transpose(xp.reshape(codes >> 4, (*codes.shape[:-1], 4, 8)))
    return xp.concat([packing.pack(xp, xp.reshape(apart, codes.shape), 1), low], axis=-1)


def unpack_codes(
    xp: Namespace, packed: UInt8[Array, "*axes bytes"], depth: int
) -> Float32[Array, "*axes 32"]:
    """What `pack_codes` was given."""
    low = packing.unpack(xp, packed[..., -16:], 4)
    if depth == 4:
        return xp.astype(low, xp.float32)
    apart = packing.unpack(xp, packed[..., :4], 1)
    fifth = xp.matrix_transpose(xp.reshape(apart, (*apart.shape[:-1], 8, 4)))
    return xp.astype(low | (xp.reshape(fifth, low.shape) << 4), xp.float32)


def _root(size: int) -> float:
    return float(np.float32(size**-0.5))
