"""The specification as a program: decoder and eviction in plain NumPy float64, slow and obvious.

Each row is run alone, without padding, buffers or batches; each head keeps its own list of tokens; survivors are picked
with Python's sort. When two backends disagree, this says who is right.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from framework.arrays import FAR
from framework.backend import Backend as Contract
from framework.backend import Model, check_sizes, read_codec, read_policy
from framework.cache import Decision
from framework.codec import Codec
from framework.codecs.full import Full
from framework.coding import layout
from framework.decode import Sampling, choose
from framework.errors import KvtwinError
from framework.eviction import (
    UNLIMITED,
    alive,
    heads_budgets,
    judge,
    measured,
    noted,
    repositioned,
    slot_memory,
    streamed,
)
from framework.groups import asked
from framework.policies.window import Window
from framework.policy import Block, Policy, View, name
from framework.random import gumbel
from framework.reference_cache import Head, ReferenceCache, Row, merge_heads, restored_head, select, stack
from framework.reference_coding import code, complete, key_bias, read_stored, restore_keys
from framework.reference_gradient import gradients as backward
from framework.reference_parts import ACTIVATIONS, rms_norm, softmax, turned
from framework.rope import angles
from framework.snapshot import Snapshot
from framework.spec import Layer, ModelSpec
from framework.tokenizer import ByteTokenizer, Tokenizer
from framework.weights import check
from framework.wrapper import seen_by


@dataclass
class ReferenceModel(Model):
    """The decoder in float64."""

    spec: ModelSpec
    weights: dict[str, np.ndarray]
    tokenizer: Tokenizer
    dtype: str = "float64"

    def cache(
        self,
        policy: str | Policy = "full()",
        codec: str | Codec = "full()",
        batch: int = 1,
        capacity: int | None = None,
        length: int | None = None,
    ) -> ReferenceCache:
        check_sizes(batch, capacity, length)
        made, each = read_policy(policy, self.spec, batch)
        coding = read_codec(codec, made, self.spec)
        content = [self._row(made, coding) for _ in range(batch)]
        constants = {key: np.asarray(value, np.float64) for key, value in made.constants(self.spec).items()}
        return ReferenceCache(
            self.spec, made, coding, each, content, np.full(batch, FAR, np.int32), capacity, length,
            constants=constants,
        )  # fmt: skip

    def _row(self, policy: Policy, codec: Codec) -> Row:
        newest = asked(policy, codec)
        layers = self.spec.layers
        return Row(
            [[self._head(policy, codec, layer, head) for head in range(layer.kv_heads)] for layer in layers],
            [np.zeros((layer.kv_heads, layer.group, newest, layer.head_dim)) for layer in layers],
            [np.full(newest, -1, np.int32) for _ in layers],
        )

    def _head(self, policy: Policy, codec: Codec, layer: Layer, number: int) -> Head:
        kept = {} if codec.exact else layout(codec, layer)
        return Head(
            np.zeros(0, np.int32),
            {key: np.zeros((0, stream.width)) for key, stream in layer.streams.items()},
            {key: np.zeros(0) for key in slot_memory(policy)},
            {key: np.zeros(shape) for key, shape in policy.head_memory(layer).items()},
            {key: np.zeros((0, one.width), kind) for key, (one, kind) in kept.items() if number < one.heads},
            np.zeros((0, layer.head_dim)) if codec.recent else None,
        )

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
    ) -> tuple[Any, ReferenceCache]:
        after = cache.admit((tokens >= 0).sum(1))
        for layer in self.spec.layers:
            if layer.rope is not None:
                angles(layer.rope, after.max(keepdims=True) - 1, cache.length)  # raises out of reach
        result = cache.fork()
        single = tokens.shape[1] == 1 and bool((tokens >= 0).all())
        result.steps, result.singles = result.counted(phase, single)
        whole = phase == "prefill" or result.pending  # also rows that got no token in this call are evicted
        due = evict and (whole or result.steps % result.policy.interval == 0)
        result.pending = not due and (result.pending or phase == "prefill" or not evict)

        every = np.zeros((*tokens.shape, self.spec.vocab))
        tapped: list[dict[str, np.ndarray]] = []
        taken: list[list[Decision]] = []
        stated: list[list[np.ndarray]] = []
        for index in range(result.batch):
            columns = np.flatnonzero(tokens[index] >= 0)
            values: dict[str, np.ndarray] = {}
            slopes = None if gradients is None else [each[index, columns] for each in gradients]
            views = self._forward(result, index, tokens[index, columns], phase, values, slopes)
            if len(columns):
                every[index, columns] = values["logits"]
            tapped.append(values)
            if due:
                choice = None if forced is None else [kept[index] for kept in forced]
                taken.append(self._evict(result, index, views, choice, whole or len(columns) > 0))
            if result.codec.recent and phase != "pass":
                for number in range(len(self.spec.layers)):
                    complete(self, result, index, number)
            if statistics is not None:
                stated.append([measured(result.policy, view) for view in views])
        if decisions is not None and due:
            decisions.extend(_join([one[layer] for one in taken]) for layer in range(len(taken[0])))
        if statistics is not None:
            statistics.extend(np.concatenate(each) for each in zip(*stated, strict=True))
        if taps is not None:
            taps.update(_spread(tokens, tapped))
        cache.consume()
        if logits == "last":
            last = np.array([max(np.flatnonzero(row >= 0), default=0) for row in tokens])
            return every[np.arange(len(tokens)), last][:, None], result
        return (every if logits == "all" else None), result

    def gradients(self, tokens: np.ndarray, cache: Any) -> list[np.ndarray]:
        after = cache.admit((tokens >= 0).sum(1))
        for layer in self.spec.layers:
            if layer.rope is not None:
                angles(layer.rope, after.max(keepdims=True) - 1, cache.length)  # raises out of reach
        silent = replace(cache, policy=Window(reposition=cache.policy.repositions), codec=Full()).fork()
        for head in (head for row in silent.content for heads in row.heads for head in heads):
            head.memory, head.own = {}, {}
        found = [np.zeros((*tokens.shape, self.spec.dim)) for _ in self.spec.layers]
        for index in range(cache.batch):
            columns = np.flatnonzero(tokens[index] >= 0)
            if len(columns):
                taps: dict[str, np.ndarray] = {}
                self._forward(silent, index, tokens[index, columns], "pass", taps)
                for one, own in zip(found, backward(self, silent, index, taps), strict=True):
                    one[index, columns] = own
        return found

    def _forward(
        self,
        cache: ReferenceCache,
        number: int,
        tokens: np.ndarray,
        phase: Any,
        taps: dict[str, np.ndarray],
        gradients: list[np.ndarray] | None = None,
    ) -> list[View]:
        """Append and attend the tokens of one row; fills `taps`, returns what the policy sees of each layer."""
        spec, w, row = self.spec, self.weights, cache.content[number]
        positions = row.seen + np.arange(len(tokens), dtype=np.int32)
        row.seen += len(tokens)
        linear, norm = self.linear, self.norm
        x = taps["embed"] = w["embed.weight"][tokens] * spec.embed_scale
        views = []
        for index, layer in enumerate(spec.layers):
            at = f"layers.{index}"
            h = taps[f"{at}.attention_norm"] = norm(x, f"{at}.attention_norm")
            q = linear(h, f"{at}.attention.query").reshape(len(tokens), layer.heads, layer.head_dim)
            k = linear(h, f"{at}.attention.key").reshape(len(tokens), layer.kv_heads, layer.head_dim)
            v = linear(h, f"{at}.attention.value").reshape(len(tokens), layer.kv_heads, layer.head_dim)
            if spec.query_key_norm:
                q, k = norm(q, f"{at}.attention.query_norm"), norm(k, f"{at}.attention.key_norm")
            taps[f"{at}.attention.query"], taps[f"{at}.attention.key"] = q, k
            taps[f"{at}.attention.value"] = v
            ids = tokens if cache.policy.needs.tokens else None
            mixed, sums = self._attention(cache, row, index, positions, ids, q, k, v, phase, taps)
            block = Block(
                positions[None], q.reshape(1, -1, layer.kv_heads, layer.group, layer.head_dim).transpose(0, 2, 3, 1, 4),
                h[None], None if gradients is None else gradients[index][None],
            )  # fmt: skip
            views.append(self._view(cache, number, index, sums, block, phase))
            y = taps[f"{at}.attention.output"] = linear(mixed, f"{at}.attention.output")
            x = x + (norm(y, f"{at}.attention_post_norm") if spec.post_norms else y)
            h = norm(x, f"{at}.ffn_norm")
            gate, up = linear(h, f"{at}.ffn.gate"), linear(h, f"{at}.ffn.up")
            y = taps[f"{at}.ffn"] = linear(ACTIVATIONS[spec.activation](gate) * up, f"{at}.ffn.down")
            x = x + (norm(y, f"{at}.ffn_post_norm") if spec.post_norms else y)
            taps[f"{at}.output"] = x
        x = taps["norm"] = norm(x, "norm")
        out = x @ w["embed.weight" if spec.tied else "head.weight"].T
        if spec.logit_softcap is not None:
            out = spec.logit_softcap * np.tanh(out / spec.logit_softcap)
        taps["logits"] = out
        return views

    def linear(self, x: np.ndarray, key: str) -> np.ndarray:
        """The projection of this name, with its bias where it has one."""
        return x @ self.weights[f"{key}.weight"].T + self.weights.get(f"{key}.bias", 0.0)

    def norm(self, x: np.ndarray, key: str) -> np.ndarray:
        """The RMSNorm of this name."""
        return rms_norm(x, self.weights[f"{key}.weight"], self.spec.norm_eps, self.spec.norm_offset)

    def _attention(
        self,
        cache: ReferenceCache,
        row: Row,
        index: int,
        positions: Any,
        ids: Any,
        q: Any,
        k: Any,
        v: Any,
        phase: Any,
        taps: Any,
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The mixed values of the tokens, and what each slot of each head received."""
        layer, policy, at = self.spec.layers[index], cache.policy, f"layers.{index}.attention"

        turn, plain = partial(turned, layer.rope, cache.length), k
        if not policy.repositions:
            q, k = turn(q, positions), turn(k, positions)
        taps[f"{at}.query_rotated"], taps[f"{at}.key_rotated"] = q, k
        mixed = np.zeros_like(q)
        sums = []
        for kv_head, head in enumerate(row.heads[index]):
            head.positions = np.concatenate([head.positions, positions])
            new = {"keys": k[:, kv_head], "values": v[:, kv_head]}
            head.streams = {key: np.concatenate([head.streams[key], new[key]]) for key in new}
            head.memory = {
                key: np.concatenate(
                    [old, ids if key == "tokens" else np.full(len(positions), policy.memory[key])]
                )
                for key, old in head.memory.items()
            }
            keys, values = head.streams["keys"], head.streams["values"]
            rank = np.arange(len(keys))
            if policy.repositions:
                keys = turn(keys[:, None], rank)[:, 0]
            received = np.zeros(len(keys))
            for query_head in range(kv_head * layer.group, (kv_head + 1) * layer.group):
                for token, position in enumerate(positions):
                    query = q[token, query_head]
                    if policy.repositions:
                        own = rank[head.positions == position]
                        query = turn(query[None, None], own)[0, 0]
                    visible = head.positions <= position
                    if layer.window is not None:
                        visible &= head.positions > position - layer.window
                    logits = keys[visible] @ query * layer.scale
                    if layer.softcap is not None:
                        logits = layer.softcap * np.tanh(logits / layer.softcap)
                    weights = softmax(logits)
                    mixed[token, query_head] = weights @ values[visible]
                    received[visible] += weights / layer.group
            sums.append(received)
        if not cache.codec.exact:
            code(self, cache, index, row.heads[index], positions, plain if cache.codec.unrotated else k, v)
        newest = asked(policy, cache.codec)
        if newest and phase != "pass":
            fresh = q.reshape(len(positions), layer.kv_heads, layer.group, layer.head_dim).transpose(
                1, 2, 0, 3
            )
            row.queries[index] = np.concatenate([row.queries[index], fresh], 2)[:, :, -newest:]
            row.query_positions[index] = np.concatenate([row.query_positions[index], positions])[-newest:]
        mixed = taps[f"{at}.mixed"] = mixed.reshape(len(positions), layer.heads * layer.head_dim)
        return mixed, sums

    def _view(
        self, cache: ReferenceCache, number: int, index: int, sums: list, block: Block, phase: Any
    ) -> View:
        """What the policy sees of this layer of a row, its memory updated."""
        layer, policy, row = self.spec.layers[index], cache.policy, cache.content[number]
        heads, budget, needs = row.heads[index], cache.budgets[index], policy.needs
        cos, sin = None, None
        if layer.rope is not None:
            cos, sin = angles(layer.rope, np.arange(row.seen + needs.ahead), cache.length, beyond=True)
        output = self.weights[f"layers.{index}.attention.output.weight"]
        per_slot = {key: stack([[head.memory[key] for head in heads]]) for key in slot_memory(policy)}
        per_head = {key: np.array([[head.own[key] for head in heads]]) for key in heads[0].own}
        view = View(
            xp=xp,
            phase=phase,
            layer=index,
            layers=len(self.spec.layers),
            positions=stack([[head.positions for head in heads]], -1),
            budget=np.full((1, len(heads)), UNLIMITED, np.int32) if budget is None else budget[number][None],
            seen=np.array([row.seen], np.int32),
            question=cache.question[number : number + 1],
            memory={key: per_slot[key] for key in policy.memory} | per_head,
            keys=stack([[head.streams["keys"] for head in heads]]) if needs.keys or needs.queries else None,
            values=stack([[head.streams["values"] for head in heads]]) if needs.values else None,
            queries=row.queries[index][None],
            query_positions=row.query_positions[index][None],
            sums=stack([sums]) if needs.sums else None,
            tokens=per_slot["tokens"].astype(np.int32) if needs.tokens else None,
            output=output.T.reshape(layer.kv_heads, layer.group, layer.head_dim, -1)
            if needs.output
            else None,
            cos=cos,
            sin=sin,
            constants=cache.constants,
            scale=layer.scale,
            softcap=layer.softcap,
            window=layer.window,
            repositions=policy.repositions,
        )
        view = seen_by(policy, view)
        if policy.repositions:
            view = repositioned(view)
        if block.positions.shape[1]:
            view = noted(policy, streamed(policy, view, block) if needs.stream else view)
            for which, head in enumerate(heads):
                head.own = {key: np.asarray(view.memory[key][0, which]) for key in head.own}
                head.memory |= {
                    key: view.memory[key][0, which, : len(head.positions)] for key in policy.memory
                }
        return view

    def _evict(
        self,
        cache: ReferenceCache,
        number: int,
        views: list[View],
        forced: list[np.ndarray] | None,
        active: bool,
    ) -> list[Decision]:
        """Drop what does not survive in each bounded layer of one row; nothing in a row that is not active."""
        taken: list[Decision] = []
        policy, row = cache.policy, cache.content[number]
        for index, view in enumerate(views):
            layer = self.spec.layers[index]
            if cache.limit(index) is None:
                continue
            scores, protected = judge(policy, view)
            budget = heads_budgets(policy, view, scores)
            most = cache.limit(index)
            if layer.window is None and most is not None and (budget > most).any():
                raise KvtwinError(
                    f"policy {name(policy)}: budgets gave a head {budget.max()} tokens in layer {index}; "
                    f"expected at most {most}, what `most` says"
                )
            for given, shared in zip(budget, view.budget.tolist(), strict=True):
                if given.sum() > (total := policy.total(shared, index, self.spec)):
                    raise KvtwinError(
                        f"policy {name(policy)}: budgets gave the heads of layer {index} {given.sum()} tokens; "
                        f"expected at most {total}, what `total` says"
                    )
            filled = view.positions >= 0
            if np.isnan(scores[filled]).any():
                raise KvtwinError(f"policy {name(policy)} scored NaN in layer {index}; expected numbers")
            protected = np.zeros_like(filled) if protected is None else protected & filled
            living = alive(view.positions, view.seen, layer.window)
            kept, chosen = [], []
            for which, head in enumerate(row.heads[index]):
                slots = [slot for slot in range(len(head.positions)) if living[0, which, slot]]
                ranks = np.where(protected[0, which], 0, scores[0, which])
                slots.sort(key=lambda s: (protected[0, which, s], ranks[s], s), reverse=True)
                slots = sorted(slots[: budget[0, which]])
                if not active:
                    slots = list(range(len(head.positions)))
                kept.append(head.positions[slots])
                if forced is not None and active:
                    slots = [s for s, p in enumerate(head.positions) if p in forced[len(taken)][which]]
                if len(slots) < len(head.positions):
                    row.dropped = row.seen
                chosen.append(np.array(slots, np.int32))
            if policy.merges and active:
                merge_heads(policy, view, row.heads[index], chosen)
            for head, picked in zip(row.heads[index], chosen, strict=True):
                select(head, picked)
            scored = np.asarray(scores, np.float64)
            taken.append(Decision(index, view.positions, scored, protected, stack([kept], -1), budget))
        return taken

    def decode(
        self,
        cache: Any,
        logits: Any,
        sampling: Sampling,
        stop: Sequence[int],
        steps: int,
        first: int = 0,
        active: Any = None,
    ) -> tuple[np.ndarray, np.ndarray, ReferenceCache]:
        if cache.pending:
            _, cache = self.step(np.full((cache.batch, 1), -1), cache, logits=None, phase="prefill")
        batch = cache.batch
        active = np.ones(batch, bool) if active is None else np.array(active)
        rows, out = np.arange(batch), np.full((batch, steps), -1, np.int32)
        numbers = [
            np.float32(sampling.temperature),
            np.int32(sampling.top_k),
            np.float32(sampling.top_p),
            np.float32(sampling.min_p),
        ]
        for step in range(steps):
            if not active.any():
                break
            noise = gumbel(xp, sampling.seed, first + step, rows, self.spec.vocab)
            chosen = choose(xp, logits.astype(np.float32), noise, *(np.asarray(number) for number in numbers))
            out[:, step] = np.where(active, chosen, -1)
            fresh, cache = self.step(out[:, step : step + 1], cache, phase="decode")
            logits = np.where(active[:, None], fresh[:, 0], logits)
            active = active & ~np.isin(chosen, list(stop))
        return out, logits, cache

    def restore(self, source: Snapshot | str | os.PathLike) -> ReferenceCache:
        held = source if isinstance(source, Snapshot) else Snapshot.load(source, self.spec)
        cache = self.cache(held.policy, held.codec, len(held.seen), held.capacity, held.length)
        cache.budgets, cache.question = list(held.budgets), held.question.astype(np.int32)
        cache.steps, cache.pending = held.steps, held.pending
        for index, row in enumerate(cache.content):
            row.seen, row.dropped = int(held.seen[index]), int(held.dropped[index])
            for number, layer in enumerate(held.layers):
                own = self.spec.layers[number]
                streams = read_stored(cache.codec, own, layer, held.seen)
                row.heads[number] = [
                    restored_head(layer, streams, index, head, cache.codec) for head in range(own.kv_heads)
                ]
                for which, head in enumerate(row.heads[number]):
                    if cache.codec.recent:
                        restore_keys(self, cache, number, which, head)
                    elif cache.codec.unbiased:
                        head.streams["keys"] += key_bias(self, cache, number, head.positions)[:, which]
                if layer.queries is not None and layer.query_positions is not None:
                    row.queries[number] = layer.queries[index].astype(np.float64)
                    row.query_positions[number] = layer.query_positions[index]
        return cache


