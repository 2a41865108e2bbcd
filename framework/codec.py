"""A codec: how keys and values are stored, written once in array code for every backend.

A codec file holds one subclass of `Codec`: a frozen dataclass that turns the vectors of tokens into arrays of codes and
scales, each with one entry per token, and back. The machinery stores these arrays in the place of keys and values and
moves them as it moves those: a token is coded once and never again. A codec may code the keys of some tokens together
and keep the newest tokens exact: framework/groups.py says how.

Codecs run on NumPy, torch and jax.numpy, and give the same bytes on all three. The array API standard has no float16,
so that its strict implementation cannot run them. XLA joins a product and a sum into one rounding, and turns a division
by a constant into a product: where a code depends on it, keep the two apart (`framework/rounding.py`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float

from framework.arrays import Array, Namespace, device
from framework.registry import Registry
from framework.spec import Layer

Side = Literal["keys", "values"]
Parts = Mapping[str, Array]  # the arrays of one side, [*axes any]: `codes`, and beside them what reads them


@dataclass(frozen=True, kw_only=True)
class Codec(ABC):
    """Base of every codec: a frozen description, hashable like a policy.

    `exact`: what is read back is what was stored, so that a slot may be written again.

    What is read is `read * scale @ turn`; the machinery applies the last two to queries, logits and outputs, so that
    no second array as large as the cache is made.
    """

    exact: ClassVar[bool] = False

    @abstractmethod
    def encode(self, xp: Namespace, x: Float[Array, "*axes width"], side: Side) -> dict[str, Array]:
        """The parts of float32 vectors, among them `codes`. What cannot be coded gives a scale that is not finite."""

    @abstractmethod
    def read(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes width"]:
        """The vectors in float32, before `scale` and `turn`."""

    def pieces(self, xp: Namespace, parts: Parts, side: Side) -> list[Float[Array, "*axes n"]]:
        """What `read` gives, number for number, as arrays that lie side by side in it.

        Attention multiplies each by its own part of the queries: what is unpacked in pieces need not be joined.
        """
        return [self.read(xp, parts, side)]

    def scale(self, xp: Namespace, parts: Parts, side: Side) -> Float[Array, "*axes"] | None:
        """A factor per vector, float32; None for 1."""
        return None

    def turn(self, width: int, side: Side) -> Float[np.ndarray, "width width"] | None:
        """The matrix, float32, that multiplies what is read from the right; None for the identity."""
        return None

    @abstractmethod
    def bits_of(self, width: int, side: Side, itemsize: int) -> tuple[float, float]:
        """Bits of one vector: of its codes, and of what it has beside them. `itemsize`: bytes of the model's floats."""

    def joint(self, layer: Layer) -> bool:
        """True: the vectors of all heads of a token are coded as one, and policies that choose per head are refused."""
        return False

    @property
    def unbiased(self) -> bool:
        """True: keys come without the bias of their projection, rotated as they are, and get it back when they are
        read."""
        return False

    @property
    def recent(self) -> int:
        """So many of the newest tokens of a row stay exact. Where it is not 0, tokens are coded after the eviction."""
        return 0

    @property
    def together(self) -> int:
        """The keys of this many tokens, or fewer where no more are left, are coded as one group by `encode_group`,
        when `recent` tokens that begin at a multiple of `recent` are there. 0: each key by itself."""
        return 0

    @property
    def regroups(self) -> bool:
        """True: when keys of a head are coded that would then lie in more than twice the groups they need, its older
        ones are coded again with them."""
        return False

    @property
    def unrotated(self) -> bool:
        """True: keys are stored before their rotation, which is done when they are read."""
        return False

    @property
    def queries(self) -> int:
        """The number of newest queries that `encode_group` is shown."""
        return 0

    def encode_group(
        self,
        xp: Namespace,
        x: Float[Array, "*axes tokens width"],
        filled: Bool[Array, "*axes tokens"],
        queries: Float[Array, "*#axes newest width"] | None,
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The parts [*axes tokens n], among them `codes`, and [*axes n] of a group of keys; `read` is given both, the
        latter once for each token. Where `filled` is False the last key is repeated; where there are no queries yet,
        they are 0."""
        raise AssertionError(f"{self} codes each key by itself")

    def group_bits(self, width: int, itemsize: int) -> float:
        """Bits of the parts that a group of keys has once."""
        return 0.0

    def unfit(self, layer: Layer) -> str | None:
        """Why the vectors of a layer cannot be coded: what came and what is expected; None where they can."""
        return None

    @classmethod
    def examples(cls) -> list["Codec"]:
        """Instances that every contract and equivalence test runs by itself, on short texts."""
        return [cls()]

    @classmethod
    def listed(cls) -> list["Codec"]:
        """Instances that the table of codecs shows, where they are others."""
        return cls.examples()


codecs = Registry(kind="codec", package="framework.codecs", base=Codec)


def decoded(codec: Codec, xp: Namespace, parts: Parts, side: Side, dtype: Any) -> Float[Array, "*axes width"]:
    """Coded vectors as the model sees them, in its own precision."""
    x = xp.astype(codec.read(xp, parts, side), dtype)
    scale, turn = codec.scale(xp, parts, side), codec.turn(x.shape[-1], side)
    if scale is not None:
        x = x * xp.astype(scale, dtype)[..., None]
    return x if turn is None else xp.matmul(x, xp.asarray(turn, dtype=dtype, device=device(x)))
