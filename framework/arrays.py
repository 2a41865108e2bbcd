"""The few array operations that the array API standard lacks, or that are slow through it.

Every function takes the namespace `xp` first (array-api-compat's NumPy or torch, jax.numpy, array-api-strict) and uses
nothing outside the standard, except `torch.gather`, four times faster than take_along_axis through array-api-compat,
and what writes to named places, which the standard has not.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Array = Any
Namespace = ModuleType

FAR = 2**31 - 1  # beyond any position


def device(x: Array) -> Any:
    """Where an array lives; None for a traced one, which has no place yet, and for one that lies on several devices."""
    place = getattr(x, "device", None)
    return None if hasattr(place, "device_set") else place  # jax gives a sharding for several


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


def spread(
    xp: Namespace,
    size: int,
    index: Int[Array, "batch kv_heads n"],
    x: Shaped[Array, "batch kv_heads n"],
    empty: float | int,
) -> Shaped[Array, "batch kv_heads {size}"]:
    """`x` at the places that `index` names, -1 for nowhere, and `empty` where it names none. No place comes twice."""
    index = xp.astype(xp.where(index < 0, size, index), xp.int64 if hasattr(xp, "gather") else xp.int32)
    out = xp.full((*index.shape[:2], size + 1), empty, dtype=x.dtype, device=device(x))
    if hasattr(xp, "scatter"):
        out = xp.scatter(out, 2, index, x)
    elif hasattr(out, "at"):
        row, head = xp.arange(index.shape[0])[:, None, None], xp.arange(index.shape[1])[None, :, None]
        out = out.at[row, head, index].set(x)
    else:
        np.put_along_axis(out, index, x, axis=2)
    return out[..., :size]


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


def standardised(
    xp: Namespace, x: Float[Array, "batch kv_heads slots"], mask: Bool[Array, "batch kv_heads slots"]
) -> Float[Array, "batch kv_heads slots"]:
    """z-scores: x less its mean, over its standard deviation (n - 1), both over the masked entries of each row.

    0 elsewhere, and where all are equal.
    """
    count = xp.sum(xp.astype(mask, x.dtype), axis=(1, 2), keepdims=True)
    mean = xp.sum(xp.where(mask, x, 0.0), axis=(1, 2), keepdims=True) / xp.where(count == 0, 1.0, count)
    apart = xp.where(mask, x - mean, 0.0)
    deviation = xp.sqrt(
        xp.sum(apart * apart, axis=(1, 2), keepdims=True) / xp.where(count < 2, 1.0, count - 1)
    )
    alike = deviation < 1e-6  # of equal scores rounding alone would be left
    return xp.where(alike, 0.0, apart / xp.where(alike, 1.0, deviation))


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


def when(
    xp: Namespace, needed: Bool[Array, ""], f: Callable[[], Array], otherwise: Array
) -> Shaped[Array, "*result"]:
    """What `f` gives, computed only where it is needed, and otherwise something of the same shape and dtype."""
    library = sys.modules[xp.__name__.partition(".")[0]]  # imported already, since xp is part of it
    if hasattr(library, "lax"):
        return library.lax.cond(needed, f, lambda: otherwise)
    return f() if bool(needed) else otherwise


def blocks(
    xp: Namespace, f: Callable[[Array], Array], x: Array, size: int, axis: int, out: int
) -> Shaped[Array, "*result"]:
    """`f` over `x` in pieces of at most `size` along `axis`, joined along axis `out` of the results.

    For what would be too large at once. One piece has the shape of every other: the last one is padded with zeros, and
    what `f` makes of them is cut off. In jax one loop is compiled, not one piece after the other.
    """
    total = x.shape[axis]
    if total <= size:
        return f(x)
    count = -(-total // size)
    pad = xp.zeros(
        (*x.shape[:axis], count * size - total, *x.shape[axis + 1 :]), dtype=x.dtype, device=device(x)
    )
    x = xp.concat([x, pad], axis=axis)
    x = xp.reshape(x, (*x.shape[:axis], count, size, *x.shape[axis + 1 :]))
    pieces = xp.moveaxis(x, axis, 0)
    library = sys.modules[xp.__name__.partition(".")[0]]  # imported already, since xp is part of it
    if hasattr(library, "lax"):
        made = library.lax.map(f, pieces)
    else:
        made = xp.stack([f(pieces[piece, ...]) for piece in range(count)])
    made = xp.moveaxis(made, 0, out)
    made = xp.reshape(made, (*made.shape[:out], count * size, *made.shape[out + 2 :]))
    return made[(slice(None),) * out + (slice(0, total), ...)]
