"""The compiled functions: a call of many tokens, one step, and the decode loop with its stop test on the device.

They stand at module level, take parameters and buffers as arguments, and are static only in what changes the program:
the modules' structure, the plan, and slot counts. Budgets, sampling settings, stop tokens and the number of steps are
traced. Decode donates the buffers; `advance` changes their shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from backends.flax.cache import FlaxCache, State
from backends.flax.convert import precision, to_numpy, widened
from backends.flax.layer import (
    Given,
    Held,
    Plan,
    append,
    append_one,
    bias_at,
    compacted,
    observe,
    opened,
    overwrite,
    packed,
    read,
    recoded_layer,
    remembered,
    view_of,
    without_weakest,
)
from backends.flax.mixing import mixed, mixed_in_pages
from backends.flax.pages import PagedState, closed
from backends.flax.rope import rotate
from backends.flax.sharding import by_head, by_row, kept_in_place
from framework.arrays import Array
from framework.codec import Side
from framework.coding import stored, uncoded
from framework.decode import Sampling, choose
from framework.eviction import measured, noted, repositioned, streamed
from framework.groups import Call
from framework.pages import Pages
from framework.policy import BLOCK, Block, View
from framework.random import gumbel
from framework.shapes import EMPTY
from framework.wrapper import seen_by

if TYPE_CHECKING:
    from backends.flax.decoder import Decoder, DecoderLayer
    from backends.flax.model import FlaxModel


New = dict[Side, jax.Array]  # keys and values of the tokens of a call

STOPS = 8  # a compiled loop has room for a multiple of this many stop tokens
OUTPUT = 512  # the loop's output grows in these steps


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The modules without their parameters: a static argument, compared by identity, which costs nothing per call.

    `interned` gives the same one for the same structure, so that models that differ in weights alone share what is
    compiled.
    """

    graph: Any
    tree: Any

    def decoder(self, leaves: list[jax.Array]) -> "Decoder":
        """The modules with these parameters."""
        return nnx.merge(self.graph, jax.tree.unflatten(self.tree, leaves))


interned = cache(Skeleton)


def skeleton(decoder: "Decoder") -> tuple[Skeleton, list[jax.Array]]:
    """Structure and parameters of the modules, apart."""
    graph, state = nnx.split(decoder)
    leaves, tree = jax.tree.flatten(state)
    return interned(graph, tree), leaves


def no_tap(name: str, value: jax.Array) -> None:
    """Listens to nothing."""


def _project(
    block: "DecoderLayer",
    plan: Plan,
    index: int,
    x: jax.Array,
    positions: jax.Array,
    given: Given,
    tap: Callable,
) -> tuple[jax.Array, New, New, tuple[jax.Array, ...]]:
    """Queries [batch kv_heads group tokens head_dim]; keys and values [batch kv_heads tokens head_dim], rotated, and as
    they are stored; and for a policy that reads the stream of tokens, the un-rotated queries and the input of the
    projections."""
    at, attn, layer, (batch, tokens) = (
        f"layers.{index}",
        block.attention,
        plan.spec.layers[index],
        positions.shape,
    )
    h = block.attention_norm(x)
    tap(f"{at}.attention_norm", h)
    joined = attn.query_key_value(h).reshape(batch, tokens, layer.kv_heads, layer.group + 2, layer.head_dim)
    q = joined[..., : layer.group, :].reshape(batch, tokens, layer.heads, layer.head_dim)
    k, v = joined[..., layer.group, :], joined[..., layer.group + 1, :]
    if plan.spec.query_key_norm:
        q, k = attn.query_norm(q), attn.key_norm(k)
    for key, value in (("query", q), ("key", k), ("value", v)):
        tap(f"{at}.attention.{key}", value)
    q, k, v = (jnp.swapaxes(one, 1, 2) for one in (q, k, v))
    grouped = (batch, layer.kv_heads, layer.group, tokens, layer.head_dim)
    raw, plain = q.reshape(grouped), k
    if layer.rope is not None and not plan.policy.repositions:
        q = rotate(q, positions[:, None], given.tables[layer.rope])
        k = rotate(k, positions[:, None], given.tables[layer.rope])
    tap(f"{at}.attention.query_rotated", jnp.swapaxes(q, 1, 2))
    tap(f"{at}.attention.key_rotated", jnp.swapaxes(k, 1, 2))
    left = plain if plan.codec.unrotated else k
    if given.biases is not None:
        left = left - bias_at(plan, index, given, jnp.broadcast_to(positions[:, None], k.shape[:3]))
    return q.reshape(grouped), {"keys": k, "values": v}, {"keys": left, "values": v}, (raw, h)


