"""Keys and values in 8 bits, rotated, with a scale for 32 numbers: ExLlamaV2's Q8 cache.

The formula and the deviations are those of `framework/exl2.py`.
"""

from dataclasses import dataclass
from typing import ClassVar

from framework.exl2 import Exl2


@dataclass(frozen=True, kw_only=True)
class Exl2Q8(Exl2):
    """8 bits for keys, 8 for values, and half a bit for scales."""

    k_bits: ClassVar[int] = 8
    v_bits: ClassVar[int] = 8
