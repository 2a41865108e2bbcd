"""A small codec that codes keys in groups, and the layer it is tested on."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from framework.codec import Codec
from framework.spec import Layer

WIDTH, HEADS = 6, 2
LAYER = Layer(heads=4, kv_heads=HEADS, head_dim=WIDTH, scale=1.0, rope=None)


@dataclass(frozen=True, kw_only=True)
class Fifths(Codec):
    """Keys in five steps from the least of a group to its largest; a part for each key, a factor, and a turn."""

    size: int = 3
    newest: int = 4
    again: bool = False
    asks: int = 0

    @property
    def recent(self) -> int:
        return self.newest

    @property
    def together(self) -> int:
        return self.size

    @property
    def regroups(self) -> bool:
        return self.again

    @property
    def queries(self) -> int:
        return self.asks

    def encode_group(self, xp: Any, x: Any, filled: Any, queries: Any) -> tuple[dict, dict]:
        x = xp.concat([x[..., 1:], x[..., :1]], axis=-1) * 0.5
        low = xp.min(x, axis=-2, keepdims=True)
        step = (xp.max(x, axis=-2, keepdims=True) - low) * 0.25
        codes = xp.round((x - low) / xp.where(step == 0, 1.0, step))
        count = xp.sum(xp.astype(filled, xp.int32), axis=-1, dtype=xp.int32)[..., None]
        once = {"low": low[..., 0, :], "step": step[..., 0, :], "count": count}
        if queries is not None:
            once["asked"] = xp.broadcast_to(xp.sum(queries, axis=-2), low[..., 0, :].shape)
        return {"codes": xp.astype(codes, xp.int8), "half": x[..., -1:] * 1.0}, once

    def encode(self, xp: Any, x: Any, side: Any) -> dict[str, Any]:
        return {"codes": xp.astype(xp.round(xp.concat([x[..., 1:], x[..., :1]], axis=-1) * 4), xp.int8)}

    def read(self, xp: Any, parts: Any, side: Any) -> Any:
        codes = xp.astype(parts["codes"], xp.float32)
        return codes * 0.125 if side == "values" else codes * parts["step"] + parts["low"]

    def scale(self, xp: Any, parts: Any, side: Any) -> Any:
        codes = parts["codes"]
        return xp.full(codes.shape[:-1], 2.0, dtype=xp.float32)

    def turn(self, width: int, side: Any) -> np.ndarray:
        return np.roll(np.eye(width, dtype=np.float32), 1, axis=1)

    def bits_of(self, width: int, side: Any, itemsize: int) -> tuple[float, float]:
        return 8.0 * width, 48.0