def _inside(decoder: "Decoder", plan: Plan, given: Given) -> Given:
    """What a compiled function was given, with what it takes from the parameters."""
    given = jax.tree.map(jnp.asarray, given)
    if not plan.codec.unbiased:
        return given
    biases = []
    for block, layer in zip(decoder.layers, plan.spec.layers, strict=True):
        joined = block.attention.query_key_value.bias[...]
        biases.append(joined.reshape(layer.kv_heads, layer.group + 2, layer.head_dim)[:, layer.group])
    return replace(given, biases=biases)


def _coded(
    plan: Plan, index: int, positions: jax.Array, new: New, left: New, unfit: list[jax.Array]
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Keys and values as the layer holds them, and `State.unfit` with what could not be coded of them."""
    codec, layer = plan.codec, plan.spec.layers[index]
    made = stored(codec, jnp, layer, left)
    if codec.exact:
        return made, unfit
    return jax.lax.stop_gradient(made), _marked(unfit, index, uncoded(jnp, layer, positions, new, made))


def _marked(unfit: list[jax.Array], index: int, wrong: jax.Array) -> list[jax.Array]:
    """`State.unfit` with these heads of a layer."""
    return [each | wrong if number == index else each for number, each in enumerate(unfit)]


def _attend(
    block: "DecoderLayer", plan: Plan, index: int, held: Held, q: jax.Array, new: New, call: Call, first: Any,
    positions: jax.Array, source: tuple[jax.Array, ...], given: Given, tap: Callable, **rest: Any,
) -> tuple[jax.Array, Held, View]:  # fmt: skip
    """Attention of the `new` tokens, which were appended; returns the layer's output, the layer with its memory noted,
    and the view."""
    at, layer, policy = f"layers.{index}", plan.spec.layers[index], plan.policy
    if rest["phase"] != "pass":
        held = observe(held, q, positions)
    if isinstance(held, PagedState):
        out, sums = mixed_in_pages(plan, index, held, q, new, call, given)
    else:
        out, sums = by_head(plan.mesh, partial(mixed, plan.own, index), held, q, new, call, first, given)
    output = None
    if policy.needs.output:
        weight = widened(block.attention.output.weight[...])
        output = weight.T.reshape(layer.kv_heads, layer.group, layer.head_dim, -1)
    view = view_of(held, plan, index, given, widened(q[:0]).dtype, call, sums=sums, output=output, **rest)
    if view.memory:
        seen = _streamed(plan, view, positions, *source) if policy.needs.stream else view
        held = remembered(held, noted(policy, seen).memory, (positions >= 0).any(axis=1))
        view = replace(view, memory={key: held.memory[key] for key in policy.memory} | held.heads)
    out = jnp.moveaxis(out, 3, 1).reshape(*positions.shape, layer.heads * layer.head_dim)
    tap(f"{at}.attention.mixed", out)
    y = block.attention.output(out)
    tap(f"{at}.attention.output", y)
    return y, held, view


def _streamed(
    plan: Plan,
    view: View,
    positions: jax.Array,
    raw: jax.Array,
    hidden: jax.Array,
    slope: jax.Array | None = None,
) -> View:
    """The view after the policy's `stream` of each block of the call."""
    tokens = positions.shape[1]
    raw, hidden = widened(raw), widened(hidden)
    if tokens <= BLOCK:
        return streamed(plan.policy, view, Block(positions, raw, hidden, slope))
    count = -(-tokens // BLOCK)
    more = count * BLOCK - tokens
    positions = jnp.pad(positions, ((0, 0), (0, more)), constant_values=EMPTY)
    raw = jnp.pad(raw, ((0, 0),) * 3 + ((0, more), (0, 0)))
    hidden, slope = (x if x is None else jnp.pad(x, ((0, 0), (0, more), (0, 0))) for x in (hidden, slope))
    cut = (
        jnp.moveaxis(positions.reshape(-1, count, BLOCK), 1, 0),
        jnp.moveaxis(raw.reshape(*raw.shape[:3], count, BLOCK, -1), 3, 0),
        *(
            x if x is None else jnp.moveaxis(x.reshape(-1, count, BLOCK, x.shape[-1]), 1, 0)
            for x in (hidden, slope)
        ),
    )

    def one(memory: Any, part: Any) -> tuple[Any, None]:
        return dict(streamed(plan.policy, replace(view, memory=memory), Block(*part)).memory), None

    return replace(view, memory=jax.lax.scan(one, dict(view.memory), cut)[0])


def _rest(
    block: "DecoderLayer", plan: Plan, index: int, x: jax.Array, y: jax.Array, tap: Callable
) -> jax.Array:
    """The layer after attention: residual, feed-forward, residual."""
    x = x + (block.attention_post_norm(y) if plan.spec.post_norms else y)
    y = block.ffn(block.ffn_norm(x))
    tap(f"layers.{index}.ffn", y)
    x = x + (block.ffn_post_norm(y) if plan.spec.post_norms else y)
    tap(f"layers.{index}.output", x)
    return x


def newest(
    x: Float[jax.Array, "batch tokens dim"], real: Bool[jax.Array, "batch tokens"]
) -> Float[jax.Array, "batch 1 dim"]:
    """What belongs to the last token of each row."""
    last = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)


def _places(state: State, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [batch tokens] of the next tokens, -1 where they are not real, and what the rows have then seen."""
    positions = jnp.where(real, state.seen[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, EMPTY)
    return positions, state.seen + jnp.sum(real, axis=1, dtype=jnp.int32)


def _embed(decoder: "Decoder", plan: Plan, tokens: jax.Array, tap: Callable) -> jax.Array:
    x = decoder.embed[...][jnp.maximum(tokens, 0)]
    x = x * jnp.asarray(plan.spec.embed_scale, x.dtype)
    tap("embed", x)
    return x


def _logits(
    decoder: "Decoder", plan: Plan, x: jax.Array, tap: Callable
) -> Float[jax.Array, "batch tokens vocab"]:
    x = decoder.norm(x)
    tap("norm", x)
    if decoder.head is None:
        out = jnp.einsum("btd,vd->btv", x, decoder.embed[...], preferred_element_type=widened(x[:0]).dtype)
    else:
        out = decoder.head(x)
    out = widened(out)
    if plan.spec.logit_softcap is not None:
        out = jnp.tanh(out / plan.spec.logit_softcap) * plan.spec.logit_softcap
    tap("logits", out)
    return out


@partial(
    jax.jit,
    static_argnames=(
        "bones",
        "plan",
        "phase",
        "logits",
        "due",
        "whole",
        "slots",
        "layouts",
        "record",
        "measure",
        "tap",
    ),
)
def advance(
    bones: Skeleton,
    plan: Plan,
    phase: str,
    logits: str | None,
    due: bool,
    whole: bool,
    slots: tuple[int, ...],
    layouts: tuple[Pages | None, ...],
    record: bool,
    measure: bool,
    leaves: list[jax.Array],
    given: Given,
    state: State,
    tokens: Int[Array, "batch tokens"],
    forced: list[Array] | None,
    slopes: list[Array] | None = None,
    tap: Callable = no_tap,
) -> tuple[Any, State, list, list]:
    """One call of many tokens: append, attend, note, then evict where `due`; buffers come out with `slots` slots, or in
    pages.

    `whole`: rows without a token in this call are evicted too. `slopes`: the gradients of a second pass. Returns
    logits, state, and what was asked for: decisions (`record`) and the policy's statistics of each layer (`measure`).
    """
    decoder = bones.decoder(leaves)
    tokens, given = jnp.asarray(tokens), _inside(decoder, plan, given)
    real = tokens >= 0
    positions, seen = _places(state, real)
    active = jnp.ones_like(real[:, 0]) if whole else real.any(axis=1)
    x = _embed(decoder, plan, tokens, tap)
    taken: list[tuple[int, tuple]] = []
    statistics: list[jax.Array] = []
    layers: list[Held] = []
    dropped, bad, unfit = state.dropped, state.bad, state.unfit
    for index, block in enumerate(decoder.layers):
        q, new, left, source = _project(block, plan, index, x, positions, given, tap)
        source = source if slopes is None else (*source, jnp.asarray(slopes[index]))
        before = opened(state.layers[index])
        first = before.slots
        call = Call(left, positions, state.seen, seen)
        made, unfit = _coded(plan, index, positions, new, left, unfit)
        held: Held = append(before, made, positions, tokens, plan.policy)
        y, held, view = _attend(
            block,
            plan,
            index,
            held,
            q,
            new,
            call,
            first,
            positions,
            source,
            given,
            tap,
            seen=seen,
            phase=phase,
        )
        if measure:
            statistics.append(measured(plan.policy, view))
        if index == len(plan.spec.layers) - 1 and logits != "all" and tap is no_tap:
            # Nobody asks for the others.
            x, y, real = newest(x, real), newest(y, real), real.any(axis=1, keepdims=True)
        x = _rest(block, plan, index, x, y, tap)
        if due and plan.bounded[index]:
            choice = None if forced is None else jnp.asarray(forced[len(taken)])
            held, lost, wrong, decision = compacted(held, view, plan.policy, active, slots[index], choice)
            dropped, bad = jnp.where(lost, seen, dropped), bad | wrong
            taken.append((index, decision))
        else:
            held = packed(opened(held), slots[index])
        if plan.codec.recent and phase != "pass":
            held, wrong = recoded_layer(held, plan, index, replace(call, queries=held.queries), None)
            unfit = _marked(unfit, index, wrong)
        if (layout := layouts[index]) is not None:
            least = given.budget(index, plan.spec.layers[index].kv_heads) if plan.overwrites(index) else 0
            held = closed(held, layout, least)
            bad = bad | held.overflows
        layers.append(held)
    result = kept_in_place(plan.mesh, State(layers, seen, dropped, bad, unfit))
    decisions = taken if record else []
    if logits is None:
        return None, result, decisions, statistics
    if logits == "last":
        x, real = newest(x, real), real.any(axis=1, keepdims=True)
    out = _logits(decoder, plan, x, tap)
    return jnp.where(real[..., None], out, 0), result, decisions, statistics


def _one(
    decoder: "Decoder", plan: Plan, given: Given, state: State, tokens: Int[Array, "batch"], steps: Int[Array, ""],
) -> tuple[Float[jax.Array, "batch vocab"], State]:  # fmt: skip
    """One token per row into buffers whose shapes stay; -1 leaves a row as it is."""
    tokens, steps = jnp.asarray(tokens), jnp.asarray(steps)
    given = _inside(decoder, plan, given)
    real = tokens >= 0
    position = jnp.where(real, state.seen, EMPTY)[:, None]
    seen = state.seen + real.astype(jnp.int32)
    x = _embed(decoder, plan, tokens[:, None], no_tap)
    layers: list[Held] = []
    dropped, bad, unfit = state.dropped, state.bad, state.unfit
    for index, block in enumerate(decoder.layers):
        held = state.layers[index]
        q, new, left, source = _project(block, plan, index, x, position, given, no_tap)
        call = Call(left, position, state.seen, seen)
        first = held.fill
        write = partial(overwrite, mesh=plan.mesh) if plan.overwrites(index) else append_one
        made, unfit = _coded(plan, index, position, new, left, unfit)
        held = write(held, made, position, tokens[:, None], plan.policy)
        y, held, view = _attend(
            block,
            plan,
            index,
            held,
            q,
            new,
            call,
            first,
            position,
            source,
            given,
            no_tap,
            seen=seen,
            phase="decode",
        )
        x = _rest(block, plan, index, x, y, no_tap)
        if plan.bounded[index]:
            if plan.overwrites(index):
                held, lost, wrong = without_weakest(held, view, plan.policy, real)
            else:
                held, lost, wrong = _sometimes(plan, held, view, given, call, real, steps)
            dropped, bad = jnp.where(lost, seen, dropped), bad | wrong
        if recent := plan.codec.recent:
            due = jnp.any(state.seen // recent < seen // recent)
            held, wrong = recoded_layer(held, plan, index, replace(call, queries=held.queries), due)
            unfit = _marked(unfit, index, wrong)
        layers.append(held)
    # A choice among all tokens is dozens of small sums over devices where each has a part of them.
    out = by_row(plan.mesh, _logits(decoder, plan, x, no_tap)[:, 0])
    state = kept_in_place(plan.mesh, State(layers, seen, dropped, bad, unfit))
    return jnp.where(real[:, None], out, 0), state


def _sometimes(
    plan: Plan, held: Held, view: View, given: Given, call: Call, active: jax.Array, steps: jax.Array
) -> tuple:
    """Compaction at every `interval`-th step."""

    def compact(held: Held) -> tuple:
        # Read from the operand: what the closure captured would keep a second copy of the buffers.
        current = replace(
            view,
            positions=held.positions,
            memory={key: held.memory[key] for key in plan.policy.memory} | held.heads,
            keys=None
            if view.keys is None
            else read(held, plan, view.layer, given, "keys", view.keys.dtype, call),
            values=None
            if view.values is None
            else read(held, plan, view.layer, given, "values", view.values.dtype, call),
            queries=None if held.queries is None else widened(held.queries),
            query_positions=held.query_positions,
        )
        current = seen_by(plan.policy, current)
        if plan.policy.repositions:
            current = repositioned(current)
        return compacted(held, current, plan.policy, active, held.slots)[:3]

    def wait(held: Held) -> tuple:
        return held, jnp.zeros_like(active), jnp.zeros((), bool)

    if plan.policy.interval == 1:
        return compact(held)
    return jax.lax.cond(steps % plan.policy.interval == 0, compact, wait, held)


@partial(jax.jit, static_argnames=("bones", "plan"), donate_argnames=("state",))
def single(
    bones: Skeleton,
    plan: Plan,
    leaves: list[jax.Array],
    given: Given,
    state: State,
    tokens: Int[Array, "batch"],
    steps: Int[Array, ""],
) -> tuple[Float[jax.Array, "batch vocab"], State]:
    """One decode step with given tokens; `steps` counts from 1 since the last prefill."""
    return _one(bones.decoder(leaves), plan, given, state, tokens, steps)


@partial(jax.jit, static_argnames=("bones", "plan"), donate_argnames=("state", "logits", "out"))
def loop(
    bones: Skeleton,
    plan: Plan,
    leaves: list[jax.Array],
    given: Given,
    state: State,
    logits: Float[jax.Array, "batch vocab"],
    out: Int[jax.Array, "batch output"],
    going: Bool[jax.Array, "batch"],
    steps: Int[jax.Array, ""],
    count: Int[jax.Array, ""],
    first: Int[jax.Array, ""],
    settings: tuple,
    stop: Int[jax.Array, "stops"],
) -> tuple[State, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Choose and step `count` times or until no row is going; state, logits, tokens, rows still going, steps done."""
    decoder = bones.decoder(leaves)
    temperature, top_k, top_p, min_p, seed = settings
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)

    def more(carry: tuple) -> jax.Array:
        done, _, _, _, going = carry
        return (done < count) & going.any()

    def body(carry: tuple) -> tuple:
        done, state, logits, out, going = carry

        def sampled(x: jax.Array) -> jax.Array:
            noise = gumbel(jnp, seed, first + done, rows, x.shape[-1])
            return choose(jnp, x, noise, temperature, top_k, top_p, min_p)

        def greedy(x: jax.Array) -> jax.Array:
            return jnp.argmax(x, axis=-1).astype(jnp.int32)

        chosen = jax.lax.cond(temperature > 0, sampled, greedy, logits.astype(jnp.float32))
        token = jnp.where(going, chosen, EMPTY)
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], done, axis=1)
        fresh, state = _one(decoder, plan, given, state, token, steps + done + 1)
        logits = jnp.where(going[:, None], fresh, logits)
        going = going & ~(chosen[:, None] == stop[None]).any(axis=1)
        return done + 1, state, logits, out, going

    done, state, logits, out, going = jax.lax.while_loop(
        more, body, (jnp.zeros((), jnp.int32), state, logits, out, going)
    )
    return state, logits, out, going, done


