"""What a cache holds of each row once the context is compressed, beside what it was to hold."""

from collections.abc import Sequence

import numpy as np

from experiments.question import Held
from framework.backend import Model
from framework.cache import Cache
from framework.codec import codecs
from framework.footprint import footprint
from framework.policy import policies

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def held_by(model: Model, cache: Cache, contexts: Sequence[int]) -> list[Held]:
    """One entry per row, whose context has so many tokens; to be asked right after the eviction at its end."""
    counts = np.stack(
        [(positions >= 0).sum(-1) for positions in cache.kept], axis=1
    )  # [batch layers kv_heads]
    size, slots = cache.bytes, max(int(counts.sum()), 1)
    payload = [int((size.payload + size.scales) * one.sum() / slots) for one in counts]
    allocated = size.capacity // cache.batch
    # The arrays are as long as the longest row needs them.
    longest = footprint(
        model.spec, policies.make("full()"), cache.codec, int(max(contexts)), ITEMSIZE[model.dtype]
    )
    masked = allocated >= longest.kv + longest.positions
    return [
        _held(model, cache, row, int(tokens), counts[row], payload[row], allocated, masked)
        for row, tokens in enumerate(contexts)
    ]


def _held(
    model: Model,
    cache: Cache,
    row: int,
    tokens: int,
    counts: np.ndarray,
    payload: int,
    allocated: int,
    masked: bool,
) -> Held:
    spec = model.spec
    full = footprint(spec, policies.make("full()"), codecs.make("full()"), tokens, ITEMSIZE[model.dtype])
    whole, due = _due(cache, row, tokens, False), _due(cache, row, tokens, True)
    evicted, flags = bool((counts.sum(-1) < whole.sum(-1)).any()), []
    if cache.policy.evicts and not evicted:
        flags.append("never_fired")
    if cache.policy.evicts and (counts.sum(-1) != due.sum(-1)).any():
        flags.append("missed_budget")
    if evicted and masked:
        flags.append("masked")
    asked = [heads[row].mean() for heads in cache.budgets if heads is not None]
    return Held(
        context=tokens,
        requested=float(np.mean(asked)) if asked else None,
        kept_min=int(counts.min()),
        kept_max=int(counts.max()),
        kept=float(counts.mean()),
        payload=payload,
        allocated=allocated,
        full=int(full.kv),
        flags=tuple(flags),
    )


def _due(cache: Cache, row: int, tokens: int, budgets: bool) -> np.ndarray:
    """Tokens that the heads of each layer should hold [layers, kv_heads], under their budgets or without; what matters
    is the sum of a layer, since a policy may divide it among the heads. A layer's sliding window bounds both."""
    found = []
    for index, layer in enumerate(cache.spec.layers):
        budget = cache.budgets[index] if budgets else None
        heads = np.full(layer.kv_heads, tokens) if budget is None else np.minimum(budget[row], tokens)
        bound = tokens if layer.window is None else layer.window - 1
        found.append(np.minimum(heads, bound))
    return np.stack(found)
