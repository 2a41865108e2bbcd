"""Non-causal attention: the attention that tokens receive from before and behind (arXiv 2507.08143).

The text is cut into chunks of `chunk` positions. Within each, every query attends to every key, without the causal
mask; what a token receives, summed over the queries and averaged over the group, times the length of its value, pooled
over 3 neighbours, is the score, as a z-score over the heads of a layer. Products of queries and keys are not scaled: in
the reference engine of the authors they are not.

Deviations: a query sees the keys of its chunk that are held when it comes. At decode those are the older ones; a
prompt read in several calls gives the same as one read at once only if they end at multiples of `chunk`. The last,
shorter chunk is not padded (other libraries add logits of 0, which count in the softmax). The z-score is taken per row.
The authors' engine neither weighs by values nor pools; those two come from their contribution to another library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array, pool, softmax, standardised
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View


@dataclass(frozen=True, kw_only=True)
class NoncausalAttention(Policy):
    """Keeps what the tokens of its chunk attend to, older or newer."""

    chunk: int = 256

    needs: ClassVar[Needs] = Needs(keys=True, values=True, stream=True)
    memory: ClassVar[Mapping[str, float]] = {"received": 0.0}

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise KvtwinError(f"noncausal_attention has chunk={self.chunk}; expected at least 1")

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads slots"]]:
        xp = view.xp
        turned = view.rotate(block.queries, view.query_rotary(block.positions)[:, :, None, :])
        batch, heads, group, tokens, dim = turned.shape
        flat = xp.reshape(turned, (batch, heads, group * tokens, dim))
        logits = xp.matmul(flat, xp.matrix_transpose(view.keys))
        logits = xp.reshape(logits, (batch, heads, group, tokens, -1))
        asked, held = block.positions[:, None, :, None], view.positions[:, :, None, :]
        near = (asked >= 0) & (held >= 0) & (asked // self.chunk == held // self.chunk)
        given = softmax(xp, logits, near[:, :, None, ...])
        return {"received": view.memory["received"] + xp.sum(given, axis=(2, 3)) / group}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        weighed = view.memory["received"] * xp.sqrt(xp.sum(view.values * view.values, axis=-1))
        return standardised(xp, pool(xp, xp.where(view.filled, weighed, 0.0), 3), view.filled)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, chunk=5), cls(budget=8, chunk=7, interval=3)]
