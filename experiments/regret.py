"""`kvtwin regret`: how much attention a policy loses, and how much of that the best choice would have lost too.

The attention of the full cache along one text is the measure. A cache holds, after each call, some tokens; its mass is
the share of the next query's attention (mean over its group) that goes to them and to the query's own token. Two
oracles see the future, with the same number of tokens per head:

- `step`: before each query the tokens that it attends to most, whatever was dropped before. No cache can do better.
- `future`: what is dropped stays dropped; each time the tokens with least attention still to come go (after Belady).

The second is also a policy, `oracle_future`, which keeps the same sets on every backend. It is greedy: over all queries
a policy may do better, and then its regret is below 0. The first drops nothing for good, so that no cache can be built
from it: it is an analysis only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from jaxtyping import Bool, Float, Int

from experiments.compare import Trace, run
from framework.backend import Model
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.policies.snapkv import SnapKV
from framework.policy import attends, name, policies
from framework.spec import Layer

Attention = Float[np.ndarray, "kv_heads queries tokens"]
Kept = Bool[np.ndarray, "kv_heads calls tokens"]


def weights_of(
    layer: Layer,
    queries: Float[np.ndarray, "*batch kv_heads group queries head_dim"],
    keys: Float[np.ndarray, "*batch kv_heads tokens head_dim"],
    first: int,
) -> Float[np.ndarray, "*batch kv_heads group queries tokens"]:
    """What rotated queries at positions from `first` on give to each token of a whole text."""
    wide, held = queries.astype(np.float64), keys.astype(np.float64)
    logits = np.matmul(wide, held[..., None, :, :].swapaxes(-1, -2)) * layer.scale
    if layer.softcap is not None:
        logits = np.tanh(logits / layer.softcap) * layer.softcap
    places = np.arange(keys.shape[-2])
    asking = first + np.arange(queries.shape[-2])
    logits = np.where(attends(asking[:, None], places[None], layer.window), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention_of(model: Model, tokens: np.ndarray, prompt: int) -> list[Attention]:
    """What the queries from position `prompt` on give to each token under the full cache, for each layer."""
    taps: dict[str, np.ndarray] = {}
    model.step(tokens[None], logits=None, taps=taps)
    result = []
    for index, layer in enumerate(model.spec.layers):
        queries, keys = (taps[f"layers.{index}.attention.{which}_rotated"][0] for which in ("query", "key"))
        grouped = queries[prompt:].reshape(-1, layer.kv_heads, layer.group, layer.head_dim)
        weights = weights_of(layer, grouped.transpose(1, 2, 0, 3), keys.swapaxes(0, 1), prompt)
        result.append(weights.mean(1))
    return result


def attended(
    model: Model, texts: Int[np.ndarray, "batch tokens"], prompt: int
) -> Iterator[
    tuple[
        Float[np.ndarray, "batch kv_heads group queries tokens"],
        Float[np.ndarray, "batch kv_heads tokens head_dim"],
    ]
]:
    """What `attention_of` gives before the mean over a group, and the values, layer by layer for a batch of texts.

    From a cache that holds back every eviction, and that a policy made remember the newest queries: so that it is one
    compiled call.
    """
    count = texts.shape[1] - prompt
    cache = model.cache(SnapKV(budget=count, window=count), batch=len(texts), length=texts.shape[1])
    _, cache = model.step(texts, cache, logits=None, evict=False)
    for layer, held in zip(model.spec.layers, cache.snapshot().layers, strict=True):
        assert held.queries is not None
        yield weights_of(layer, held.queries, held.streams["keys"], prompt), held.streams["values"]


def mass(attention: Attention, kept: Kept, prompt: int) -> Float[np.ndarray, "kv_heads calls"]:
    """The share of each query's attention that goes to what was kept before it and to its own token."""
    own = np.arange(attention.shape[1])
    return (attention * kept).sum(-1) + attention[:, own, prompt + own]


