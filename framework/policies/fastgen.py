"""FastGen: each head keeps the cheapest kind of tokens that holds its attention (arXiv 2310.01801).

The kinds, each with what the ones before it keep: 0 the ids in `special`; 1 those in `punctuation`; 2 the share `heavy`
of the tokens seen, those that received most attention; 3 the share `local`, the newest; 4 all. After the prompt a head
takes the first kind whose tokens received at least `recovery` of the attention that the prompt gave, and keeps to it.

Deviations: the budget bounds it all. A head first gets what its kind asks for, up to its own budget; what the heads of
a layer leave goes to those that ask for more, in their order; and where it does not suffice (kind 4 asks for all) the
special tokens stay first, then those that received most. A head keeps at least one token. Recovery is measured on what
tokens received in sum; at decode the shares are of all tokens seen, and attention goes on to be summed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float, Int, Shaped

from framework.arrays import Array, device
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from framework.spec import Layer, ModelSpec

ALL = 4  # the last kind


@dataclass(frozen=True, kw_only=True)
class FastGen(Policy):
    """Keeps in each head what its attention to the prompt asks for."""

    special: tuple[int, ...] = ()
    punctuation: tuple[int, ...] = ()
    heavy: float | int = 0.3
    local: float | int = 0.3
    recovery: float | int = 0.95

    needs: ClassVar[Needs] = Needs(sums=True, tokens=True)
    memory: ClassVar[Mapping[str, float]] = {"mass": 0.0}
    divides: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in (self.heavy, self.local, self.recovery)):
            raise KvtwinError(
                f"fastgen has heavy={self.heavy}, local={self.local}, recovery={self.recovery}; "
                "expected shares from 0 to 1"
            )

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"kind": ()}

    def note(self, view: View) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        xp, mass = view.xp, view.memory["mass"] + view.sums
        if view.phase != "prefill":
            return {**view.memory, "mass": mass}
        first = self._first(view, mass)
        total = xp.sum(xp.where(view.filled, mass, 0.0), axis=-1)
        kind = xp.full_like(total, ALL)
        for one in reversed(range(ALL)):
            recovered = xp.sum(xp.where(view.filled & (first <= one), mass, 0.0), axis=-1)
            kind = xp.where(recovered >= self.recovery * total, float(one), kind)
        return {"mass": mass, "kind": kind}

    def _first(
        self, view: View, mass: Float[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads slots"]:
        """The first kind that keeps each token."""
        xp = view.xp
        best_first = xp.argsort(xp.where(view.filled, -mass, xp.inf), axis=-1, stable=True)
        place = xp.argsort(best_first, axis=-1)
        kind = xp.where(view.newest(_share(view, self.local)), 3, xp.full_like(view.positions, ALL))
        kind = xp.where(place < _share(view, self.heavy)[..., None], 2, kind)
        kind = xp.where(_among(view, self.punctuation), 1, kind)
        return xp.where(_among(view, self.special), 0, kind)

    def _wanted(self, view: View) -> Bool[Array, "batch kv_heads slots"]:
        first = view.xp.astype(self._first(view, view.memory["mass"]), view.memory["kind"].dtype)
        return view.filled & (first <= view.memory["kind"][..., None])

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp = view.xp
        mass = xp.where(view.filled, view.memory["mass"], 0.0)
        most = xp.max(mass, axis=-1, keepdims=True)
        share = mass / xp.where(most == 0, 1.0, most)
        wanted = xp.astype(self._wanted(view), mass.dtype)
        return share + 2 * wanted * (1 + xp.astype(_among(view, self.special), mass.dtype))

    def budgets(
        self, view: View, scores: Shaped[Array, "batch kv_heads slots"]
    ) -> Int[Array, "batch kv_heads"]:
        xp = view.xp
        asked = xp.sum(xp.astype(self._wanted(view), xp.int32), axis=-1, dtype=xp.int32)
        asked = xp.where(asked < 1, 1, asked)
        own = xp.where(asked < view.budget, asked, view.budget)
        left = xp.sum(view.budget - own, axis=1, keepdims=True, dtype=xp.int32)
        lack = asked - own
        before = xp.cumulative_sum(lack, axis=1, dtype=xp.int32) - lack
        return own + xp.clip(left - before, 0, lack)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return budget * spec.layers[layer].kv_heads

    def total(self, budgets: Sequence[int], layer: int, spec: ModelSpec) -> int:
        return sum(budgets)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [
            cls(budget=9, special=(0, 2, 5), punctuation=(3, 4, 8, 9), recovery=0.6),
            cls(budget=8, special=(1, 7, 11, 300), heavy=0.4, local=0.2, recovery=0.7, interval=3),
        ]


def _among(view: View, ids: tuple[int, ...]) -> Bool[Array, "batch kv_heads slots"]:
    """True where a slot holds one of these token ids."""
    xp = view.xp
    some = xp.asarray(ids, dtype=xp.int32, device=device(view.tokens))
    return view.filled & xp.any(view.tokens[..., None] == some, axis=-1)


def _share(view: View, share: float) -> Int[Array, "batch kv_heads"]:
    """A share, in thousandths, of the tokens that each row has seen."""
    count = view.seen[:, None] * round(share * 1000) // 1000
    return view.xp.broadcast_to(count, view.budget.shape)
