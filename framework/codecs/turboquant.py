"""TurboQuant: vectors rotated at random, and the codebook that is best for their coordinates (arXiv 2504.19874).

A vector is stored as its norm, in float16, and the coordinates of the rotated vector over that norm, each as the
nearest of 2^bits numbers: the Lloyd-Max codebook of a coordinate of a random unit vector. The rotation is fixed by
the seed, one for keys and values of all layers.

`residual=True` is the paper's variant for inner products, for keys: one bit less, and in its place the sign of each
coordinate of what is left, rotated once more, beside its norm in float16. A sign stands for this norm over d times the
mean absolute coordinate of a random unit vector in d dimensions, so that inner products are right on average over
seeds.

Deviations: both rotations are those of framework/random_rotation.py, where the paper draws one from all of them and
multiplies what is left by a matrix of normal numbers; the factor of the signs is therefore the exact one for a
rotation, and inner products vary less. Vectors are divided by the norm as it is stored. The paper's split of channels,
with more bits for outliers, is not done.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from framework.arrays import Array, Namespace, device
from framework.codec import Codec, Parts, Side
from framework.errors import KvtwinError
from framework.lloyd_max import codebook
from framework.packing import pack, unpack
from framework.random_rotation import matrix, restored, rotated, stretch
from framework.rounding import rounded as once
from framework.short_norm import short_norm
from framework.spec import Layer

MOST = 6  # bits


@dataclass(frozen=True, kw_only=True)
class TurboQuant(Codec):
    """Random rotation and the codebook that is best for it; `residual` is for keys, and takes one of their bits."""

    bits: int = 4
    seed: int = 0
    residual: bool = False

    def __post_init__(self) -> None:
        least = 2 if self.residual else 1
        for name, kind in (("bits", int), ("seed", int), ("residual", bool)):
            if type(value := getattr(self, name)) is not kind:
                raise KvtwinError(f"turboquant has {name}={value!r}; expected {kind.__name__}")
        if self.bits not in range(least, MOST + 1):
            raise KvtwinError(
                f"turboquant has bits={self.bits!r}, residual={self.residual}; "
                f"expected an integer from {least} to {MOST}"
            )

    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        width, depth = x.shape[-1], self._depth(side)
        norms = short_norm(xp, x)
        length = xp.astype(norms, xp.float32)
        usable = (length > 0) & xp.isfinite(length)
        inverse = 1 / once(xp, xp.where(usable, length, 1.0) * stretch(width))
        with np.errstate(over="ignore", invalid="ignore"):
            turned = rotated(xp, xp.where(usable, x, 0.0), (self.seed, 0))
        unit = once(xp, turned * inverse)
        means, bounds = (xp.asarray(each, device=device(x)) for each in codebook(width, depth))
        codes = xp.astype(xp.searchsorted(bounds, unit), xp.uint8)
        parts = {"scales": norms}
        if depth < self.bits:
            left = unit - means[xp.astype(codes, xp.int32)]
            parts["residuals"] = short_norm(xp, left)
            signs = rotated(xp, left, (self.seed, 1)) > 0
            codes = codes | (xp.astype(signs, xp.uint8) << depth)
        return {"codes": pack(xp, codes, self.bits), **parts}

    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        codes, depth = unpack(xp, parts["codes"], self.bits), self._depth(side)
        width = codes.shape[-1]
        means = xp.asarray(codebook(width, depth)[0], device=device(codes))
        unit = means[xp.astype(codes & (2**depth - 1), xp.int32)]
        if depth == self.bits:
            return unit
        signs = 2 * xp.astype(codes >> depth, xp.float32) - 1
        size = xp.astype(parts["residuals"], xp.float32) * _length_of_signs(width)
        return unit + once(xp, restored(xp, signs, (self.seed, 1)) * size)

    def scale(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes"]:
        return xp.astype(parts["scales"][..., 0], xp.float32)

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"]:
        return matrix(width, (self.seed, 0)).T

    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        return float(self.bits * width), 16.0 if self._depth(side) == self.bits else 32.0

    def unfit(self, layer: Layer) -> str | None:
        if layer.head_dim % 8:
            return f"head_dim {layer.head_dim}; expected a multiple of 8"
        return None

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(), cls(bits=2, seed=7), cls(bits=3, residual=True)]

    def _depth(self, side: Side) -> int:
        """The bits of a number's place in the codebook."""
        return self.bits - 1 if self.residual and side == "keys" else self.bits


def _length_of_signs(width: int) -> float:
    """What makes a vector of signs, `stretch` times as long, that much of what was left on average."""
    mean = math.exp(math.lgamma(width / 2) - math.lgamma((width + 1) / 2)) / math.sqrt(math.pi)
    return 1 / (width * mean * stretch(width))