def _best(worth: np.ndarray, can: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The `counts` most worthy of the tokens that can be kept; equal ones by age, newest first."""
    worth = np.where(can, worth, -1.0)
    place = np.argsort(np.argsort(-worth[..., ::-1], axis=-1, kind="stable"), axis=-1)[..., ::-1]
    return can & (place < counts[..., None])


def oracle_step(attention: Attention, counts: np.ndarray, prompt: int) -> Kept:
    """The tokens that each query attends to most; `counts` [kv_heads, calls] of them."""
    calls, tokens = attention.shape[1:]
    past = np.arange(tokens)[None] < prompt + np.arange(calls)[:, None]
    return _best(attention, np.broadcast_to(past, attention.shape), counts)


def to_come(attention: Attention) -> Float[np.ndarray, "kv_heads queries tokens"]:
    """What each query and those after it give to each token, in float32, as it is recorded for the policy."""
    return np.cumsum(attention[:, ::-1], axis=1)[:, ::-1].astype(np.float32)


def oracle_future(attention: Attention, counts: np.ndarray, prompt: int) -> Kept:
    """The tokens with most attention still to come, of those that were not dropped before."""
    heads, calls, tokens = attention.shape
    worth = to_come(attention)
    can = np.broadcast_to(np.arange(tokens) < prompt, (heads, tokens)).copy()
    kept = np.zeros(attention.shape, bool)
    for call in range(calls):
        can = kept[:, call] = _best(worth[:, call], can, counts[:, call])
        can = can.copy()
        can[:, prompt + call] = True
    return kept


def kept_of(trace: Trace, model: Model, prompt: int) -> dict[int, Kept]:
    """What a run held before each query, for each layer that evicts."""
    calls, tokens = trace.fed.shape[1], prompt + trace.fed.shape[1]
    result: dict[int, np.ndarray] = {}
    layers = {one.layer for taken in trace.decisions for one in taken}
    for layer in sorted(layers):
        kept = np.zeros((model.spec.layers[layer].kv_heads, calls, tokens), bool)
        for call in range(calls):
            found = [one for one in trace.decisions[call] if one.layer == layer]
            if found:
                for head, positions in enumerate(found[0].kept[0]):
                    kept[head, call, positions[positions >= 0]] = True
            else:  # between two evictions: what was held, and the token that came
                kept[:, call] = kept[:, call - 1]
                kept[:, call, prompt + call - 1] = True
        result[layer] = kept
    return result


@dataclass(frozen=True)
class Regret:
    """One head: mean mass over the queries, of the policy and of the oracles with as many tokens."""

    layer: int
    head: int
    kept: float
    policy: float
    future: float
    step: float

    @property
    def regret(self) -> float:
        """Attention that the policy lost and the oracle without a way back would have had."""
        return self.future - self.policy


def regrets(model: Model, tokens: np.ndarray, policy: str, prompt: int) -> list[Regret]:
    """Lead a model along a text under a policy; one entry per layer that evicts and head."""
    if not 0 < prompt < len(tokens):
        raise KvtwinError(
            f"the prompt has {prompt} of {len(tokens)} tokens; expected some of them and not all"
        )
    fed = tokens[None, prompt:].astype(np.int32)
    along = Trace(tokens[None, :prompt].astype(np.int32), fed, decisions=[[]] * (fed.shape[1] + 1))
    spelled = name(resolved(policies.make(policy), prompt))
    trace = run(model, along.prompt, spelled, fed.shape[1], along=along, watch=False)
    full, result = attention_of(model, tokens, prompt), []
    for layer, kept in kept_of(trace, model, prompt).items():
        counts = kept.sum(-1)
        sets = (kept, oracle_future(full[layer], counts, prompt), oracle_step(full[layer], counts, prompt))
        means = [mass(full[layer], one, prompt).mean(-1) for one in sets]
        result += [
            Regret(layer, head, float(counts[head].mean()), *(float(one[head]) for one in means))
            for head in range(len(counts))
        ]
    return result


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")],
    text: Annotated[Path, typer.Argument(help="A file of text.")],
    policy: Annotated[list[str], typer.Option(help='As in "h2o(budget=32)"; may be given several times.')],
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 256,
    steps: Annotated[int, typer.Option(help="Tokens after it.", min=1)] = 128,
    backend: Annotated[str, typer.Option(help="reference, torch or flax.")] = "torch",
) -> None:
    """Measure the attention that policies lose, beside two oracles, per layer and head."""
    from rich.console import Console
    from rich.table import Table

    from backends import backends

    try:
        read = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KvtwinError(f"cannot read the text {text}: {error}") from error
    loaded = backends.get(backend).load(model)
    tokens = np.array(loaded.tokenizer.encode(read)[: prompt + steps])
    console = Console(highlight=False)
    for one in policy:
        table = Table(
            "layer",
            "head",
            "kept",
            "mass",
            "oracle future",
            "oracle step",
            "regret",
            title=one,
            title_justify="left",
        )
        rows = regrets(loaded, tokens, one, prompt)
        for each in rows:
            cells = (each.policy, each.future, each.step, each.regret)
            table.add_row(
                str(each.layer), str(each.head), f"{each.kept:.0f}", *(f"{cell:.4f}" for cell in cells)
            )
        console.print(table)
        if rows:
            console.print(f"mean regret {np.mean([each.regret for each in rows]):.4f} over {len(rows)} heads")
        else:
            console.print("nothing was evicted", markup=False)
