"""Rotary embedding: tables of cosines and sines from float64 angles, and the rotation."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from backends.flax.convert import to_jax, wide, widened
from backends.flax.sharding import replicated
from framework.rope import angles, reach
from framework.spec import ModelSpec, Rope

Table = tuple[jax.Array, jax.Array]


@dataclass
class Tables:
    """cos and sin of every position up to a length, per Rope and declared length; grown by doubling.

    They are arguments of the compiled functions: a longer table is one more compilation, at 1024, 2048, 4096, ...
    """

    dtype: Any
    mesh: Mesh | None = None
    tables: dict[tuple[Rope, int | None], Table] = field(default_factory=dict)

    def of(self, spec: ModelSpec, length: int | None, positions: int) -> dict[Rope, Table]:
        """The tables of all layers, for at least `positions` positions."""
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        return {rope: self._grown(rope, length, positions) for rope in ropes}

    def _grown(self, rope: Rope, length: int | None, positions: int) -> Table:
        held = self.tables.get((rope, length))
        if held is None or held[0].shape[0] < positions:
            size = 1024
            while size < positions:
                size *= 2
            most = reach(rope, length)
            if most is not None:
                size = max(positions, min(size, most))
            held = tuple(
                to_jax(x, wide(self.dtype)) for x in angles(rope, np.arange(size), length, beyond=True)
            )
            held = replicated(self.mesh, held)
            self.tables[rope, length] = held
        return held


def rotate(
    x: Float[jax.Array, "batch *heads tokens head_dim"],
    positions: Int[jax.Array, "batch *#heads tokens"],
    table: Table,
) -> Float[jax.Array, "batch *heads tokens head_dim"]:
    """Turn channel i with channel i + half by the angle of each position; -1 turns as 0. Computed in >= float32."""
    where = jnp.maximum(positions, 0)
    cos, sin = table[0][where], table[1][where]
    half = cos.shape[-1]
    full = widened(x)
    a, b, rest = full[..., :half], full[..., half : 2 * half], full[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)
