"""Merge: an evicted value is blended into the kept one whose key is most like its own (arXiv 2210.09461, 2406.13035).

Around the policy that decides who stays. Each evicted token finds, in its head, the kept key of the largest cosine.
Where that is at least `threshold` its value joins that slot's with the weight cosine x |v| / (|v| + |kept v|), and the
sum is divided by 1 + all weights. `share` below 1 merges only that part of the evicted, the most similar. Keys stay as
they are. This is kvpress' MergingPress, a form simpler than either paper's.

Deviations: with `share` the count is 1 + share x (evicted - 1), rounded down, which is what its quantile gives. Tokens
that a sliding window has left leave no trace. Merging goes on at decode, with the values as they were merged before.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int

from framework.arrays import Array, blocks, device, keep, take_slots
from framework.errors import KvtwinError
from framework.eviction import alive, placed
from framework.policies.h2o import H2O
from framework.policies.keydiff import unit
from framework.policies.snapkv import SnapKV
from framework.policy import BLOCK, Merged, Needs, Policy, View
from framework.wrapper import Wrapper, both

TINY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Merge(Wrapper):
    """Folds evicted values into similar ones that stay."""

    threshold: float | int = 0.0
    share: float | int = 1.0

    order_free = False
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.threshold <= 1 and 0 < self.share <= 1):
            raise KvtwinError(
                f"merge has threshold={self.threshold}, share={self.share}; expected a cosine from 0 to 1, and a share "
                "above 0, at most 1"
            )

    @property
    def needs(self) -> Needs:
        return both(self.policy.needs, Needs(keys=True, values=True))

    def merge(self, view: View, index: Int[Array, "batch kv_heads kept"]) -> Merged:
        xp = view.xp
        keys, values = keep(xp, view.keys, index, 0.0), keep(xp, view.values, index, 0.0)
        cosine, target = nearest(view, index, keys)
        evicted = alive(view.positions, view.seen, view.window) & ~is_kept(view, index)
        merges = evicted & (cosine >= self.threshold)
        if self.share < 1:
            count = xp.sum(xp.astype(evicted, xp.float32), axis=-1, keepdims=True)
            most = xp.astype((count - 1) * self.share, xp.int32) + 1
            merges = merges & (placed(xp, cosine, None, evicted) < most)
        length, room = norm(view, view.values), take_slots(xp, norm(view, values), target)
        weight = xp.where(cosine > 0, cosine, 0.0) * length / (length + room + TINY)
        weight = xp.where(merges, weight, 0.0)
        added, total = poured(view, to_target(view, target, weight), index.shape[-1], view.values)
        return keys, (values + added) / (1.0 + total)[..., None], {}

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, policy=SnapKV(window=3, kernel=3)),
            cls(budget=8, threshold=0.3, share=0.6, policy=H2O(), interval=3),
        ]


def blended(
    view: View,
    index: Int[Array, "batch kv_heads kept"],
    target: Int[Array, "batch kv_heads slots"],
    weight: Float[Array, "batch kv_heads slots"],
    own: float,
) -> tuple[Float[Array, "batch kv_heads kept head_dim"], Float[Array, "batch kv_heads kept head_dim"]]:
    """Keys and values of the kept slots, weight `own`, averaged with those of the slots that have them as target."""
    xp = view.xp
    added, total = poured(view, to_target(view, target, weight), index.shape[-1], view.keys, view.values)
    stays = xp.concat([keep(xp, one, index, 0.0) for one in (view.keys, view.values)], axis=-1)
    both = (own * stays + added) / (own + total)[..., None]
    both = xp.where((total > 0)[..., None], both, stays)  # what takes nothing in stays to the last bit
    head_dim = view.keys.shape[-1]
    return both[..., :head_dim], both[..., head_dim:]


def norm(view: View, x: Float[Array, "*axes head_dim"]) -> Float[Array, "*axes"]:
    """Euclidean lengths."""
    return view.xp.sqrt(view.xp.sum(x * x, axis=-1))


def numbers(view: View, count: int) -> Int[Array, "batch kv_heads {count}"]:
    """0, 1, 2, ... for each row and head."""
    every = view.xp.arange(count, dtype=view.xp.int32, device=device(view.positions))
    return view.xp.broadcast_to(every, (*view.positions.shape[:2], count))


def is_kept(view: View, index: Int[Array, "batch kv_heads kept"]) -> Bool[Array, "batch kv_heads slots"]:
    """True for the slots that `index` names."""
    xp = view.xp

    def found(number: Array) -> Array:
        return xp.any(number[..., None] == index[:, :, None, :], axis=-1)

    return blocks(xp, found, numbers(view, view.positions.shape[-1]), size=BLOCK, axis=2, out=2)


def nearest(
    view: View, index: Int[Array, "batch kv_heads kept"], keys: Float[Array, "batch kv_heads kept head_dim"]
) -> tuple[Float[Array, "batch kv_heads slots"], Int[Array, "batch kv_heads slots"]]:
    """The largest cosine of each slot's key with a kept one, and the number of that one; the oldest of equals."""
    xp = view.xp
    others = xp.matrix_transpose(unit(xp, keys))

    def best(own: Array) -> Array:
        cosine = xp.where(index[:, :, None, :] >= 0, xp.matmul(own, others), -2.0)
        place = xp.astype(xp.argmax(cosine, axis=-1), cosine.dtype)
        return xp.stack([xp.max(cosine, axis=-1), place], axis=-1)

    made = blocks(xp, best, unit(xp, view.keys), size=BLOCK, axis=2, out=2)
    return made[..., 0], xp.astype(made[..., 1], xp.int32)


def to_target(
    view: View,
    target: Int[Array, "batch kv_heads slots"],
    weight: Float[Array, "batch kv_heads slots"],
) -> Callable[[Array], Array]:
    """For `poured`: each slot with its weight into one kept slot, and nothing into the others."""

    def into(number: Array) -> Array:
        return view.xp.where(target[:, :, None, :] == number[..., None], weight[:, :, None, :], 0.0)

    return into


def poured(
    view: View,
    into: Callable[[Array], Array],
    kept: int,
    *sources: Float[Array, "batch kv_heads slots width"],
) -> tuple[Float[Array, "batch kv_heads {kept} widths"], Float[Array, "batch kv_heads {kept}"]]:
    """What each kept slot receives of all slots' keys or values, side by side, and the sum of the weights.

    `into` gives the weights [batch kv_heads some slots] of the slots in some of the kept ones, by their number.
    """
    xp = view.xp
    ones = xp.astype(view.filled, sources[0].dtype)[..., None]
    source = xp.concat([*(xp.where(view.filled[..., None], one, 0.0) for one in sources), ones], axis=-1)
    made = blocks(
        xp, lambda some: xp.matmul(into(some), source), numbers(view, kept), size=BLOCK, axis=2, out=2
    )
    return made[..., :-1], made[..., -1]
