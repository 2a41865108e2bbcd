"""KVzip: the tokens that the model looks at when it repeats the prompt (arXiv 2505.23416).

Behind the prompt the model reads, in the phase "pass", a request to repeat it and then the prompt itself, `chunk`
tokens at a time. The score of a token is the largest attention that any of these queries gives it; sinks stay. What was
read for this is forgotten. So the kept set serves any question, at the cost of about a second prefill.

Deviations: the attention is the model's own over the whole cache, where the paper's softmax is over the chunk and what
is read behind it. The paper shares one budget among all layers and heads; here a layer has its own, which `adakv`
around it divides among heads. The paper keeps all generated tokens; here they go before the prompt's only when the
budget is full of them. Without the pass (`generate` does it, `Model.step` does not) the newest tokens stay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float

from framework.arrays import Array
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View, name

WHOLE = "\n\nRepeat the previous context exactly."
PART = "\n\nRepeat the part of the previous context exactly, starting with"
LEAD = 8  # tokens of the part before that a later part starts with
UNREAD = 2.0  # more than any attention


@dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """Keeps what a reconstruction of the prompt needs."""

    sinks: int = 4
    chunk: int = 2048

    memory: ClassVar[Mapping[str, float]] = {"peak": UNREAD}
    needs: ClassVar[Needs] = Needs(keys=True, stream=True)
    order_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sinks < 0:
            kind = name(self).partition("(")[0]
            raise KvtwinError(
                f"{kind} has chunk={self.chunk}, sinks={self.sinks}; expected chunk >= 1 and sinks >= 0"
            )

    def passes(self, prompt: Sequence[int], encode: Callable[[str], list[int]]) -> list[list[int]]:
        parts = [list(prompt[start : start + self.chunk]) for start in range(0, len(prompt), self.chunk)]
        lead = [encode(WHOLE)] + [encode(PART) + part[-LEAD:] for part in parts[:-1]]
        return [[*before, *part] for before, part in zip(lead, parts, strict=True)]

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        if view.phase != "pass":
            return view.memory
        xp, peak = view.xp, view.memory["peak"]
        given = xp.max(view.attention(block), axis=(2, 3))
        return dict(view.memory) | {"peak": xp.where(peak == UNREAD, given, xp.maximum(peak, given))}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        return view.memory["peak"]

    def protected(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, sinks=2, chunk=16)]
