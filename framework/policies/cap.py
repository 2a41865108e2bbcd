"""CapKV: the tokens whose values the others, weighed by their relevance, do not span (arXiv 2604.25975).

The mean of the un-rotated queries of a head, the first `sinks` left out, turned by the mean of the next `future`
rotations, is its anchor; a token's relevance is w = exp(tau * (cos - max cos)) of the cosine between key and anchor.
With A = I + sum (w + 1e-6) v v^T the score is w * v^T A^-1 v, averaged over the group. The first `sinks` tokens stay.

Deviations: the paper takes products of keys and queries as they are; cosines, the largest taken off, and the rotation
are other libraries' additions. At decode the mean goes on over all queries of the text, and the rotations are those of
the true next positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float

from framework.arrays import Array, device
from framework.errors import KvtwinError
from framework.policies.expected_attention import ExpectedAttention
from framework.policies.keydiff import unit
from framework.policy import Block, Needs, Policy, View
from framework.spec import Layer

EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cap(Policy):
    """Keeps values that relevant tokens do not span."""

    sinks: int = 4
    future: int = 512
    tau: float | int = 5

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.future < 1 or self.tau < 0:
            raise KvtwinError(
                f"cap has sinks={self.sinks}, future={self.future}, tau={self.tau}; "
                "expected sinks >= 0, future >= 1, tau >= 0"
            )

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, values=True, stream=True, ahead=self.future)

    @property
    def _statistics(self) -> ExpectedAttention:
        return ExpectedAttention(sinks=self.sinks, future=self.future, covariance=False)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return self._statistics.head_memory(layer)

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        return self._statistics.stream(view, block)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        ahead = xp.arange(self.future, dtype=xp.int32, device=device(view.positions))
        turn = view.mean_rotation(view.seen[:, None] + ahead)[:, None, ...]
        anchor = unit(xp, xp.matmul(view.memory["mean"], xp.matrix_transpose(turn)))
        spared = (view.filled & (view.positions >= self.sinks))[:, :, None, :]
        cosine = xp.where(spared, xp.matmul(anchor, xp.matrix_transpose(unit(xp, view.keys))), -1.0)
        weight = xp.where(spared, xp.exp(self.tau * (cosine - xp.max(cosine, axis=-1, keepdims=True))), 0.0)
        values = xp.where(spared[..., None], view.values[:, :, None, ...], 0.0)
        transposed = xp.matrix_transpose(values)
        eye = xp.eye(values.shape[-1], dtype=values.dtype, device=device(values))
        spanned = eye + xp.matmul(transposed, values * (weight + EPSILON)[..., None])
        through = xp.matmul(values, xp.linalg.inv(spanned))
        return xp.mean(weight * xp.sum(through * values, axis=-1), axis=2)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, sinks=2, future=16),
            cls(budget=8, sinks=1, future=5, tau=1, interval=3),
        ]
