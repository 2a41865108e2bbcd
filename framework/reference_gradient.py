"""The backward pass of the reference: the chain rule through each part of the decoder, in float64, one row at a time.

It reads what a forward pass left in the taps and in the row's heads, and walks the layers from the last to the first.
"""

from typing import TYPE_CHECKING

import numpy as np

from framework.rope import angles
from framework.spec import Layer

if TYPE_CHECKING:
    from framework.reference import ReferenceModel
    from framework.reference_cache import ReferenceCache

Taps = dict[str, np.ndarray]


def gradients(model: "ReferenceModel", cache: "ReferenceCache", number: int, taps: Taps) -> list[np.ndarray]:
    """Per layer, the gradient [tokens dim] of the sum of |h|^2 by what attention gives; h is the last layer's output.

    `cache` holds the tokens of the forward pass that filled `taps`, the last ones of the row.
    """
    spec, count = model.spec, len(model.spec.layers)
    found: list[np.ndarray] = []
    slope = 2 * taps[f"layers.{count - 1}.output"]
    for index in reversed(range(count)):
        at = f"layers.{index}"
        x = taps["embed" if index == 0 else f"layers.{index - 1}.output"]
        y = taps[f"{at}.attention.output"]
        middle = x + (model.norm(y, f"{at}.attention_post_norm") if spec.post_norms else y)
        slope = slope + _ffn(model, at, middle, taps, slope)
        own = _norm(model, f"{at}.attention_post_norm", y, slope) if spec.post_norms else slope
        found.append(own)
        slope = slope + _attention(model, cache, number, index, x, taps, own)
    return found[::-1]


def _ffn(model: "ReferenceModel", at: str, x: np.ndarray, taps: Taps, slope: np.ndarray) -> np.ndarray:
    """What the feed-forward's branch of the residual hands back to its input `x`."""
    w = model.weights
    if model.spec.post_norms:
        slope = _norm(model, f"{at}.ffn_post_norm", taps[f"{at}.ffn"], slope)
    h = model.norm(x, f"{at}.ffn_norm")
    gate, up = model.linear(h, f"{at}.ffn.gate"), model.linear(h, f"{at}.ffn.up")
    value, rise = ACTIVATIONS[model.spec.activation](gate)
    slope = slope @ w[f"{at}.ffn.down.weight"]
    inner = slope * up * rise @ w[f"{at}.ffn.gate.weight"] + slope * value @ w[f"{at}.ffn.up.weight"]
    return _norm(model, f"{at}.ffn_norm", x, inner)


def _attention(
    model: "ReferenceModel",
    cache: "ReferenceCache",
    number: int,
    index: int,
    x: np.ndarray,
    taps: Taps,
    slope: np.ndarray,
) -> np.ndarray:
    """What attention hands back to the layer's input `x`, by the queries, keys and values of the new tokens."""
    layer, w, at = model.spec.layers[index], model.weights, f"layers.{index}.attention"
    mixed = (slope @ w[f"{at}.output.weight"]).reshape(len(x), layer.heads, layer.head_dim)
    parts = _mixing(layer, cache, number, index, taps[f"{at}.query_rotated"], mixed)
    h, inner = taps[f"{at}_norm"], np.zeros_like(x)
    for key, part in zip(("query", "key", "value"), parts, strict=True):
        if model.spec.query_key_norm and key != "value":
            before = model.linear(h, f"{at}.{key}").reshape(part.shape)
            part = _norm(model, f"{at}.{key}_norm", before, part)
        inner += part.reshape(len(x), -1) @ w[f"{at}.{key}.weight"]
    return _norm(model, f"layers.{index}.attention_norm", x, inner)


def _mixing(
    layer: Layer, cache: "ReferenceCache", number: int, index: int, queries: np.ndarray, slope: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes of the un-rotated queries [tokens heads head_dim], and keys and values [tokens kv_heads head_dim]."""
    row, closed = cache.content[number], cache.policy.repositions
    count, shape = len(queries), (len(queries), layer.kv_heads, layer.head_dim)
    positions = row.seen - count + np.arange(count)
    by_query, by_key, by_value = np.zeros_like(queries), np.zeros(shape), np.zeros(shape)

    def turn(x: np.ndarray, where: np.ndarray, back: bool = False) -> np.ndarray:
        """[tokens head_dim] rotated, or multiplied by the transposed rotation."""
        if layer.rope is None:
            return x
        cos, sin = angles(layer.rope, where, cache.length)
        return _rotate(x, cos, -sin if back else sin)

    for kv_head, head in enumerate(row.heads[index]):
        keys, values = head.streams["keys"], head.streams["values"]
        places = np.arange(len(keys)) if closed else head.positions
        if closed:
            keys = turn(keys, places)
        each_key, each_value = np.zeros_like(keys), np.zeros_like(values)
        for query_head in range(kv_head * layer.group, (kv_head + 1) * layer.group):
            own = turn(queries[:, query_head], places[-count:]) if closed else queries[:, query_head]
            for token, position in enumerate(positions):
                visible = head.positions <= position
                if layer.window is not None:
                    visible &= head.positions > position - layer.window
                logits = keys[visible] @ own[token] * layer.scale
                bent = np.ones_like(logits)
                if layer.softcap is not None:
                    share = np.tanh(logits / layer.softcap)
                    logits, bent = layer.softcap * share, 1 - share**2
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                gain = values[visible] @ slope[token, query_head]
                by_logit = weights * (gain - weights @ gain) * bent * layer.scale
                by_query[token, query_head] = by_logit @ keys[visible]
                each_key[visible] += by_logit[:, None] * own[token]
                each_value[visible] += weights[:, None] * slope[token, query_head]
            by_query[:, query_head] = turn(by_query[:, query_head], places[-count:], back=True)
        by_key[:, kv_head] = turn(each_key[-count:], places[-count:], back=True)
        by_value[:, kv_head] = each_value[-count:]
    return by_query, by_key, by_value


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _norm(model: "ReferenceModel", key: str, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """What an RMSNorm hands back to its input."""
    slope = slope * (model.weights[f"{key}.weight"] + model.spec.norm_offset)
    square = (x * x).mean(-1, keepdims=True) + model.spec.norm_eps
    return (slope - x * (slope * x).mean(-1, keepdims=True) / square) / np.sqrt(square)


def _silu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = 1 / (1 + np.exp(-x))
    return x * share, share * (1 + x * (1 - share))


def _gelu_tanh(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(2 / np.pi)
    share = np.tanh(root * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + share), 0.5 * (1 + share) + 0.5 * x * (1 - share**2) * root * (1 + 0.134145 * x**2)


ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}  # value and derivative
