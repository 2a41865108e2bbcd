"""What a codec does to the reference's tokens: coded as they come, or in groups once they are no longer new."""

from typing import TYPE_CHECKING

import array_api_compat.numpy as xp
import numpy as np

from framework.codec import Codec, Side, decoded
from framework.coding import SIDES, parts_of, refused, shown, stored, uncoded
from framework.groups import ROW, Call, exact_of
from framework.reference_cache import Head, ReferenceCache
from framework.reference_parts import turned
from framework.snapshot import LayerSnapshot
from framework.spec import Layer

if TYPE_CHECKING:
    from framework.reference import ReferenceModel


def code(
    model: "ReferenceModel", cache: ReferenceCache, index: int, heads: list[Head], positions: np.ndarray,
    k: np.ndarray, v: np.ndarray,
) -> None:  # fmt: skip
    """Code the newest tokens of a layer, which from now on are what the codec gives back, or later."""
    codec, layer = cache.codec, model.spec.layers[index]
    bias = key_bias(model, cache, index, positions)
    new = {key: x.transpose(1, 0, 2)[None] for key, x in (("keys", k - bias), ("values", v))}
    made = stored(codec, xp, layer, new)
    unfit = uncoded(xp, layer, positions[None], new, made)
    if unfit.any():
        raise refused(codec, [np.zeros_like(unfit)] * index + [unfit])
    for number, head in enumerate(heads):
        head.coded = {key: np.concatenate([old, made[key][0, number]]) for key, old in head.coded.items()}
        if head.keys is not None:
            head.keys = np.concatenate([head.keys, new["keys"][0, number]])
    for side in () if codec.recent else SIDES:
        read = shown(codec, xp, layer, made, side, np.float64)
        for number, head in enumerate(heads):
            own = read[0, number] + (bias[:, number] if side == "keys" else 0)
            head.streams[side][len(head.positions) - len(k) :] = own


def complete(model: "ReferenceModel", cache: ReferenceCache, number: int, index: int) -> None:
    """Code what is no longer among the newest tokens of a layer of a row: `framework/groups.py`."""
    codec, row, layer = cache.codec, cache.content[number], model.spec.layers[index]
    end = row.seen - row.seen % codec.recent
    for which, head in enumerate(row.heads[index]):
        slots = range(len(head.positions))
        old = [slot for slot in slots if head.positions[slot] < row.seen - codec.recent]
        values = {key: x[old] for key, x in parts_of(head.coded, "values").items()}
        head.streams["values"][old] = decoded(codec, xp, values, "values", np.float64)
        if not codec.together:
            continue
        assert head.keys is not None
        rows, size = head.coded[ROW][:, 0], codec.together
        due = [slot for slot in slots if rows[slot] < 0 and head.positions[slot] < end]
        coded = [slot for slot in slots if rows[slot] >= 0]
        living = sorted({int(rows[slot]) for slot in coded})
        needed = -(-(len(due) + len(coded)) // size)
        if codec.regroups and due and len(living) + -(-len(due) // size) > 2 * needed:
            due, coded, living = sorted(due + coded), [], []
            head.again += 1
        for slot in coded:
            rows[slot] = living.index(rows[slot])
        head.groups = [head.groups[group] for group in living]
        for start in range(0, len(due), size):
            own = due[start : start + size]
            queries = row.queries[index][which, :, -codec.queries :].reshape(-1, layer.head_dim)
            x = head.keys[own].astype(np.float32)
            each, once = codec.encode_group(
                xp, x, np.ones(len(own), bool), queries.astype(np.float32) if codec.queries else None
            )
            if not all(np.isfinite(part).all() for part in [x, *each.values(), *once.values()]):
                unfit = [np.zeros(one.kv_heads, bool) for one in model.spec.layers]
                unfit[index][which] = True
                raise refused(codec, unfit)
            for key, part in each.items():
                head.coded[f"keys.{key}"][own] = part
            rows[own] = len(head.groups)
            head.groups.append(once)
            parts = each | {key: np.stack([part] * len(own)) for key, part in once.items()}
            head.keys[own] = decoded(codec, xp, parts, "keys", np.float64)
        restore_keys(model, cache, index, which, head)


def restore_keys(model: "ReferenceModel", cache: ReferenceCache, index: int, which: int, head: Head) -> None:
    """Make the keys of a head what the model sees of them, as they are stored."""
    assert head.keys is not None
    seen = head.keys + key_bias(model, cache, index, head.positions)[:, which]
    if cache.codec.unrotated and not cache.policy.repositions:
        seen = turned(model.spec.layers[index].rope, cache.length, seen[:, None], head.positions)[:, 0]
    head.streams["keys"] = seen


def key_bias(model: "ReferenceModel", cache: ReferenceCache, index: int, positions: np.ndarray) -> np.ndarray:
    """The key bias [tokens kv_heads head_dim] that a codec leaves out, rotated as the cache's keys are; else 0."""
    layer = model.spec.layers[index]
    shape = (len(positions), layer.kv_heads, layer.head_dim)
    if not cache.codec.unbiased:
        return np.zeros(shape)
    bias = model.weights[f"layers.{index}.attention.key.bias"]
    bias = np.broadcast_to(bias.reshape(layer.kv_heads, layer.head_dim), shape)
    if cache.policy.repositions or cache.codec.unrotated:
        return bias
    return turned(layer.rope, cache.length, bias, positions)


def read_stored(codec: Codec, own: Layer, layer: LayerSnapshot, seen: np.ndarray) -> dict[Side, np.ndarray]:
    """Keys and values of a saved layer as they are stored, read from their codes or among the newest tokens."""
    exact = None
    if codec.recent:
        nothing: dict[Side, np.ndarray] = {
            side: np.zeros((*layer.positions.shape[:2], 1, own.head_dim)) for side in SIDES
        }
        call = Call(nothing, np.full((len(seen), 1), -1, np.int32), seen, seen)
        exact = exact_of(xp, codec, layer.tables, layer.positions, call)
    return {
        side: shown(codec, xp, own, layer.streams, side, np.float64, layer.tables, exact) for side in SIDES
    }
