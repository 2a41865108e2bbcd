"""A learned gate: a small network on each token's hidden state says what the token is worth (KVzap, arXiv 2601.07891;
in the same form Locret and the gates of DMS-like methods).

The score of a token is fixed when it comes: `down` relu(`up` h + `up_bias`) + `down_bias` of the layer's normalised
input, per kv head; without `up` it is linear. The weights are read from a file, `gate(path="gates", digest="...")`:
`layers.N.down` [kv_heads, width], `layers.N.down_bias` [kv_heads], and for the network `layers.N.up` [width, dim] and
`layers.N.up_bias` [width]; `framework.calibration.write_arrays(path, "gates", arrays, spec)` writes one.

No published weights come with this: the mechanism is tested on weights made for the tests, and `path="random:0"` is a
random linear gate. Where the published method drops what is below a threshold, put `threshold` around it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from framework.arrays import Array
from framework.calibration import RANDOM, check_arrays, random_arrays, read_arrays
from framework.errors import KvtwinError
from framework.policy import Block, Needs, Policy, View
from framework.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Gate(Policy):
    """Keeps what a trained gate found worth keeping when it came."""

    path: str = ""
    digest: str = ""

    memory: ClassVar[Mapping[str, float]] = {"worth": 0.0}
    needs: ClassVar[Needs] = Needs(stream=True)
    order_free: ClassVar[bool] = True

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        shapes: dict[str, tuple[int, ...]] = {}
        if self.path.startswith(RANDOM):
            for index, layer in enumerate(spec.layers):
                shapes |= {f"layers.{index}.down": (layer.kv_heads, spec.dim)}
            biases = {
                f"layers.{index}.down_bias": np.zeros(each.kv_heads) for index, each in enumerate(spec.layers)
            }
            return random_arrays(self.path, shapes) | biases
        if not self.path:
            raise KvtwinError("gate has no path; expected a file of trained gates, or random:0")
        arrays = read_arrays(self.path, self.digest, "gates", spec)
        for index, layer in enumerate(spec.layers):
            at, up = f"layers.{index}", arrays.get(f"layers.{index}.up")
            width = spec.dim if up is None else up.shape[0]
            shapes |= {f"{at}.down": (layer.kv_heads, width), f"{at}.down_bias": (layer.kv_heads,)}
            if up is not None:
                shapes |= {f"{at}.up": (width, spec.dim), f"{at}.up_bias": (width,)}
        return check_arrays(self.path, arrays, shapes)

    def stream(self, view: View, block: Block) -> Mapping[str, Float[Array, "batch kv_heads *rest"]]:
        xp, at = view.xp, f"layers.{view.layer}"
        x = block.hidden
        if f"{at}.up" in view.constants:
            x = (
                xp.matmul(x, xp.matrix_transpose(view.constants[f"{at}.up"]))
                + view.constants[f"{at}.up_bias"]
            )
            x = xp.where(x > 0, x, 0.0)
        worth = (
            xp.matmul(x, xp.matrix_transpose(view.constants[f"{at}.down"]))
            + view.constants[f"{at}.down_bias"]
        )
        # Which token of the block stands in which slot; padding and empty slots are in neither.
        here = view.filled[..., None] & (view.positions[..., None] == block.positions[:, None, None, :])
        mine = xp.matmul(xp.astype(here, worth.dtype), xp.matrix_transpose(worth)[..., None])[..., 0]
        return dict(view.memory) | {"worth": xp.where(xp.any(here, axis=-1), mine, view.memory["worth"])}

    def score(self, view: View) -> Float[Array, "batch kv_heads slots"]:
        return view.memory["worth"]

    @classmethod
    def examples(cls) -> list[Policy]:
        return [cls(budget=9, path="random:0"), cls(budget=6, path="random:1", interval=3)]
