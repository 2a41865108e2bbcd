"""Keys and values in 4 bits, rotated, with a scale for 32 numbers: ExLlamaV2's Q4 cache.

The formula and the deviations are those of `framework/exl2.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from framework.exl2 import Exl2


@dataclass(frozen=True, kw_only=True)
class Exl2Q4(Exl2):
    """4 bits for keys, 4 for values, and half a bit for scales."""

    k_bits: ClassVar[int] = 4
    v_bits: ClassVar[int] = 4
