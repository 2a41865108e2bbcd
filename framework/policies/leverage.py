"""Leverage: tokens whose keys are outliers, by approximate statistical leverage (arXiv 2507.08143).

Un-rotated keys are centred over the cache and multiplied by a Gaussian matrix [head_dim, sketch] (`seed`); the score is
x (X^T X + 0.01)^-1 x, as a z-score over the heads of a layer.

Deviations: the sketch is the same for every text and differs by layer and head (the reference code draws it anew at
each call); the z-score is taken per row. The 0.01 on the diagonal is the reference code's, not the paper's.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array, device, standardised
from framework.policy import Needs, Policy, View
from framework.random import normal

JITTER = 0.01


@dataclass(frozen=True, kw_only=True)
class Leverage(Policy):
    """Keeps the keys that the others do not span."""

    sketch: int = 48
    seed: int = 0

    needs: ClassVar[Needs] = Needs(keys=True)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        keys, filled = view.unrotated(), view.filled[..., None]
        count = xp.sum(xp.astype(filled, keys.dtype), axis=2, keepdims=True)
        mean = xp.sum(xp.where(filled, keys, 0.0), axis=2, keepdims=True) / xp.where(count == 0, 1.0, count)
        shape = (keys.shape[1], keys.shape[-1], self.sketch)
        drawn = normal((self.seed, view.layer), shape).copy()  # torch warns of arrays that are read-only
        sketch = xp.asarray(drawn, dtype=keys.dtype, device=device(keys))
        x = xp.matmul(xp.where(filled, keys - mean, 0.0), sketch[None, ...] * self.sketch**-0.5)
        diagonal = JITTER * xp.eye(self.sketch, dtype=x.dtype, device=device(x))
        gram = xp.matmul(xp.matrix_transpose(x), x) + diagonal
        through = xp.matrix_transpose(xp.linalg.solve(gram, xp.matrix_transpose(x)))
        return standardised(xp, xp.sum(x * through, axis=-1), view.filled)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, sketch=3), cls(budget=7, sketch=4, seed=2, interval=3)]
