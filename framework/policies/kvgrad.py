"""KVgrad: what a reconstruction of the prompt attends to, weighed by how much the model's output depends on it
(openreview cg1wTCJjjk; kvpress pull requests 279 and 286, from whose code the formula is taken).

The model reads the prompt a second time as for `kvzip`, `chunk` tokens at a time. The score of a token is the largest,
over the queries of this reading and the query heads of the group, of

    attention that the query gives the token  x  |W_o v|_2 of the token through that head  x  |gradient|_2 at the query

where the gradient is that of the sum over the part's tokens of |h|^2, h being the last layer's output before the final
norm, by what the layer's attention adds to that query's token. The cost is about that of three more prefills.

Deviations: those of `kvzip`, so that every part counts for every token, while the press counts a part of the prompt
only when that part is repeated. The gradient is by the output of the attention's projection: the residual stream's
where no norm comes between them, and before the norm where one does (as the press has it in gemma2). Tokens that were
never read back, those of decode and all without the pass, stand above the rest and go by age.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float

from framework.arrays import Array
from framework.policies.kvzip import KVzip
from framework.policy import Block, Needs, View

UNREAD = -1.0  # less than any score


@dataclass(frozen=True, kw_only=True)
class KVgrad(KVzip):
    """Keeps what a reconstruction of the prompt needs and the model's output depends on."""

    chunk: int = 256

    memory: ClassVar[Mapping[str, float]] = {"peak": UNREAD}
    needs: ClassVar[Needs] = Needs(keys=True, values=True, stream=True, output=True, gradients=True)

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        if view.phase != "pass":
            return view.memory
        xp = view.xp
        slope = xp.sqrt(xp.sum(block.gradients * block.gradients, axis=-1))
        given = xp.max(view.attention(block) * slope[:, None, None, :, None], axis=3)
        peak = xp.max(given * view.output_norm(view.values, order=2), axis=2)
        return dict(view.memory) | {"peak": xp.maximum(view.memory["peak"], peak)}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, peak = view.xp, view.memory["peak"]
        top = xp.max(xp.where(view.filled, peak, UNREAD), axis=(1, 2), keepdims=True)
        return xp.where(peak == UNREAD, top, peak)  # what was not read is newer, and wins over its equals
