"""Compactor: keys that the others do not span, and tokens that their neighbourhood attends to (arXiv 2507.08143).

The score is `blending` times that of `leverage` plus that of `noncausal_attention`; the first `sinks` and the newest
`recent` tokens stay and take no part in either score.

Deviations: `blending` is one number, 0.35 unless given (other libraries take the share of tokens removed). The newest
tokens take part in the attention while others are newer, and chunks are counted from the start of the text. What both
policies do otherwise than the paper they do here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from jaxtyping import Bool, Float

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policies.leverage import Leverage
from framework.policies.noncausal_attention import NoncausalAttention
from framework.policy import Block, Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class Compactor(Policy):
    """Keeps outliers among the keys and what is attended to, beside the ends of the text."""

    sinks: int = 8
    recent: int = 4
    blending: float | int = 0.35
    chunk: int = 256
    sketch: int = 48
    seed: int = 0

    needs: ClassVar[Needs] = Needs(keys=True, values=True, stream=True)
    memory: ClassVar[Mapping[str, float]] = NoncausalAttention.memory

    def __post_init__(self) -> None:
        if min(self.sinks, self.recent) < 0 or min(self.chunk, self.sketch) < 1:
            raise KvtwinError(
                f"compactor has sinks={self.sinks}, recent={self.recent}, chunk={self.chunk}, sketch={self.sketch}; "
                "expected sinks and recent >= 0, chunk and sketch >= 1"
            )

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads slots"]]:
        asked = view.xp.where(block.positions < self.sinks, -1, block.positions)
        inside = _without(view, view.positions < self.sinks)
        return NoncausalAttention(chunk=self.chunk).stream(inside, replace(block, positions=asked))

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        inside = _without(view, self.protected(view))
        outliers = Leverage(sketch=self.sketch, seed=self.seed).score(inside)
        return self.blending * outliers + NoncausalAttention(chunk=self.chunk).score(inside)

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks) | view.newest(self.recent)

    def protects(self, budget: int) -> int:
        return self.sinks + self.recent

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, sinks=2, recent=3, chunk=5, sketch=3),
            cls(budget=8, sinks=1, recent=1, chunk=7, sketch=4, blending=0.6, seed=2, interval=3),
        ]


def _without(view: View, these: Bool[Array, "batch kv_heads slots"]) -> View:
    """The view with these slots as if empty."""
    return replace(view, positions=view.xp.where(these, -1, view.positions))
