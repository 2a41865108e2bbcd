"""Matrices that multiply the same vector, joined into one: a decode step is bound by memory, and long reads are fast.

Of the canonical names (see `weights`) the three projections into attention and the two into the feed-forward become

layers.{i}.  attention.query_key_value  .weight [kv_heads * (group + 2) * head_dim, dim], .bias
             ffn.gate_up                .weight [2 * ffn, dim], .bias

Rows of `query_key_value` stand by kv head: its queries, its key, its value, so that a split by heads is a slice. Rows
of `gate_up` are the gates, then the ups.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Shaped

from framework.spec import Layer, ModelSpec
from framework.weights import shapes

PARTS = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}


def fused(
    spec: ModelSpec, weights: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
    """Every tensor of a spec once, joined where it is part of a joined one; each is read when it is its turn."""
    whole = {part: joined for joined, parts in PARTS.items() for part in parts}
    for name in shapes(spec):
        module, _, kind = name.rpartition(".")
        at, _, last = module.rpartition(".")
        if last not in whole:
            yield name, weights[name]
        elif last == PARTS[whole[last]][0]:
            names = [f"{at}.{part}.{kind}" for part in PARTS[whole[last]]]
            layer = spec.layers[int(name.split(".")[1])] if last == "query" else None
            yield f"{at}.{whole[last]}.{kind}", _joined([weights[each] for each in names], layer)


def parted(
    spec: ModelSpec, tensors: Mapping[str, Shaped[np.ndarray, "..."]]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The canonical weights whose joined form these tensors are: the inverse of `fused`."""
    weights: dict[str, np.ndarray] = {}
    for name, x in tensors.items():
        module, _, kind = name.rpartition(".")
        at, _, last = module.rpartition(".")
        if last == "gate_up":
            pieces = np.split(x, 2)
        elif last == "query_key_value":
            layer = spec.layers[int(name.split(".")[1])]
            heads = x.reshape(layer.kv_heads, -1, *x.shape[1:])
            cuts = np.split(heads, [layer.group * layer.head_dim, (layer.group + 1) * layer.head_dim], axis=1)
            pieces = [cut.reshape(-1, *x.shape[1:]) for cut in cuts]
        else:
            weights[name] = x
            continue
        for part, piece in zip(PARTS[last], pieces, strict=True):
            weights[f"{at}.{part}.{kind}"] = piece
    return {name: weights[name] for name in shapes(spec)}


def _joined(
    parts: list[Shaped[np.ndarray, "_ *inner"]], layer: Layer | None
) -> Shaped[np.ndarray, "rows *inner"]:
    """The rows of the parts; with a layer by its kv heads. The parts go when this returns."""
    return np.concatenate(parts) if layer is None else _by_head(parts, layer)


def _by_head(parts: list[Shaped[np.ndarray, "_ *inner"]], layer: Layer) -> Shaped[np.ndarray, "rows *inner"]:
    """The rows of queries, keys and values by kv head."""
    heads = [part.reshape(layer.kv_heads, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(heads, axis=1).reshape(-1, *parts[0].shape[1:])
