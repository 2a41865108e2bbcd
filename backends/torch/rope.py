"""Rotary embedding: tables of cosines and sines from float64 angles, and the rotation."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from backends.torch.convert import to_torch, widened
from framework.rope import angles, reach
from framework.shapes import EMPTY
from framework.spec import Rope


@dataclass
class Tables:
    """cos and sin of every position up to a length, per Rope and declared length; grown by doubling."""

    dtype: torch.dtype
    device: torch.device
    tables: dict[tuple[Rope, int | None], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def grow(self, rope: Rope, length: int | None, positions: int) -> None:
        """Make the table cover `positions` positions."""
        held = self.tables.get((rope, length))
        if held is not None and held[0].shape[0] >= positions:
            return
        size = 1024
        while size < positions:
            size *= 2
        most = reach(rope, length)
        if most is not None:
            size = max(positions, min(size, most))
        cos, sin = angles(rope, np.arange(size), length, beyond=True)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.tables[rope, length] = to_torch(cos, wide, self.device), to_torch(sin, wide, self.device)

    def at(
        self, positions: Int[torch.Tensor, "*axes"], rope: Rope, length: int | None
    ) -> tuple[Float[torch.Tensor, "*axes half"], Float[torch.Tensor, "*axes half"]]:
        """cos and sin of these positions, in >= float32; -1 has those of 0."""
        cos, sin = self.tables[rope, length]
        where = positions.clamp(min=0).long()
        return cos[where], sin[where]

    def rotate(
        self,
        x: Float[torch.Tensor, "batch *heads tokens head_dim"],
        positions: Int[torch.Tensor, "batch *#heads tokens"],
        rope: Rope,
        length: int | None,
    ) -> Float[torch.Tensor, "batch *heads tokens head_dim"]:
        """`turned` by the angle of each position."""
        return turned(x, *self.at(positions, rope, length))


def turned(
    x: Float[torch.Tensor, "*axes head_dim"], cos: torch.Tensor, sin: torch.Tensor
) -> Float[torch.Tensor, "*axes head_dim"]:
    """Channel i turned with channel i + half, the others as they are. Computed in >= float32."""
    half = cos.shape[-1]
    wide = widened(x)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


def next_positions(
    real: Bool[torch.Tensor, "batch tokens"], seen: Int[torch.Tensor, "batch"]
) -> Int[torch.Tensor, "batch tokens"]:
    """Positions of the next tokens of rows that have seen so many; -1 for those that are not real."""
    return torch.where(real, seen[:, None] + real.cumsum(1).to(torch.int32) - 1, EMPTY).to(torch.int32)
