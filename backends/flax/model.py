"""The model in Flax: the step drives decoder, cache and policy in compiled functions."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backends.flax.cache import FlaxCache, State
from backends.flax.convert import DTYPES, parameter, precision, to_jax, to_numpy, wide, widened
from backends.flax.decode import advance, decode, single, skeleton
from backends.flax.decoder import Decoder, in_shares
from backends.flax.gradient import gradients
from backends.flax.layer import Given, Held, Plan, empty_layer, opened, with_rows_for_groups
from backends.flax.pages import PagedState
from backends.flax.rope import Tables
from backends.flax.sharding import HEADS, check_cache, parameter_sharding, placed, read_mesh, replicated, size
from framework.arrays import FAR
from framework.backend import Model, check_sizes, read_codec, read_policy
from framework.cache import Decision
from framework.codec import Codec
from framework.coding import refused
from framework.errors import KvtwinError
from framework.eviction import UNLIMITED
from framework.fused import fused
from framework.pages import Pages
from framework.policies.window import Window
from framework.policy import Policy, name
from framework.rope import check_reach
from framework.shapes import EMPTY, bucket
from framework.snapshot import Snapshot
from framework.spec import ModelSpec
from framework.tokenizer import Tokenizer


class FlaxModel(Model):
    """A decoder in Flax, run by compiled functions over fixed-size buffers."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        dtype: str,
        tokenizer: Tokenizer,
        mesh: Any = None,
    ):
        self.spec, self.dtype, self.tokenizer = spec, dtype, tokenizer
        self.kind, self.mesh = DTYPES[dtype], read_mesh(mesh, spec)
        shares = 1 if self.mesh is None else size(self.mesh, HEADS)
        with precision(dtype):
            # One tensor at a time is in two places.
            self.decoder = Decoder(
                {
                    key: parameter(
                        in_shares(key, x, shares), self.kind, parameter_sharding(self.mesh, key, x.shape)
                    )
                    for key, x in fused(spec, weights)
                },
                spec,
                shares,
            )
            self.skeleton, self.leaves = skeleton(self.decoder)
        self.tables = Tables(self.kind, self.mesh)

    def cache(
        self,
        policy: str | Policy = "full()",
        codec: str | Codec = "full()",
        batch: int = 1,
        capacity: int | None = None,
        length: int | None = None,
    ) -> FlaxCache:
        check_sizes(batch, capacity, length)
        made, each = read_policy(policy, self.spec, batch)
        coding = read_codec(codec, made, self.spec)
        check_cache(self.mesh, batch, coding, self.spec)
        with precision(self.dtype):
            state = State(
                layers=[empty_layer(layer, made, coding, batch, 0, self.kind) for layer in self.spec.layers],
                seen=to_jax(np.zeros(batch), np.int32),
                dropped=to_jax(np.zeros(batch), np.int32),
                bad=to_jax(np.array(False)),
                unfit=[]
                if coding.exact
                else [to_jax(np.zeros(layer.kv_heads, bool)) for layer in self.spec.layers],
            )
            constants = {
                key: to_jax(value, wide(self.kind)) for key, value in made.constants(self.spec).items()
            }
            state, constants = placed(self.mesh, state), replicated(self.mesh, constants)
        return FlaxCache(
            self.spec, made, coding, self.dtype, each, state, np.zeros(batch, np.int32),
            np.full(batch, FAR, np.int32), capacity, length, constants=constants, mesh=self.mesh,
        )  # fmt: skip

    def run(
        self,
        tokens: np.ndarray,
        cache: Any,
        *,
        logits: Any = "last",
        phase: Any,
        evict: bool = True,
        forced: Sequence[np.ndarray] | None = None,
        decisions: list[Decision] | None = None,
        taps: dict[str, np.ndarray] | None = None,
        statistics: list[np.ndarray] | None = None,
        gradients: Sequence[np.ndarray] | None = None,
    ) -> tuple[Any, FlaxCache]:
        after = cache.admit((tokens >= 0).sum(1))
        alone = phase == "decode" and tokens.shape[1] == 1 and not cache.pending and evict
        if alone and forced is None and decisions is None and taps is None:
            return self._single(tokens, cache, after, logits)
        return self._chunk(
            tokens, cache, after, logits, phase, evict, forced, decisions, taps, statistics, gradients
        )

    def _single(
        self, tokens: np.ndarray, cache: FlaxCache, after: np.ndarray, logits: Any
    ) -> tuple[Any, FlaxCache]:
        cache = self.ready(cache, 1)
        given, held = self.given(cache, int(after.max())), cache.state
        cache.consume()
        with precision(self.dtype):
            out, state = single(
                self.skeleton, cache.plan, self.leaves, given, held, tokens[:, 0], np.array(cache.steps + 1, np.int32)
            )  # fmt: skip
        steps, singles = cache.counted("decode", bool((tokens >= 0).all()))
        result = replace(
            cache,
            state=state,
            row_seen=after,
            steps=steps,
            singles=singles,
            used=cache.used + 1,
            consumed=False,
        )
        self.check_scores(result)
        return (None if logits is None else to_numpy(out)[:, None]), result

    def _chunk(
        self, tokens: np.ndarray, cache: FlaxCache, after: np.ndarray, logits: Any, phase: Any, evict: bool,
        forced: Any, decisions: Any, taps: Any, statistics: Any, slopes: Any,
    ) -> tuple[Any, FlaxCache]:  # fmt: skip
        count, wide_tokens = tokens.shape[1], _bucketed(tokens)
        steps, singles = cache.counted(phase, count == 1 and bool((tokens >= 0).all()))
        whole = phase == "prefill" or cache.pending
        due = evict and (whole or steps % cache.policy.interval == 0)
        pending = not due and (cache.pending or phase == "prefill" or not evict)
        held = int(cache.row_seen.max())
        every = range(len(self.spec.layers))
        slots = tuple(
            self._slots(cache, index, due, whole, held + wide_tokens.shape[1], pending, count)
            for index in every
        )
        layouts = tuple(
            None if pending else self._layout(cache, index, due and whole, count) for index in every
        )
        given, old = self.given(cache, int(after.max())), cache.state
        cache.consume()
        named: dict[str, Any] = {}
        arguments = (
            self.skeleton, cache.plan, phase, logits, due, whole, slots, layouts, decisions is not None,
            statistics is not None, self.leaves, given, old, wide_tokens,
            None if forced is None else [np.asarray(kept, np.int32) for kept in forced],
            None if slopes is None else [_bucketed(each, 0) for each in slopes],
        )  # fmt: skip
        with precision(self.dtype):
            if taps is None:
                out, state, taken, measured = advance(*arguments)
            else:
                out, state, taken, measured = advance.__wrapped__(*arguments, tap=named.__setitem__)
        result = replace(
            cache,
            state=state,
            row_seen=after,
            steps=steps,
            singles=singles,
            pending=pending,
            used=int(after.max()),
            consumed=False,
        )
        if unfit := _unfit(state):
            cache.state, cache.consumed = old, False  # this call gave no buffer away
            raise refused(cache.codec, unfit)
        self.check_scores(result)
        if taps is not None:
            real = tokens >= 0
            for key, value in named.items():
                array = to_numpy(widened(value))[:, :count]
                taps[key] = (
                    np.where(real.reshape(*real.shape, *(1,) * (array.ndim - 2)), array, 0)
                    if array.shape[1] == count
                    else array
                )
        if decisions is not None:
            for index, one in taken:
                positions, scores, *others = (to_numpy(x) for x in one)
                decisions.append(Decision(int(index), positions, scores.astype(np.float64), *others))
        if statistics is not None:
            statistics.extend(to_numpy(one) for one in measured)
        if logits is None:
            return None, result
        return to_numpy(out)[:, : count if logits == "all" else 1], result

    def gradients(self, tokens: np.ndarray, cache: Any) -> list[np.ndarray]:
        after = cache.admit((tokens >= 0).sum(1))
        # Without the policy, its memory and its budgets: one compilation serves all of them.
        plan = Plan(
            self.spec,
            Window(reposition=cache.policy.repositions),
            cache.codec,
            (False,) * len(self.spec.layers),
            self.mesh,
        )
        given = replace(self.given(cache, int(after.max())), constants={})
        layers = [
            replace(layer, memory={}, heads={}, queries=None, query_positions=None)
            for layer in cache.state.layers
        ]
        with precision(self.dtype):
            state = replace(cache.state, layers=layers)
            found = gradients(self.skeleton, plan, self.leaves, given, state, _bucketed(tokens))
        return [to_numpy(each)[:, : tokens.shape[1]] for each in found]

    def _slots(
        self, cache: FlaxCache, index: int, due: bool, whole: bool, tokens: int, pending: bool, count: int
    ) -> int:
        """Slots of a layer's buffers after a call: the usual number, except where rows hold more than that."""
        usual, interval = cache.slots(index, tokens), cache.policy.interval
        if cache.limit(index) is None or (due and (whole or interval == 1)):
            return usual
        if pending:
            return max(usual, bucket(tokens))
        # A row without tokens keeps what it has gathered; up to `interval` more follow before the next eviction.
        least = int(cache.state.layers[index].fill) + interval + (0 if due else count)
        return usual if least <= usual else bucket(least)

    def _layout(self, cache: FlaxCache, index: int, whole: bool, count: int) -> Pages | None:
        """The pages of a layer after a call; more than usual where rows may hold more than that."""
        layout, layer = cache.pages(index), cache.state.layers[index]
        if layout is None or whole:
            return layout
        heads = cache.batch * self.spec.layers[index].kv_heads
        filled = sum(int((to_numpy(x) >= 0).sum()) for x in layer.stored["positions"])
        least = heads + (filled + heads * (count + layout.spare)) // layout.size
        return replace(layout, count=max(layout.count, bucket(least)))

    def ready(self, cache: FlaxCache, tokens: int) -> FlaxCache:
        """The cache with room for `tokens` decode steps; a cache that holds back an eviction evicts first.

        Each step takes one slot of an unbounded layer, whichever rows are still going: ragged rows may need more slots
        than a declared capacity has tokens.
        """
        if cache.pending:
            nothing = np.full((cache.batch, 1), EMPTY, np.int32)
            _, cache = self.step(nothing, cache, logits=None, phase="prefill")
        layers = []
        for index, layer in enumerate(cache.state.layers):
            bounded = cache.limit(index) is not None
            least = cache.slots(index) if bounded else bucket(cache.used + tokens)
            silent = bounded and cache.steps > cache.singles
            if silent:
                # Rows that were silent at an eviction may hold more than the budget, and keep it at the next one.
                most = max(int(layer.fill), cache.limit(index) or 0)
                least = max(least, bucket(most + 2 * cache.policy.interval))
            if isinstance(layer, PagedState):
                if silent or layer.slots < least:
                    layer = cache.settle(index, layer, least)
            elif layer.slots < least and (bounded or layer.slots < cache.used + tokens):
                layer = self._widened(layer, least)
            with precision(self.dtype):
                layer = with_rows_for_groups(layer, cache.codec, bounded)
            layers.append(layer)
        if any(new is not old for new, old in zip(layers, cache.state.layers, strict=True)):
            state = placed(self.mesh, replace(cache.state, layers=layers))
            cache.consume()
            cache = replace(cache, state=state, consumed=False)
        return cache

    def _widened(self, layer: Any, slots: int) -> Any:
        more = slots - layer.slots

        def pad(x: jax.Array, empty: float | int = 0) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, more)) + ((0, 0),) * (x.ndim - 3), constant_values=empty)

        with precision(self.dtype):
            return replace(
                layer,
                streams={key: pad(value) for key, value in layer.streams.items()},
                positions=pad(layer.positions, EMPTY),
                memory={key: pad(value) for key, value in layer.memory.items()},
            )

    def given(self, cache: FlaxCache, positions: int) -> Given:
        """What the compiled functions are given beside the state, for calls that reach this many positions."""
        heads = max(layer.kv_heads for layer in self.spec.layers)
        budgets = np.full((len(self.spec.layers), cache.batch, heads), UNLIMITED, np.int32)
        for index, budget in enumerate(cache.budgets):
            if budget is not None:
                budgets[index, :, : budget.shape[1]] = budget
        for layer in self.spec.layers:
            if layer.rope is not None:
                check_reach(layer.rope, positions - 1, cache.length)
        with precision(self.dtype):
            tables = self.tables.of(self.spec, cache.length, positions + cache.policy.needs.ahead)
        return Given(tables, budgets, cache.constants, cache.question)

    def check_scores(self, cache: FlaxCache) -> None:
        """Raises if a score was NaN, or something could not be coded."""
        if unfit := _unfit(cache.state):
            raise refused(cache.codec, unfit, spent=True)
        if not (cache.plan.policy.evicts and bool(cache.state.bad)):
            return
        for index, layer in enumerate(cache.state.layers):
            if isinstance(layer, PagedState) and bool(layer.overflows):
                raise KvtwinError(
                    f"policy {name(cache.policy)} gave the heads of layer {index} more than its `total` says; "
                    "expected the most tokens that its `budgets` ever gives them together"
                )
        raise KvtwinError(f"policy {name(cache.policy)} scored NaN; expected numbers")

    def decode(
        self,
        cache: Any,
        logits: Any,
        sampling: Any,
        stop: Any,
        steps: int,
        first: int = 0,
        active: Any = None,
    ) -> Any:
        return decode(self, cache, logits, sampling, stop, steps, first, active)

    def restore(self, source: Snapshot | str | os.PathLike) -> FlaxCache:
        held = source if isinstance(source, Snapshot) else Snapshot.load(source, self.spec)
        cache = self.cache(held.policy, held.codec, len(held.seen), held.capacity, held.length)
        with precision(self.dtype):
            layers: list[Held] = [
                replace(
                    empty,
                    streams={
                        key: to_jax(value, empty.streams[key].dtype) for key, value in saved.streams.items()
                    },
                    positions=to_jax(saved.positions, np.int32),
                    memory={key: to_jax(value, wide(self.kind)) for key, value in saved.memory.items()},
                    heads={key: to_jax(value, wide(self.kind)) for key, value in saved.heads.items()},
                    queries=None if saved.queries is None else to_jax(saved.queries, self.kind),
                    query_positions=None
                    if saved.query_positions is None
                    else to_jax(saved.query_positions, np.int32),
                    fill=to_jax(np.array(saved.positions.shape[-1]), np.int32),
                    tables={
                        key: to_jax(value, empty.tables[key].dtype) for key, value in saved.tables.items()
                    },
                )
                for empty, saved in zip(map(opened, cache.state.layers), held.layers, strict=True)
            ]
            cache.state = replace(
                cache.state,
                layers=layers,
                seen=to_jax(held.seen, np.int32),
                dropped=to_jax(held.dropped, np.int32),
            )
        cache.budgets = list(held.budgets)
        cache.question = held.question.astype(np.int32)
        cache.row_seen, cache.used = held.seen.astype(np.int32), int(held.seen.max())
        cache.steps, cache.pending = held.steps, held.pending
        return cache.settled()


def _unfit(state: State) -> list[np.ndarray] | None:
    """The heads of each layer that made what cannot be coded, if there are any."""
    heads = [to_numpy(x) for x in state.unfit]
    return heads if any(x.any() for x in heads) else None


def _bucketed(x: np.ndarray, empty: int = EMPTY) -> np.ndarray:
    """[batch tokens ...] with more tokens behind, up to a number for which there is a compiled function."""
    more = bucket(x.shape[1], 16) - x.shape[1]
    return np.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2), constant_values=empty)