def decode(
    model: "FlaxModel",
    cache: FlaxCache,
    logits: np.ndarray,
    sampling: Sampling,
    stop: Any,
    steps: int,
    first: int = 0,
    active: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, FlaxCache]:
    """See `framework.backend.Model.decode`."""
    stop = list(stop)
    going = np.ones(cache.batch, bool) if active is None else np.array(active)
    cache.admit(steps * going)
    cache = model.ready(cache, steps)
    plan, given, held = cache.plan, model.given(cache, int(cache.row_seen.max()) + steps), cache.state
    cache.consume()
    settings = (
        np.float32(sampling.temperature), np.int32(sampling.top_k), np.float32(sampling.top_p),
        np.float32(sampling.min_p), np.uint32(sampling.seed),
    )  # fmt: skip
    with precision(model.dtype):
        state, logits_after, out, still, done = loop(
            model.skeleton, plan, model.leaves, given, held,
            np.asarray(logits, np.promote_types(model.kind, np.float32)),
            np.full((cache.batch, -(-steps // OUTPUT) * OUTPUT), EMPTY, np.int32),
            going, np.int32(cache.steps), np.int32(steps), np.int32(first), settings,
            np.array(stop + [-2] * (-len(stop) % STOPS or STOPS * (not stop)), np.int32),
        )  # fmt: skip
        tokens = to_numpy(out)[:, :steps]
    count = int(done)
    all_steps, singles = cache.counted("decode", bool((tokens[:, :count] >= 0).all()), count)
    result = replace(
        cache,
        state=state,
        row_seen=cache.row_seen + (tokens >= 0).sum(1).astype(np.int32),
        steps=all_steps,
        singles=singles,
        used=cache.used + count,
        consumed=False,
    )
    model.check_scores(result)
    return tokens, to_numpy(logits_after), result
