"""What a call's queries mix of a layer's values: exact or coded, rotated by position or rank, in slots or pages."""

import array_api_compat.torch as xp
import torch

from backends.torch.attention import attention, coded_attention, paged_attention
from backends.torch.cache import TorchCache
from backends.torch.convert import widened
from backends.torch.layer import Finish, LayerCache
from backends.torch.pages import PagedLayer
from backends.torch.rope import Tables
from framework.arrays import spread
from framework.codec import Side, decoded
from framework.coding import SIDES, Coded, paged_parts
from framework.groups import Exact
from framework.spec import Layer


def mixed(
    held: LayerCache, queries: torch.Tensor, new: dict[Side, torch.Tensor], exact: Exact | None, first: int,
    positions: torch.Tensor, before: torch.Tensor, cache: TorchCache, tables: Tables, finish: Finish | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """What the queries, whose tokens stand from slot `first` on, mix of the values, and the sums if asked for."""
    layer, codec, tokens, sums = held.spec, held.codec, positions.shape[1], cache.policy.needs.sums
    keys, values = held.streams["keys"] if codec.exact else new["keys"], new["values"]
    at = positions[:, None].expand(-1, layer.kv_heads, -1)
    ring = codec.recent if first else 0
    if ring and exact is not None:
        at, values, old = exact.positions, exact.vectors["values"], exact.vectors["keys"][:, :, :ring]
        old = old if finish is None else finish(old, at[:, :, :ring])
        keys = torch.cat([old, keys], dim=2)
    rank, rope = None, layer.rope if cache.policy.repositions else None
    if rope is not None:
        rank = (held.positions >= 0).cumsum(-1).to(torch.int32) - 1
        own = every = rank[:, :, first : first + tokens]
        if ring and exact is not None:
            place = torch.where(exact.place < ring, exact.place, -1)
            every = torch.cat([spread(xp, ring, place, rank, 0), own], dim=2)
        queries = tables.rotate(queries, own[:, :, None], rope, cache.length)
        keys = tables.rotate(keys, rank if codec.exact else every, rope, cache.length)

    def read(block: torch.Tensor, span: slice) -> torch.Tensor:
        block = block if finish is None else finish(block, held.positions[:, :, span])
        if rope is None or rank is None:
            return block
        return tables.rotate(block, rank[:, :, span], rope, cache.length)

    if codec.exact:
        values = held.streams["values"]
        # Without padding and evictions the slots hold 0, 1, 2, ...; whether they do is known without reading them.
        whole = (first == 0 or held.limit is None) and bool((cache.row_seen == held.fill).all())
        whole = whole and (layer.window is None or held.fill <= layer.window)
        return attention(queries, keys, values, positions, held.positions, layer, first, sums, whole)
    coded = Coded(
        codec,
        xp,
        layer,
        held.streams,
        None if finish is None and rope is None else read,
        tables=held.tables,
    )
    place = None if exact is None or not sums else exact.place
    return coded_attention(
        queries, keys, values, coded, positions, at, held.positions, layer, first, before - ring, place
    )


def mixed_in_pages(
    held: PagedLayer, queries: torch.Tensor, new: dict[Side, torch.Tensor], exact: Exact | None,
    position: torch.Tensor, cache: TorchCache, tables: Tables, finish: Finish | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`mixed` for one token per row and heads of different lengths."""
    layer, (streams, positions, owner) = held.spec, held.paged()
    if exact is not None:
        # What is exact is taken as it is; of the tokens of the call also the keys, which need no `finish`.
        place, ring = held.run(exact.place, -1).view(positions.shape), held.codec.recent
        lane = owner.to(torch.int64)[:, None]
        for side in SIDES:
            parts = paged_parts(held.codec, xp, streams, held.tables, owner, side)
            x = decoded(held.codec, xp, parts, side, widened(queries[:0]).dtype)
            own = exact.vectors[side].flatten(0, 1)[lane, place.clamp(min=0)]
            x = torch.where((place >= 0)[..., None], widened(own), x)
            if finish is not None and side == "keys":
                x = _finished_pages(finish, x, positions, owner, layer)
                fresh = new["keys"].flatten(0, 1)[lane[:, 0]]
                x = torch.where((place >= ring)[..., None], widened(fresh), x)
            streams[side] = x
    keys = streams["keys"]
    if layer.rope is not None and cache.policy.repositions:
        rank = (held.positions >= 0).cumsum(-1).to(torch.int32) - 1
        keys = tables.rotate(keys, held.run(rank).view(positions.shape), layer.rope, cache.length)
        queries = tables.rotate(queries, rank[:, :, None, -1:], layer.rope, cache.length)
    out, sums = paged_attention(
        queries, keys, streams["values"], position, positions, owner, layer, cache.policy.needs.sums
    )
    return out, None if sums is None else held.shown(sums)


def _finished_pages(
    finish: Finish, keys: torch.Tensor, positions: torch.Tensor, owner: torch.Tensor, layer: Layer
) -> torch.Tensor:
    """`finish` of keys in pages [pages size head_dim], each of one head."""
    number = owner.to(torch.int64) % layer.kv_heads
    every = (x[:, None].expand(-1, layer.kv_heads, *x.shape[1:]) for x in (keys, positions))
    return finish(*every)[torch.arange(len(owner), device=owner.device), number]
