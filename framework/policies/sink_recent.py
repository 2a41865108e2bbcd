"""Streaming heads: some heads keep the first tokens and the newest alone, the others have the room (DuoAttention, arXiv
2410.10819).

`streaming` says for each layer and kv head whether it is a streaming head, 1 or 0, as the paper's trained patterns do
with their threshold applied. Such a head keeps `sinks` + `recent` tokens at most; what it leaves of its budget goes to
the layer's other heads in equal parts, which keep what the policy inside scores highest.

Deviations: the paper's other heads keep everything; here they do as far as the budget of the layer allows. The paper's
streaming heads attend to sinks and newest tokens while the prompt is read, too; here they lose the others after it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int, Shaped

from framework.arrays import Array, device
from framework.errors import KvtwinError
from framework.policies.snapkv import SnapKV
from framework.policy import Policy, View
from framework.spec import ModelSpec
from framework.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class SinkRecent(Wrapper):
    """Gives streaming heads sinks and recent tokens, and their room to the heads that the policy inside scores."""

    streaming: tuple[tuple[int, ...], ...]
    sinks: int = 128
    recent: int = 256

    order_free: ClassVar[bool] = False
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        marks = {mark for layer in self.streaming for mark in layer}
        if self.sinks < 0 or self.recent < 1 or not marks <= {0, 1}:
            raise KvtwinError(
                f"sink_recent has sinks={self.sinks}, recent={self.recent}, streaming={self.streaming}; "
                "expected sinks >= 0, recent >= 1, and 1 or 0 for each kv head of each layer"
            )

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        given, heads = [len(each) for each in self.streaming], [layer.kv_heads for layer in spec.layers]
        if given != heads:
            raise KvtwinError(
                f"sink_recent has streaming for layers of {given} kv heads; expected {heads}, as the model has them"
            )
        return super().constants(spec)

    def _streams(self, view: View) -> Bool[Array, "1 kv_heads"]:
        marks = [[bool(mark) for mark in self.streaming[view.layer]]]
        return view.xp.asarray(marks, device=device(view.positions))

    def score(self, view: View) -> Shaped[Array, "batch kv_heads slots"]:
        scores = super().score(view)
        newest = view.xp.astype(view.positions, scores.dtype)
        return view.xp.where(self._streams(view)[..., None], newest, scores)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        first = view.filled & (view.positions < self.sinks)
        inner = super().protected(view)
        inner = view.xp.zeros_like(first) if inner is None else inner
        return view.xp.where(self._streams(view)[..., None], first, inner)

    def protects(self, budget: int) -> int:
        return max(self.sinks, super().protects(budget))

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        xp, streams, most = view.xp, self._streams(view), self.sinks + self.recent
        budget = super().budgets(view, scores)
        own = xp.where(streams & (budget > most), most, budget)
        others = self.streaming[view.layer].count(0)
        if not others:
            return own
        left = xp.sum(budget - own, axis=1, keepdims=True, dtype=xp.int32)
        number = xp.cumulative_sum(xp.astype(~streams, xp.int32), axis=1, dtype=xp.int32)  # 1 for the first
        more = left // others + xp.astype(number <= left % others, xp.int32)
        return xp.where(streams, own, own + more)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        marks, budget = self.streaming[layer], super().most(budget, layer, spec)
        own = min(budget, self.sinks + self.recent)
        if 0 not in marks:
            return own
        return budget + math.ceil((budget - own) * sum(marks) / marks.count(0))

    @classmethod
    def examples(cls) -> list[Policy]:
        inner = SnapKV(window=2, kernel=3)
        return [
            cls(budget=9, sinks=1, recent=3, streaming=((1, 0), (0, 1)), policy=inner),
            cls(budget=8, sinks=2, recent=2, streaming=((0, 0), (1, 1)), policy=inner, interval=3),
        ]
