"""CurDKV: tokens with long keys and long values, compared with their neighbours (arXiv 2509.15038).

|k|^2 and |v|^2, each divided by its sum over a window of `kernel` tokens, are approximate leverage scores; the score is
their product, or by `kind` the one, the other or their mean, over its sum. The first `sinks` tokens stay.

Deviations: windows are counted among the tokens that a head holds, so that the rule can run again at decode. The
variant that projects keys and values at random first is left out.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool, Float

from framework.arrays import Array, device
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class Cur(Policy):
    """Keeps what is long beside its neighbours."""

    sinks: int = 4
    kernel: int = 16
    kind: Literal["key", "value", "mean", "product"] = "product"

    needs: ClassVar[Needs] = Needs(keys=True, values=True)

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.kernel < 1 or self.kind not in ("key", "value", "mean", "product"):
            raise KvtwinError(
                f"cur has sinks={self.sinks}, kernel={self.kernel}, kind={self.kind!r}; "
                'expected sinks >= 0, kernel >= 1, kind "key", "value", "mean" or "product"'
            )

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        key, value = self._share(view, view.keys), self._share(view, view.values)
        kinds = {"key": key, "value": value, "mean": (key + value) / 2, "product": key * value}
        score = kinds[self.kind]
        total = view.xp.sum(score, axis=-1, keepdims=True)
        return score / view.xp.where(total == 0, 1.0, total)

    def _share(
        self, view: View, x: Float[Array, "batch kv_heads slots dim"]
    ) -> Float[Array, "batch kv_heads slots"]:
        """The squared length of each vector over the sum of its window's."""
        xp, (batch, heads, slots, _) = view.xp, x.shape
        squares = xp.where(view.filled, xp.sum(x * x, axis=-1), 0.0)
        pad = xp.zeros((batch, heads, -slots % self.kernel), dtype=x.dtype, device=device(x))
        windows = xp.reshape(xp.concat([squares, pad], axis=-1), (batch, heads, -1, self.kernel))
        total = xp.sum(windows, axis=-1, keepdims=True)
        shares = windows / xp.where(total == 0, 1.0, total)
        return xp.reshape(shares, (batch, heads, -1))[..., :slots]

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, sinks=2, kernel=4), cls(budget=8, sinks=1, kernel=3, kind="mean", interval=3)]
