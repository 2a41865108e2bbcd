"""A codec: how keys and values are stored. The only one so far keeps them as they are."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from framework.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Base of every codec: a frozen description, hashable like a policy."""

    @abstractmethod
    def bits(self, itemsize: int) -> float:
        """Bits stored per element of K or V, scales included, for a model whose elements have `itemsize` bytes."""


codecs = Registry(kind="codec", package="framework.codecs", base=Codec)
