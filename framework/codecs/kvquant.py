"""KVQuant's keys: coded by channel before their rotation (arXiv 2401.18079), otherwise as KIVI codes them.

A rotation mixes two channels, by an angle that grows with the position: before it, a channel's keys are more alike.
They are rotated when they are read.

Deviations: KVQuant fits its levels to calibration data and keeps 1% of the numbers apart; here the levels are evenly
spaced, nothing is kept apart, and groups of tokens and a residual are KIVI's. Without rope, and under a policy that
repositions and so keeps its keys before their rotation anyway, this is `kivi`.
"""

from dataclasses import dataclass

from framework.codec import Codec
from framework.codecs.kivi import Kivi


@dataclass(frozen=True, kw_only=True)
class Kvquant(Kivi):
    """KIVI with keys before their rotation."""

    bits: int = 4

    @property
    def unrotated(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> list[Codec]:
        return [cls(group=4, residual=4)]

    @classmethod
    def listed(cls) -> list[Codec]:
        return [cls()]
