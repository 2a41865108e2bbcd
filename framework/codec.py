"""A codec: how keys and values are stored. The only one so far keeps them as they are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from framework.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Base of every codec: a frozen description, hashable like a policy.

    `exact`: what is read back is what was stored, so that a slot may be written again.
    """

    exact: ClassVar[bool] = False

    @abstractmethod
    def bits(self, itemsize: int) -> float:
        """Bits stored per element of K or V, scales included, for a model whose elements have `itemsize` bytes."""


codecs = Registry(kind="codec", package="framework.codecs", base=Codec)
