"""Keys and values in 2 to 8 bits each, rotated, with a scale for 32 numbers: ExLlamaV3's cache since July 2026.

Each 32 consecutive numbers of a token's row of heads are rotated by the Hadamard matrix over the root of 32, in
float32; s is their largest absolute value plus 1e-10 and m is 2^(bits - 1). A code is floor(v / s * m + m), clipped to
0 .. 2m - 1, and stands for the middle of its interval, (code - m + 1/2) / m * s with s in float16. Numbers beyond
float16 give a scale that is not finite. A group of n bits is 4n bytes, in the planes of `framework/packing.py`.

Source: ExLlamaV3, the grid of commits 84c3900 and e69b817. Deviations: no compander, which is off there by default; how
planes lie in a group is ours; what is read is rotated back in float32.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.errors import KvtwinError
from framework.hadamard import blockwise, matrix, transform
from framework.packing import pack, pieces, planes
from framework.rounding import half, largest, quotient, rounded
from framework.spec import Layer

GROUP = 32
ROOT = 1 / math.sqrt(GROUP)


@dataclass(frozen=True, kw_only=True)
class Exl3(Codec):
    """`k_bits` for keys, `v_bits` for values, and half a bit for scales."""

    k_bits: int = 4
    v_bits: int = 4

    def __post_init__(self) -> None:
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise KvtwinError(f"exl3 has {name}={bits!r}; expected an integer from 2 to 8")

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        axes, width, middle = x.shape[:-1], x.shape[-1], 2.0 ** (self._bits(side) - 1)
        groups = transform(xp, xp.reshape(rounded(xp, x), (*axes, width // GROUP, GROUP))) * ROOT
        most = largest(xp, groups) + 1e-10
        ratio = xp.where(xp.isfinite(most), quotient(xp, groups, most), 0.0)
        codes = xp.clip(xp.floor(ratio * middle + middle), 0.0, 2 * middle - 1)
        packed = pack(xp, xp.astype(codes, xp.uint8), self._bits(side))
        return {
            "codes": xp.reshape(packed, (*axes, width * self._bits(side) // 8)),
            "scales": half(xp, most[..., 0]),
        }

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        """The rotated numbers, the first pieces of all groups before the second ones."""
        made = self.pieces(xp, parts, side)
        return made[0] if len(made) == 1 else xp.concat(made, axis=-1)

    def pieces(self, xp: Namespace, parts: Parts, side: Side) -> list[Float[Array, "*axes n"]]:
        bits = self._bits(side)
        middle = 2.0 ** (bits - 1)
        step = (xp.astype(parts["scales"], xp.float32) * (1 / middle))[..., None]
        *axes, groups, _ = step.shape
        made = []
        for codes in pieces(xp, xp.reshape(parts["codes"], (*axes, groups, GROUP * bits // 8)), bits):
            x = xp.astype(codes, xp.float32)
            x -= middle - 0.5
            x *= step
            made.append(xp.reshape(x, (*axes, groups * codes.shape[-1])))
        return made

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"]:
        each = planes(self._bits(side))[0] * GROUP // 8
        made = blockwise(matrix(GROUP) * np.float32(ROOT), width)
        return made.reshape(-1, GROUP // each, each, width).swapaxes(0, 1).reshape(width, width)

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return float(width * self._bits(side)), 16.0 * width / GROUP

    def joint(self, layer: Layer) -> bool:
        return layer.head_dim % GROUP != 0

    def unfit(self, layer: Layer) -> str | None:
        if layer.kv_heads * layer.head_dim % GROUP == 0:
            return None
        return (
            f"{layer.kv_heads} kv heads of head_dim {layer.head_dim} are "
            f"{layer.kv_heads * layer.head_dim} numbers; expected a multiple of {GROUP}"
        )

    def _bits(self, side: Side) -> int:
        return self.k_bits if side == "keys" else self.v_bits

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(), cls(k_bits=5, v_bits=2), cls(k_bits=7, v_bits=3), cls(k_bits=8, v_bits=6)]
