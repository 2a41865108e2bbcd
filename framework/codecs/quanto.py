"""Groups of a vector in 2 or 4 bits, a float32 scale and shift each: transformers' QuantizedCache by optimum-quanto.

A group is `group` consecutive numbers of a token's head (axis 0). Its shift is minus its minimum, its scale its range
over 2^bits - 1; a code is round((x + shift) / scale), ties to even, from 0 to 2^bits - 1, read as code * scale - shift.
A group of equal numbers has the scale 0 and the codes 0, and is read exactly. Scales and shifts are float32, as
optimum-quanto has them for a float32 model: 64 bits a group, one more for each number in groups of 64.

Source: optimum-quanto 0.2.7 (MaxOptimizer, quantize_weight) as transformers' QuantoQuantizedLayer calls it. Deviations:
transformers keeps up to 128 tokens behind the first call exact, and when they are full codes the whole cache again from
what it reads; here a token is coded once, at the end of its own call. Its groups run on over tokens and heads where
head_dim is no multiple of `group`, which is refused here. For a model of 16 bits optimum-quanto computes and stores
scales and shifts in these 16. How codes lie in bytes is ours. Minima and scales below 2^-100 are 0, since XLA takes
numbers below 2^-126 for 0; minima and ranges from 2^126 on are refused, before what is read is infinite.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from framework.arrays import Array, Namespace
from framework.codec import Codec, Parts, Side
from framework.errors import KvtwinError
from framework.packing import pack, pieces
from framework.rounding import quotient, rounded
from framework.spec import Layer

LEAST, MOST = 2.0**-100, 2.0**126


@dataclass(frozen=True, kw_only=True)
class Quanto(Codec):
    """`bits` a code, and two float32 numbers for `group` of them."""

    bits: int = 4
    group: int = 64

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise KvtwinError(f"quanto has bits={self.bits!r}; expected 2 or 4")
        if not isinstance(self.group, int) or self.group < 4 or self.group % 4:
            raise KvtwinError(f"quanto has group={self.group!r}; expected a positive multiple of 4")

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        axes, width = x.shape[:-1], x.shape[-1]
        x = xp.reshape(x, (*axes, width // self.group, self.group))
        finite = xp.all(xp.isfinite(x), axis=-1, keepdims=True)
        x = xp.where(finite, x, 0.0)  # the choice also has x rounded before anything is added to it
        low = xp.min(x, axis=-1, keepdims=True)
        shift = xp.where(xp.abs(low) < LEAST, 0.0, -low)
        with np.errstate(over="ignore"):
            span = xp.max(x, axis=-1, keepdims=True) + shift
        fits = finite & (span < MOST) & (xp.abs(low) < MOST)
        size = quotient(xp, span, xp.full_like(span, 2.0**self.bits - 1))
        scale = xp.where(fits, xp.where(size < LEAST, 0.0, size), xp.inf)
        usable = fits & (scale > 0)
        ratio = quotient(xp, xp.where(usable, x + shift, 0.0), xp.where(usable, scale, 1.0))
        codes = xp.astype(xp.clip(xp.round(ratio), 0.0, 2.0**self.bits - 1), xp.uint8)
        return {
            "codes": pack(xp, xp.reshape(codes, (*axes, width)), self.bits),
            "scales": scale[..., 0],
            "shifts": shift[..., 0],
        }

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        made = self.pieces(xp, parts, side)
        return made[0] if len(made) == 1 else xp.concat(made, axis=-1)

    def pieces(self, xp: Namespace, parts: Parts, side: Side) -> list[Float[Array, "*axes n"]]:
        codes, scales, shifts = pieces(xp, parts["codes"], self.bits), parts["scales"], parts["shifts"]
        count = codes[0].shape[-1]
        if count % self.group and self.group % count:  # a group begins or ends within a piece
            codes = [xp.concat(codes, axis=-1)]
            count = codes[0].shape[-1]
        made, groups = [], max(1, count // self.group)
        for number, piece in enumerate(codes):
            first = number * count // self.group
            scale, shift = (each[..., first : first + groups] for each in (scales, shifts))
            x = xp.astype(piece, xp.float32)
            if groups > 1:
                x = xp.reshape(x, (*piece.shape[:-1], groups, self.group))
                scale, shift = scale[..., None], shift[..., None]
            x *= scale
            x = rounded(xp, x)
            x -= shift
            made.append(x if groups == 1 else xp.reshape(x, piece.shape))
        return made

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return float(self.bits * width), 64.0 * width / self.group

    def unfit(self, layer: Layer) -> str | None:
        if layer.head_dim % self.group:
            return f"head_dim {layer.head_dim}; expected a multiple of group={self.group}"
        return None

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(), cls(bits=2, group=32)]
