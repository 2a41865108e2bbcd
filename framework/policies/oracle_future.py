"""The oracle that knows the text: what is still to be attended to stays (after Belady's rule for paging).

`kvtwin oracle` reads a text once with the full cache and records, for each of its last queries, the attention (mean
over the group) that this query and those after it give to each token. The score of a token is that sum from the query
at position `seen` on. The policy reads the file, `oracle_future(path="text.recording", digest="...")`; the digest is
optional; given, another file is refused. `kvtwin regret` measures other policies by the same sums.

The recording holds for its own text alone, and a compiled step cannot refuse another one: while a head holds a token
whose id is not the recorded one at its position, all its scores are 0, and the newest stay. They are 0 as well once the
whole recorded text was read. Before the first recorded query the sum is over all of them. Shorter rows that begin as
the text does are served alike. `path="random:0"` is the control: random sums for 64 tokens of any text.

It is greedy, no bound: a token with much attention late may be kept now and dropped for a better one before that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from framework.arrays import Array, take_slots
from framework.calibration import RANDOM, check_arrays, random_arrays, read_arrays
from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from framework.spec import ModelSpec

DRAWN = 64  # tokens of a random recording


@dataclass(frozen=True, kw_only=True)
class OracleFuture(Policy):
    """Keeps what a recorded run over the same text goes on to attend to."""

    path: str = ""
    digest: str = ""

    needs: ClassVar[Needs] = Needs(tokens=True)
    order_free: ClassVar[bool] = True

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        """`layers.N` [kv_heads, queries, tokens], whose last query is the last token's; and the ids as `text`."""
        heads = {f"layers.{index}": layer.kv_heads for index, layer in enumerate(spec.layers)}
        if self.path.startswith(RANDOM):
            return random_arrays(self.path, {key: (count, DRAWN, DRAWN) for key, count in heads.items()})
        if not self.path:
            raise KvtwinError(
                "oracle_future has no path; expected the file that `kvtwin oracle MODEL TEXT --out FILE` writes"
            )
        arrays = read_arrays(self.path, self.digest, "recordings", spec)
        tokens = arrays["text"].size if "text" in arrays else 0
        queries = max(1, min(tokens, max(one.shape[-2] if one.ndim == 3 else 0 for one in arrays.values())))
        shapes = {key: (count, queries, tokens) for key, count in heads.items()}
        return check_arrays(self.path, arrays, {**shapes, "text": (tokens,)})

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        xp, to_come = view.xp, view.constants[f"layers.{view.layer}"]
        queries, tokens = to_come.shape[1:]
        query = xp.clip(view.seen - (tokens - queries), 0, queries - 1)
        rows = xp.moveaxis(xp.take(to_come, query, axis=1), 1, 0)  # [batch kv_heads tokens]
        place = xp.clip(view.positions, 0, tokens - 1)
        known = (view.seen < tokens)[:, None, None]
        if "text" in view.constants:
            text = xp.astype(xp.take(view.constants["text"], xp.reshape(place, (-1,)), axis=0), xp.int32)
            other = view.filled & (view.tokens != xp.reshape(text, place.shape))
            known = known & ~xp.any(other, axis=-1, keepdims=True)
        return xp.where(known, take_slots(xp, rows, place), 0.0)

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, path="random:0"), cls(budget=7, path="random:3", interval=3)]
