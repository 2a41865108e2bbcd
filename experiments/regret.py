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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from jaxtyping import Bool, Float

from experiments.compare import Trace, run
from framework.backend import Model
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.policy import attends, name, policies

Attention = Float[np.ndarray, "kv_heads queries tokens"]
Kept = Bool[np.ndarray, "kv_heads calls tokens"]


def taps_of(model: Model, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The values inside the model along a text under the full cache."""
    taps: dict[str, np.ndarray] = {}
    model.step(tokens[None], logits=None, taps=taps)
    return taps


def weights_of(
    model: Model, taps: Mapping[str, np.ndarray], places: np.ndarray
) -> list[Float[np.ndarray, "kv_heads group queries tokens"]]:
    """What the queries at these positions of the text give to each token, for each layer."""
    result = []
    for index, layer in enumerate(model.spec.layers):
        queries, keys = (
            taps[f"layers.{index}.attention.{which}_rotated"][0].astype(np.float64)
            for which in ("query", "key")
        )
        queries = queries[places].reshape(-1, layer.kv_heads, layer.group, layer.head_dim)
        logits = np.einsum("qhgd,phd->hgqp", queries, keys) * layer.scale
        if layer.softcap is not None:
            logits = np.tanh(logits / layer.softcap) * layer.softcap
        logits = np.where(attends(places[:, None], np.arange(len(keys))[None], layer.window), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        result.append(weights / weights.sum(-1, keepdims=True))
    return result


def attention_of(model: Model, tokens: np.ndarray, prompt: int) -> list[Attention]:
    """What the queries from position `prompt` on give to each token under the full cache, for each layer."""
    found = weights_of(model, taps_of(model, tokens), np.arange(prompt, len(tokens)))
    return [weights.mean(1) for weights in found]


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
