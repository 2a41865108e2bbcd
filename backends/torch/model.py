"""The model in torch: the step that drives decoder, cache and policy."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from backends.torch.cache import TorchCache
from backends.torch.convert import DTYPES, to_numpy, to_torch, widened
from backends.torch.decode import decode
from backends.torch.decoder import Decoder, DecoderLayer
from backends.torch.gradient import gradients
from backends.torch.layer import Finish, LayerCache
from backends.torch.linear import Wide, local
from backends.torch.mixing import mixed, mixed_in_pages
from backends.torch.pages import PagedLayer, closed, opened
from backends.torch.rope import Tables, next_positions, turned
from backends.torch.share import ALONE, check_shared, cut, embedded, part_of, share_of
from framework.arrays import FAR
from framework.backend import Model, check_sizes, read_codec, read_policy
from framework.cache import Decision
from framework.codec import Codec, Side
from framework.coding import SIDES, refused, stored, uncoded
from framework.errors import KvtwinError
from framework.eviction import measured, noted, slot_memory, streamed
from framework.fused import fused
from framework.groups import Call, asked, exact_of, fixed_rows, tables_layout
from framework.policy import BLOCK, Block, Phase, Policy, View, name
from framework.rope import check_reach, ropes
from framework.shapes import EMPTY
from framework.snapshot import Snapshot
from framework.spec import Layer, ModelSpec, Rope
from framework.tokenizer import Tokenizer

Tap = Callable[[str, torch.Tensor], None]
Turn = tuple[torch.Tensor, torch.Tensor]
# Taps that have an axis of heads.
BY_HEAD = ("query", "key", "value", "query_rotated", "key_rotated", "mixed")


def no_tap(name: str, value: torch.Tensor) -> None:
    """Listens to nothing."""


class TorchModel(Model):
    """A decoder in torch, run eagerly over a dynamic cache.

    Over a `mesh` each process holds its share of the weights and of a cache's heads; every process makes every call,
    with the same arguments, and gets the same answer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        dtype: str,
        tokenizer: Tokenizer,
        mesh: Any = None,
    ):
        self.spec, self.dtype, self.tokenizer = spec, dtype, tokenizer
        self.share = ALONE if mesh is None else share_of(mesh, spec)
        self.part = spec if mesh is None else part_of(spec, self.share)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(here if mesh is None else mesh.device_type)
        self.kind = DTYPES[dtype]
        cores = torch.get_num_threads() if self.device.type == "cpu" else 1
        with torch.device("meta"):
            self.decoder = Decoder(self.part, cores)
        embed = "head.weight" if spec.tied else "table.weight"
        tensors = {}
        for key, value in fused(spec, weights):
            own = embed if key == "embed.weight" else key
            module = self.decoder.get_submodule(own.rpartition(".")[0])
            tensor = to_torch(cut(key, value, self.share), self.kind, self.device)
            turned_over = isinstance(module, Wide) and own.endswith(".weight")
            tensors[own] = module.held(tensor) if turned_over else tensor
        self.decoder.load_state_dict(tensors, assign=True)
        if mesh is not None:
            # What makes DTensors takes a second to import.
            from backends.torch.parallel import parallelize

            parallelize(self.decoder, mesh, self.share, spec.vocab)
        self.decoder.requires_grad_(False)
        self.tables = Tables(self.kind, self.device)

    def cache(
        self,
        policy: str | Policy = "full()",
        codec: str | Codec = "full()",
        batch: int = 1,
        capacity: int | None = None,
        length: int | None = None,
    ) -> TorchCache:
        check_sizes(batch, capacity, length)
        made, each = read_policy(policy, self.spec, batch)
        coding = read_codec(codec, made, self.spec)
        if self.share.count > 1:
            check_shared(made, coding, self.spec)
        wide = torch.promote_types(self.kind, torch.float32)
        cache = TorchCache(
            self.spec, made, coding, self.dtype, each,
            [self._layer(made, coding, layer, batch) for layer in self.part.layers],
            np.zeros(batch, np.int32), torch.zeros(batch, dtype=torch.int32, device=self.device),
            np.full(batch, FAR, np.int32), capacity, length,
            constants={
                key: to_torch(value, wide, self.device) for key, value in made.constants(self.spec).items()
            },
        )  # fmt: skip
        cache.bind()
        return cache

    def _layer(self, policy: Policy, codec: Codec, layer: Layer, batch: int) -> LayerCache:
        wide = torch.promote_types(self.kind, torch.float32)
        empty = {"device": self.device, "dtype": self.kind}
        heads = (batch, layer.kv_heads)
        newest = asked(policy, codec)
        made: dict[str, torch.Tensor] = {
            side: torch.zeros(*heads, 1, layer.head_dim, **empty) for side in SIDES
        }
        return LayerCache(
            layer,
            codec,
            None,
            torch.zeros(heads, dtype=torch.int32, device=self.device),
            {key: value[:, :, :0] for key, value in stored(codec, xp, layer, made).items()},
            torch.full((*heads, 0), EMPTY, dtype=torch.int32, device=self.device),
            {key: torch.zeros(*heads, 0, dtype=wide, device=self.device) for key in slot_memory(policy)},
            {
                key: torch.zeros(*heads, *shape, dtype=wide, device=self.device)
                for key, shape in policy.head_memory(layer).items()
            },
            torch.zeros(*heads, layer.group, newest, layer.head_dim, **empty) if newest else None,
            torch.full((batch, newest), EMPTY, dtype=torch.int32, device=self.device) if newest else None,
            {
                key: torch.zeros(
                    *heads,
                    fixed_rows(codec, key) or 0,
                    one.width,
                    dtype=self.kind if kind is None else getattr(torch, kind.name),
                    device=self.device,
                )
                for key, (one, kind) in tables_layout(codec, layer).items()
            },
            share=self.share,
        )

    @torch.inference_mode()
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
    ) -> tuple[Any, TorchCache]:
        def listen(key: str, value: torch.Tensor) -> None:
            assert taps is not None
            heads = key.rpartition(".")[2] in BY_HEAD
            taps[key] = to_numpy(widened(self.share.whole(value, 2) if heads else value))

        out, cache = self.advance(
            to_torch(tokens, device=self.device), tokens, cache, logits, phase, evict, forced, decisions,
            no_tap if taps is None else listen, statistics, gradients,
        )  # fmt: skip
        return None if out is None else to_numpy(widened(out)), cache

    def advance(
        self,
        tokens: Int[torch.Tensor, "batch tokens"],
        host: Int[np.ndarray, "batch tokens"],
        cache: TorchCache,
        logits: str | None,
        phase: Phase,
        evict: bool = True,
        forced: Sequence[np.ndarray] | None = None,
        decisions: list[Decision] | None = None,
        tap: Tap = no_tap,
        statistics: list[np.ndarray] | None = None,
        gradients: Sequence[np.ndarray] | None = None,
    ) -> tuple[Any, TorchCache]:
        """`run` on tensors; `host` is the same tokens in NumPy."""
        spec, policy = self.spec, cache.policy
        after = cache.admit((host >= 0).sum(1))
        for rope in ropes(spec):
            check_reach(rope, int(after.max()) - 1, cache.length)
            self.tables.grow(rope, cache.length, int(after.max()) + policy.needs.ahead)
        cache.consume()
        given = cache
        restorable = [] if cache.codec.exact else [layer.restorable() for layer in cache.layers]
        cache = TorchCache(**{**cache.__dict__, "consumed": False, "step": None})
        real = tokens >= 0
        before, seen, question = (
            to_torch(x, device=self.device) for x in (cache.row_seen, after, cache.question)
        )
        rows = {"seen": seen, "question": question}
        positions = next_positions(real, before)
        turns = self.turns(positions, cache)
        recent = cache.codec.recent
        complete = bool(recent) and bool((cache.row_seen // recent < after // recent).any())
        cache.row_seen = after
        cache.steps, cache.singles = cache.counted(phase, host.shape[1] == 1 and bool((host >= 0).all()))
        whole = phase == "prefill" or cache.pending
        due = evict and (whole or cache.steps % policy.interval == 0)
        single = phase == "decode" and not cache.pending and tokens.shape[1] == 1 and evict
        single = single and forced is None and decisions is None
        if not single:
            cache.open()
        cache.pending = not due and (cache.pending or phase == "prefill" or not evict)

        x = embedded(self.share, self.part.vocab, self.decoder.embed, tokens.clamp(min=0)) * spec.embed_scale
        tap("embed", x)
        active = torch.ones_like(real[:, 0]) if whole else real.any(1)
        bad: dict[int, torch.Tensor] = {}
        unfit: list[torch.Tensor] | None = None if cache.codec.exact else []
        for index, block in enumerate(self.decoder.layers):
            slope = None if gradients is None else to_torch(gradients[index], device=self.device)
            evicts = due and cache.layers[index].limit is not None
            y, view, call = self._attend(
                block,
                index,
                x,
                tokens,
                positions,
                turns,
                before,
                rows,
                cache,
                single,
                phase,
                tap,
                evicts or statistics is not None,
                slope,
                unfit,
            )
            if statistics is not None:
                statistics.append(to_numpy(measured(policy, view)))
            if evicts:
                choice = None if forced is None else to_torch(forced[len(bad)], device=self.device)
                bad[index] = self._evict(cache, index, view, active, single, choice, decisions)
            del view  # and with it the layer's tokens that were evicted
            if unfit is not None and cache.codec.recent and phase != "pass":
                held = cache.layers[index]
                unfit[-1] = unfit[-1] | held.recode(replace(call, queries=held.queries, due=complete))
            del call
            if index == len(cache.layers) - 1 and logits != "all" and tap is no_tap:
                x, y, real = (
                    newest(x, real),
                    newest(y, real),
                    real.any(1, keepdim=True),
                )  # nobody asks for the others
            x = self._rest(block, index, x, y, tap)
        if not single:
            cache.settle()
        if unfit and bool(self.share.whole(torch.cat(unfit), 0).any()):
            given.layers, given.consumed = restorable, False
            raise refused(cache.codec, [self.share.whole(heads, 0) for heads in unfit])
        if bad and any(wrong := torch.stack(list(bad.values())).tolist()):
            layer = list(bad)[wrong.index(True)]
            raise KvtwinError(f"policy {name(policy)} scored NaN in layer {layer}; expected numbers")
        return self._logits(x, real, logits, tap), cache

    def turns(self, positions: Int[torch.Tensor, "batch tokens"], cache: TorchCache) -> dict[Rope, Turn]:
        """What turns the queries and keys of these positions, [batch 1 tokens half] by rope; nothing where the cache
        holds keys that are not rotated."""
        if cache.policy.repositions:
            return {}
        return {rope: self.tables.at(positions[:, None], rope, cache.length) for rope in ropes(self.spec)}

    def _attend(
        self,
        block: DecoderLayer,
        index: int,
        x: Float[torch.Tensor, "batch tokens dim"],
        ids: Int[torch.Tensor, "batch tokens"],
        positions: Int[torch.Tensor, "batch tokens"],
        turns: Mapping[Rope, Turn],
        before: Int[torch.Tensor, "batch"],
        rows: dict[str, Int[torch.Tensor, "batch"]],
        cache: TorchCache,
        single: bool,
        phase: Phase,
        tap: Tap = no_tap,
        asked: bool = False,
        gradients: Float[torch.Tensor, "batch tokens dim"] | None = None,
        unfit: list[torch.Tensor] | None = None,
    ) -> tuple[Float[torch.Tensor, "batch tokens dim"], Any, Call]:
        """Append the tokens to one layer and attend; returns the layer's attention output, the policy's view, and what
        was appended, as it is stored.

        `turns`: see there. `before`: what the rows had seen. `asked`: the policy is; where it neither is nor remembers
        anything, there is no view (None). `unfit` is given which heads made what cannot be coded.
        """
        at, attn, layer, held = (
            f"layers.{index}",
            block.attention,
            self.part.layers[index],
            cache.layers[index],
        )
        policy, tokens = cache.policy, positions.shape[1]
        h = block.attention_norm(x)
        tap(f"{at}.attention_norm", h)
        q, k, v = attn.split(attn.query_key_value(h))
        if self.spec.query_key_norm:
            q, k = attn.query_norm(q), attn.key_norm(k)
        if tap is not no_tap:
            for key, value in (("query", q.flatten(2, 3)), ("key", k), ("value", v)):
                tap(f"{at}.attention.{key}", value)
        raw, plain, v = q.movedim(1, 3), k.transpose(1, 2), v.transpose(1, 2)
        q, k = raw, plain
        if layer.rope is not None and turns:
            cos, sin = turns[layer.rope]
            q, k = turned(q, cos[:, None], sin[:, None]), turned(k, cos, sin)
        if tap is not no_tap:
            tap(f"{at}.attention.query_rotated", q.movedim(3, 1).flatten(2, 3))
            tap(f"{at}.attention.key_rotated", k.transpose(1, 2))
        start = {
            key: ids[:, None] if key == "tokens" else value for key, value in slot_memory(policy).items()
        }
        new: dict[Side, torch.Tensor] = {"keys": k, "values": v}
        left = new | {
            "keys": self._left(block, layer, cache, plain if held.codec.unrotated else k, positions)
        }
        call = Call(left, positions, before, rows["seen"])
        made = stored(held.codec, xp, layer, left)
        if unfit is not None:
            unfit.append(uncoded(xp, layer, positions, new, made))
        if single and cache.overwrites(held) and held.used >= 1:
            held.overwrite(made, positions, start)
            first = held.slots - (tokens if held.codec.exact else 0)
        else:
            first = 0 if isinstance(held, PagedLayer) else held.fill
            held.append(made, positions, start)
        if phase != "pass":
            held.observe(q, positions)
        exact = None
        if not held.codec.exact and (held.codec.recent or policy.needs.sums or isinstance(held, PagedLayer)):
            exact = exact_of(xp, held.codec, held.tables, held.positions, call)
        finish = self._finish(block, layer, cache)
        if isinstance(held, PagedLayer):
            out, sums = mixed_in_pages(held, q, new, exact, positions, cache, self.tables, finish)
        else:
            out, sums = mixed(held, q, new, exact, first, positions, before, cache, self.tables, finish)
        whole, view = self.share.whole, None
        if asked or policy.memory or held.heads:
            view = held.view(
                policy,
                sums,
                None if layer.rope is None else self.tables.tables[layer.rope, cache.length],
                torch.promote_types(self.kind, torch.float32),
                finish,
                exact,
                phase=phase,
                layer=index,
                layers=len(self.spec.layers),
                output=whole(self._output(block, layer), 0) if policy.needs.output else None,
                constants=cache.constants,
                **rows,
            )
        if view is not None and view.memory:
            for begin in range(0, tokens, BLOCK) if policy.needs.stream else ():
                span = slice(begin, begin + BLOCK)
                slope = None if gradients is None else gradients[:, span]
                queries = whole(widened(raw[:, :, :, span]))
                part = Block(positions[:, span], queries, widened(h[:, span]), slope)
                view = streamed(policy, view, part)
            held.remember(noted(policy, view).memory, (positions >= 0).any(1))
            view = replace(view, memory=held.remembered(policy))
        out = out.movedim(3, 1).flatten(2)
        tap(f"{at}.attention.mixed", out)
        y = attn.output(out)
        tap(f"{at}.attention.output", y)
        return y, view, call

    def _bias(
        self,
        block: DecoderLayer,
        layer: Layer,
        cache: TorchCache,
        positions: Int[torch.Tensor, "batch heads slots"],
    ) -> Float[torch.Tensor, "batch kv_heads slots head_dim"]:
        """The key bias of a layer at these positions, rotated where keys are stored rotated."""
        own = block.attention.split(local(block.attention.query_key_value.bias))[1][None, :, None]
        every = own.expand(positions.shape[0], -1, positions.shape[-1], -1)
        if layer.rope is None or cache.policy.repositions or cache.codec.unrotated:
            return every
        return self.tables.rotate(every, positions, layer.rope, cache.length)

    def _left(
        self,
        block: DecoderLayer,
        layer: Layer,
        cache: TorchCache,
        keys: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """New keys less what a codec leaves out."""
        if not cache.codec.unbiased:
            return keys
        return keys - self._bias(block, layer, cache, positions[:, None])

    def _finish(self, block: DecoderLayer, layer: Layer, cache: TorchCache) -> Finish | None:
        """What turns stored keys into those that the cache shows; None where they are the same."""
        rope = layer.rope if cache.codec.unrotated and not cache.policy.repositions else None
        if rope is None and not cache.codec.unbiased:
            return None

        def finish(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            keys = keys + self._bias(block, layer, cache, positions) if cache.codec.unbiased else keys
            return keys if rope is None else self.tables.rotate(keys, positions, rope, cache.length)

        return finish

    def _rest(
        self, block: DecoderLayer, index: int, x: torch.Tensor, y: torch.Tensor, tap: Tap = no_tap
    ) -> Float[torch.Tensor, "batch tokens dim"]:
        """The layer after attention: residual, feed-forward, residual."""
        x = x + (block.attention_post_norm(y) if self.spec.post_norms else y)
        y = block.ffn(block.ffn_norm(x))
        tap(f"layers.{index}.ffn", y)
        x = x + (block.ffn_post_norm(y) if self.spec.post_norms else y)
        tap(f"layers.{index}.output", x)
        return x

    def _output(
        self, block: DecoderLayer, layer: Layer
    ) -> Float[torch.Tensor, "kv_heads group head_dim dim"]:
        """The output projection of each query head."""
        return widened(local(block.attention.output.weight)).T.reshape(
            layer.kv_heads, layer.group, layer.head_dim, -1
        )

    def _evict(
        self,
        cache: TorchCache,
        index: int,
        view: View,
        active: torch.Tensor,
        single: bool,
        forced: torch.Tensor | None,
        decisions: list[Decision] | None,
    ) -> torch.Tensor:
        """Evict from one layer; returns whether a score was NaN, which is asked once for all layers."""
        held = cache.layers[index]
        if single and cache.overwrites(held):
            lost, bad = held.evict_one(cache.policy, view, active)
        else:
            lost, decision, bad = held.compact(cache.policy, view, active, forced)
            if decisions is not None:
                decisions.append(_decision(index, *decision))
            if isinstance(held, LayerCache) and (layout := cache.layouts[index]) is not None:
                cache.layers[index] = closed(held, layout, held.budget if cache.overwrites(held) else 0)
        cache.dropped = torch.where(lost, view.seen, cache.dropped)
        return bad

    def _logits(
        self, x: torch.Tensor, real: torch.Tensor, which: str | None, tap: Tap
    ) -> torch.Tensor | None:
        if which is None:
            return None
        if which == "last":
            x, real = newest(x, real), real.any(1, keepdim=True)
        x = self.decoder.norm(x)
        tap("norm", x)
        out = self.decoder.head(x)
        if self.spec.logit_softcap is not None:
            out = torch.tanh(out / self.spec.logit_softcap) * self.spec.logit_softcap
        tap("logits", out)
        return torch.where(real[..., None], out, 0)

    def gradients(self, tokens: np.ndarray, cache: Any) -> list[np.ndarray]:
        if self.share.count > 1:
            raise KvtwinError("a model over a mesh gives no gradients; expected one without a mesh")
        return gradients(self, tokens, cache)

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

    def restore(self, source: Snapshot | str | os.PathLike) -> TorchCache:
        held = source if isinstance(source, Snapshot) else Snapshot.load(source, self.spec)
        cache = self.cache(held.policy, held.codec, len(held.seen), held.capacity, held.length)
        cache.row_seen, cache.budgets = held.seen.astype(np.int32), list(held.budgets)
        cache.question = held.question.astype(np.int32)
        cache.dropped = to_torch(held.dropped, torch.int32, self.device)
        cache.steps, cache.pending = held.steps, held.pending
        wide = torch.promote_types(self.kind, torch.float32)

        def own(value: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return self.share.own(to_torch(value, dtype, self.device))

        for layer, saved in zip(map(opened, cache.layers), held.layers, strict=True):
            layer.streams = {
                key: own(value, layer.streams[key].dtype) for key, value in saved.streams.items()
            }
            layer.positions = own(saved.positions, torch.int32)
            layer.memory = {key: own(value, wide) for key, value in saved.memory.items()}
            layer.heads = {key: own(value, wide) for key, value in saved.heads.items()}
            if saved.queries is not None and saved.query_positions is not None:
                layer.queries = own(saved.queries, self.kind)
                layer.query_positions = to_torch(saved.query_positions, torch.int32, self.device)
            layer.tables = {key: own(value, layer.tables[key].dtype) for key, value in saved.tables.items()}
            layer.fill = layer.used = layer.slots
        cache.bind()
        cache.settle()
        return cache


def newest(
    x: Float[torch.Tensor, "batch tokens dim"], real: Bool[torch.Tensor, "batch tokens"]
) -> Float[torch.Tensor, "batch 1 dim"]:
    """What belongs to the last token of each row."""
    columns = torch.arange(real.shape[1], device=x.device)
    last = torch.where(real, columns, 0).amax(1)
    return x[torch.arange(len(x), device=x.device), last][:, None]


def _decision(
    index: int, positions: torch.Tensor, scores: torch.Tensor, protected: Any, kept: torch.Tensor, budget: Any
) -> Decision:
    """The decision as NumPy; scores in at least float32."""
    filled = positions >= 0
    marked = torch.zeros_like(filled) if protected is None else protected & filled
    scores = torch.where(filled, scores, 0)
    wide = scores.double() if not scores.is_floating_point() else widened(scores)
    return Decision(index, *(to_numpy(x) for x in (positions, wide.double(), marked, kept, budget)))
