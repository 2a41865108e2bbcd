"""K and V in the model's own dtype."""

from dataclasses import dataclass

from framework.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Full(Codec):
    """No coding."""

    def bits(self, itemsize: int) -> float:
        return 8.0 * itemsize
