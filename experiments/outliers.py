"""Outlier channels in the keys of a model whose function stays: what collapses a coarse codec, without a large model.

Qwen2-7B and its successor have key channels far larger than all others, in the first and the last layer, where the
bias of the key projection is forty times as long as elsewhere; a codec with one scale for a group of channels loses the
others of the group. Two rewrites give any model such channels:

- `pair_rescale`: the two channels that the rotation turns together are multiplied by s in the keys and by 1 / s in
  every query that reads them. A rotation commutes with a factor common to its pair, so that all products stay, and the
  function is the same.
- `key_bias`: a constant is added to the key bias at one channel of such a pair. Where the rotation between two tokens
  is small, all keys of a text gain nearly the same product with a query, and a softmax does not see what all of its
  entries gain: the function is nearly the same. Without a rotation it is the same.

Both touch all kv heads of the first and the last layer unless told otherwise: outliers in every layer of a small model
lose more than Qwen2-7B does, and overflow float16 sooner. And both touch the pair that turns slowest: its channels keep
their size along the text, as those of a bias do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from framework.errors import KvtwinError
from framework.rope import frequencies
from framework.spec import Layer, ModelSpec
from framework.weights import Weights, check


@dataclass(frozen=True, kw_only=True)
class Sites:
    """Where outliers go: `layers` (None: the first and the last), `heads` of keys and values (None: all), and the
    `pair` of channels (None: the one that turns slowest).
    """

    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    pair: int | None = None

    def of(self, spec: ModelSpec) -> dict[int, list[tuple[int, int]]]:
        """The rows of the key projection that hold the pair, for each layer, one pair of rows per head."""
        last = len(spec.layers) - 1
        chosen = sorted({0, last}) if self.layers is None else self.layers
        _within("layer", chosen, last + 1)
        return {index: self._rows(spec.layers[index], index) for index in chosen}

    def _rows(self, layer: Layer, index: int) -> list[tuple[int, int]]:
        if layer.latent is not None:
            raise KvtwinError(
                f"layer {index} stores one latent for all heads; expected separate keys and values"
            )
        turned = layer.head_dim if layer.rope is None else layer.rope.dim
        pair = _slowest(layer) if self.pair is None else self.pair
        _within(f"pair of layer {index}", [pair], turned // 2)
        heads = range(layer.kv_heads) if self.heads is None else self.heads
        _within(f"kv head of layer {index}", heads, layer.kv_heads)
        return [(head * layer.head_dim + pair, head * layer.head_dim + pair + turned // 2) for head in heads]


USUAL = Sites()


def pair_rescale(
    spec: ModelSpec, weights: Mapping[str, np.ndarray], factor: float, sites: Sites = USUAL
) -> tuple[ModelSpec, Weights]:
    """The model with pairs of key channels `factor` times as large, and the same function.

    What changes is float64, so that a backend rounds it once.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise KvtwinError(f"a pair is rescaled by {factor}; expected a finite number above 0")
    _check(spec, weights)
    result = {name: np.array(value) for name, value in weights.items()}
    for index, rows in sites.of(spec).items():
        layer, at = spec.layers[index], f"layers.{index}.attention"
        keys = np.ones(layer.kv_heads * layer.head_dim)
        keys[np.ravel(rows)] = factor
        by_head = 1 / keys.reshape(layer.kv_heads, 1, layer.head_dim)
        queries = np.repeat(by_head, layer.group, axis=1).reshape(-1)
        for name, gain in (("key", keys), ("query", queries)):
            result[f"{at}.{name}.weight"] = result[f"{at}.{name}.weight"].astype(np.float64) * gain[:, None]
            if spec.qkv_bias:
                result[f"{at}.{name}.bias"] = result[f"{at}.{name}.bias"].astype(np.float64) * gain
    return spec, result


def key_bias(
    spec: ModelSpec, weights: Mapping[str, np.ndarray], amount: float, sites: Sites = USUAL
) -> tuple[ModelSpec, Weights]:
    """The model with `amount` added to the key bias at the first channel of pairs, and nearly the same function.

    A model without biases of queries, keys and values gets them, zero elsewhere.
    """
    if not math.isfinite(amount):
        raise KvtwinError(f"{amount} is added to a key bias; expected a finite number")
    _check(spec, weights)
    result = {name: np.array(value) for name, value in weights.items()}
    if not spec.qkv_bias:
        for index, layer in enumerate(spec.layers):
            for name, heads in (("query", layer.heads), ("key", layer.kv_heads), ("value", layer.kv_heads)):
                result[f"layers.{index}.attention.{name}.bias"] = np.zeros(heads * layer.head_dim)
    for index, rows in sites.of(spec).items():
        if spec.layers[index].softcap is not None:
            raise KvtwinError(
                f"layer {index} caps its logits, and so sees what all of them gain; "
                "expected layers without a softcap, or the rewrite pair_rescale"
            )
        bias = result[f"layers.{index}.attention.key.bias"].astype(np.float64)
        bias[[first for first, _ in rows]] += amount
        result[f"layers.{index}.attention.key.bias"] = bias
    return replace(spec, qkv_bias=True), result


def _check(spec: ModelSpec, weights: Mapping[str, np.ndarray]) -> None:
    check(spec, weights)
    if spec.query_key_norm:
        raise KvtwinError(
            f"a model of family {spec.family} norms queries and keys after their projection, which undoes the rewrite; "
            "expected a model without such norms"
        )


def _slowest(layer: Layer) -> int:
    return 0 if layer.rope is None else int(np.argmin(frequencies(layer.rope)[0]))


def _within(what: str, chosen: Sequence[int], count: int) -> None:
    wrong = [each for each in chosen if not 0 <= each < count]
    if wrong or not len(chosen) or len(set(chosen)) < len(chosen):
        raise KvtwinError(f"{what} {list(chosen)}; expected different numbers from 0 to {count - 1}")
