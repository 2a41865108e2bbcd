"""ChunkKV: tokens live and die in chunks, so that what belongs together stays together (arXiv 2502.00299).

The text is cut into chunks of `chunk` positions from its start. Every token of a chunk has the same score: the mean of
the inner policy's scores over the tokens of the chunk that are still held, summed over the heads of the layer. All
heads keep the same tokens.

Deviations: the budget is met to the token, so that it may cut a chunk, of which the newer part then stays (the
reference code keeps whole chunks). What the inner policy protects stays by itself and is left out of the mean. At
decode the chunk that is being written counts as one.
"""

from dataclasses import dataclass

from jaxtyping import Float

from framework.arrays import Array, device
from framework.errors import KvtwinError
from framework.policies.key_norm import KeyNorm
from framework.policies.snapkv import SnapKV
from framework.policy import Policy, View
from framework.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Chunked(Wrapper):
    """Keeps the chunks of consecutive positions whose tokens score best on average, one set for all heads."""

    chunk: int = 20

    order_free = False
    shared = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise KvtwinError(f"chunked has chunk={self.chunk}; expected at least 1 position")

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, inner = view.xp, self.inside(view)
        scores, protected = self.policy.score(inner), self.policy.protected(inner)
        dtype = scores.dtype if xp.isdtype(scores.dtype, "real floating") else xp.float32
        counts = view.filled if protected is None else view.filled & ~protected
        total = xp.sum(xp.where(counts, xp.astype(scores, dtype), 0.0), axis=1)
        ones = xp.astype(counts[:, 0, :], dtype)
        number = xp.where(view.filled, view.positions // self.chunk, -1)[:, 0, :]
        # Each slot adds its chunk's tokens up in the order of their positions: the same bits for all of them.
        edge = xp.full((number.shape[0], self.chunk - 1), -2, dtype=number.dtype, device=device(number))
        zero = xp.zeros(edge.shape, dtype=dtype, device=device(number))
        wide = xp.concat([edge, number, edge], axis=-1)
        sums, members = (xp.concat([zero, one, zero], axis=-1) for one in (total, ones))
        value, size = xp.zeros_like(total), xp.zeros_like(ones)
        for shift in range(2 * self.chunk - 1):
            here = slice(shift, shift + number.shape[-1])
            same = wide[:, here] == number
            value = value + xp.where(same, sums[:, here], 0.0)
            size = size + xp.where(same, members[:, here], 0.0)
        mean = value / xp.where(size == 0, 1.0, size)
        return xp.broadcast_to(mean[:, None, :], view.positions.shape)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, chunk=4, policy=KeyNorm()),
            cls(budget=8, chunk=3, policy=SnapKV(window=2, kernel=1), interval=3),
        ]