def _join(rows: list[Decision]) -> Decision:
    """The decisions of several rows as one batch."""

    def pile(arrays: list[np.ndarray], empty: float | int) -> np.ndarray:
        return stack([list(array[0]) for array in arrays], empty)

    return Decision(
        rows[0].layer,
        pile([row.positions for row in rows], -1),
        pile([row.scores for row in rows], 0.0),
        pile([row.protected for row in rows], 0),
        pile([row.kept for row in rows], -1),
        np.concatenate([row.budget for row in rows]),
    )


def _spread(tokens: np.ndarray, rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Values of the real tokens of each row, laid out [batch tokens ...] with 0 at padding."""
    result = {}
    for key in rows[0]:
        result[key] = np.zeros((*tokens.shape, *rows[0][key].shape[1:]))
        for index, row in enumerate(rows):
            result[key][index, tokens[index] >= 0] = row[key]
    return result


@dataclass(frozen=True)
class Backend(Contract):
    """The reference as a backend of its own: float64 only."""

    name: str = "reference"
    dtypes: tuple[str, ...] = field(default=("float64",))

    def build(
        self,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        dtype: str = "float64",
        tokenizer: Tokenizer | None = None,
        mesh: Any = None,
    ) -> ReferenceModel:
        if mesh is not None:
            raise KvtwinError(
                "a mesh came; the reference runs in one process on NumPy: leave it out, or take flax or torch"
            )
        self.check_dtype(dtype)
        check(spec, weights)
        return ReferenceModel(
            spec,
            {key: value.astype(np.float64) for key, value in weights.items()},
            tokenizer or ByteTokenizer(),
        )

    def load(self, name: str | os.PathLike, dtype: str = "float64", mesh: Any = None) -> Model:
        return super().load(name, dtype, mesh)
