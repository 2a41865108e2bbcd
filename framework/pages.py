"""Pages: heads of different lengths in one run of places, one head behind the other, each on whole pages of its own.

A layer whose heads have different budgets would otherwise be as wide as its largest head. Slot s of a head lies at
place `first + s`, and `first` is a multiple of the page: attention is one product per page, and which head owns a page
is data, so that nothing is compiled anew when the budgets move.
"""

from dataclasses import dataclass

from jaxtyping import Int, Shaped

from framework.arrays import Array, Namespace, device
from framework.shapes import bucket


@dataclass(frozen=True)
class Pages:
    """The shape of a run: `count` pages of `size` places; each head has `spare` slots free when it is laid out."""

    size: int
    count: int
    spare: int

    @property
    def places(self) -> int:
        return self.size * self.count


def pages(total: int, heads: int, spare: int, growth: int) -> Pages:
    """Room for heads that hold `total` tokens together, however they are divided, and up to `growth` more each.

    A page is at most an eighth of the mean head, so that half-empty last pages cost little.
    """
    mean = bucket(-(-total // heads))
    size = max(8, min(256, 1 << (mean // 8).bit_length() >> 1))
    return Pages(size, heads + (heads * (mean + growth + spare - 1)) // size, spare)


def first_places(
    xp: Namespace, counts: Int[Array, "batch kv_heads"], layout: Pages
) -> Int[Array, "batch kv_heads"]:
    """Where each head begins, if it is to hold `counts` tokens and the spare ones."""
    taken = (counts + layout.spare + layout.size - 1) // layout.size
    flat = xp.reshape(taken, (-1,))
    first = (xp.cumulative_sum(flat, axis=0) - flat) * layout.size
    return xp.astype(xp.reshape(first, counts.shape), xp.int32)


def owners(xp: Namespace, first: Int[Array, "batch kv_heads"], layout: Pages) -> Int[Array, "pages"]:
    """The head that owns each page, counted through rows and heads; pages that are left over go to the last."""
    begins = xp.reshape(first, (-1,))
    at = xp.arange(layout.count, dtype=xp.int32, device=device(first)) * layout.size
    return xp.sum(xp.astype(at[:, None] >= begins[None, :], xp.int32), axis=1, dtype=xp.int32) - 1


def places(
    xp: Namespace, first: Int[Array, "batch kv_heads"], layout: Pages, slots: int
) -> Int[Array, "batch kv_heads {slots}"]:
    """The place of each slot of each head, -1 beyond what belongs to the head."""
    flat = xp.reshape(first, (-1,))
    end = xp.full((1,), layout.places, dtype=xp.int32, device=device(first))
    end = xp.reshape(xp.concat([flat[1:], end], axis=0), first.shape)
    place = first[..., None] + xp.arange(slots, dtype=xp.int32, device=device(first))
    return xp.where((place < end[..., None]) & (place < layout.places), place, -1)


def slots_of(
    xp: Namespace, first: Int[Array, "batch kv_heads"], layout: Pages, slots: int
) -> Int[Array, "places"]:
    """The other way round: the slot at each place, counted through rows, heads and `slots`; -1 beyond them."""
    owner = owners(xp, first, layout)
    begins = xp.take(xp.reshape(first, (-1,)), owner, axis=0)
    page = xp.arange(layout.count, dtype=xp.int32, device=device(first)) * layout.size - begins
    slot = page[:, None] + xp.arange(layout.size, dtype=xp.int32, device=device(first))
    index = xp.where(slot < slots, owner[:, None] * slots + slot, -1)
    return xp.reshape(index, (-1,))


def taken(
    xp: Namespace, x: Shaped[Array, "source *rest"], index: Int[Array, "*shape"], empty: float | int
) -> Shaped[Array, "*result"]:
    """x[index], with `empty` where the index is -1."""
    flat = xp.reshape(index, (-1,))
    made = xp.take(x, xp.where(flat < 0, 0, flat), axis=0)
    hole = xp.reshape(flat < 0, (-1,) + (1,) * (x.ndim - 1))
    return xp.reshape(xp.where(hole, empty, made), (*index.shape, *x.shape[1:]))


def joined(x: Shaped[Array, "batch kv_heads slots *rest"], xp: Namespace) -> Shaped[Array, "all *rest"]:
    """Rows, heads and slots as one axis."""
    return xp.reshape(x, (-1, *x.shape[3:]))
