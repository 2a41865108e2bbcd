"""The few array operations that the array API standard lacks, or that are slow through it.

Every function takes the namespace `xp` first (array-api-compat's NumPy or torch, jax.numpy, array-api-strict) and uses
nothing outside the standard, except `torch.gather`, four times faster than take_along_axis through array-api-compat.
"""

from types import ModuleType
from typing import Any

from jaxtyping import Bool, Float, Int, Shaped

Array = Any
Namespace = ModuleType

FAR = 2**31 - 1  # beyond any position


def device(x: Array) -> Any:
    """Where an array lives; None for a traced one, which has no place yet."""
    return getattr(x, "device", None)


def take_slots(
    xp: Namespace, x: Shaped[Array, "batch kv_heads slots *rest"], index: Int[Array, "batch kv_heads kept"]
) -> Shaped[Array, "batch kv_heads kept *rest"]:
    """The slots that `index` names, per row and head. Entries of -1 give slot 0: mask them with `keep`."""
    index = xp.where(index < 0, 0, index)
    if x.ndim > 3:
        index = xp.broadcast_to(index[..., None], (*index.shape, x.shape[-1]))
    if hasattr(xp, "gather"):
        return xp.gather(x, 2, xp.astype(index, xp.int64))
    return xp.take_along_axis(x, index, axis=2)


def keep(
    xp: Namespace,
    x: Shaped[Array, "batch kv_heads slots *rest"],
    index: Int[Array, "batch kv_heads kept"],
    empty: float | int,
) -> Shaped[Array, "batch kv_heads kept *rest"]:
    """`take_slots`, with `empty` where the index is -1."""
    taken = take_slots(xp, x, index)
    hole = index < 0
    if x.ndim > 3:
        hole = hole[..., None]
    return xp.where(hole, empty, taken)


def softmax(
    xp: Namespace, x: Float[Array, "*axes slots"], mask: Bool[Array, "*#axes slots"]
) -> Float[Array, "*axes slots"]:
    """Softmax along the last axis over the entries where `mask` is True; a row without any gives 0."""
    x = xp.where(mask, x, -xp.inf)
    top = xp.max(x, axis=-1, keepdims=True)
    top = xp.where(xp.isfinite(top), top, 0.0)
    e = xp.exp(x - top)
    total = xp.sum(e, axis=-1, keepdims=True)
    return e / xp.where(total == 0, 1.0, total)


def pool(
    xp: Namespace, x: Float[Array, "*axes slots"], kernel: int, maximum: bool = False
) -> Float[Array, "*axes slots"]:
    """Mean (or maximum) over `kernel` neighbouring slots, an odd number, with zeros beyond both ends."""
    side = kernel // 2
    edge = xp.zeros((*x.shape[:-1], side), dtype=x.dtype, device=device(x))
    wide = xp.concat([edge, x, edge], axis=-1)
    result = wide[..., : x.shape[-1]]
    for shift in range(1, 2 * side + 1):
        shifted = wide[..., shift : shift + x.shape[-1]]
        result = xp.maximum(result, shifted) if maximum else result + shifted
    return result if maximum else result / kernel


def by_position(
    xp: Namespace, positions: Int[Array, "batch kv_heads slots"]
) -> Int[Array, "batch kv_heads slots"]:
    """Index that puts the slots in position order, the empty ones last."""
    return xp.argsort(xp.where(positions < 0, FAR, positions), axis=-1)
