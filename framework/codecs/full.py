"""K and V in the model's own dtype."""

from dataclasses import dataclass
from typing import ClassVar

from framework.codec import Codec


@dataclass(frozen=True, kw_only=True)
class Full(Codec):
    """No coding."""

    exact: ClassVar[bool] = True

    def bits(self, itemsize: int) -> float:
        return 8.0 * itemsize
