"""SnapKV: the tokens that the last queries attend to, smoothed over neighbours (arXiv 2404.14469).

The score is the mean attention of the newest `window` queries, pooled along positions; the tokens of the window itself
stay. Defaults are the paper's LongBench setting (window 32, kernel 7, maximum); the class in the reference code has
window 64, kernel 5, mean: `snapkv(window=64, kernel=5, pooling="mean")`.

Deviations: with grouped queries the mean over the query heads of a kv head decides (the reference code repeats the
cache for each query head). At decode, which the paper leaves alone, the same rule runs on the newest `window` queries,
whichever call they came in.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float

from framework.arrays import Array, pool
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Keeps the last `window` tokens and what their queries attend to."""

    window: int = 32
    kernel: int = 7
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or self.pooling not in ("max", "mean"):
            raise KvtwinError(
                f"snapkv has window={self.window}, kernel={self.kernel}, pooling={self.pooling!r}; "
                'expected window >= 1, an odd kernel, pooling "max" or "mean"'
            )

    @property
    def needs(self) -> Needs:
        return Needs(queries=self.window)

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        observed = xp.sum(view.attention(), axis=3) / self.window
        outside = xp.astype(~self.protected(view), observed.dtype)
        return xp.mean(
            pool(xp, observed * outside[:, :, None, :], self.kernel, self.pooling == "max"), axis=2
        )

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.newest(self.window)

    def protects(self, budget: int) -> int:
        return self.window

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, window=4, kernel=3),
            cls(budget=11, window=3, kernel=5, pooling="mean", interval=5),
        ]
