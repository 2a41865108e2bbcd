"""How many bytes the keys and values of a model take, from numbers alone: what `cache.bytes` measures on a cache.

The formula: in each layer, kept tokens times the bits that the codec gives to a key and to a value of each kv head.
"""

from dataclasses import dataclass, replace

from framework.codec import Codec
from framework.coding import SIDES, check_codec
from framework.eviction import check_policy, layer_budgets, limit, resolved
from framework.policy import Policy
from framework.spec import Layer, ModelSpec

POSITION = 4  # bytes of the position of a slot


@dataclass(frozen=True)
class Footprint:
    """Bytes of one sequence between two calls; `payload`, `scales` and `positions` as in `framework.backend.Bytes`.

    `slots`: kept tokens per layer, summed over its kv heads. What a policy remembers, and room that is allocated and
    empty, are not in it.
    """

    slots: tuple[int, ...]
    payload: float
    scales: float
    positions: int

    @property
    def kv(self) -> float:
        """Keys and values with all that is needed to read them."""
        return self.payload + self.scales


def footprint(spec: ModelSpec, policy: Policy, codec: Codec, tokens: int, itemsize: int) -> Footprint:
    """What a cache holds of a sequence of `tokens` tokens, `itemsize` being the bytes of the model's floats.

    A fraction is one of `tokens`. Where the text decides who keeps what (`divides`, `allocates`), it is the most that
    the budget allows. Raises KvtwinError where no cache could have this policy, this codec and these layers.
    """
    made = resolved(policy, tokens)
    check(spec, made, codec)
    slots = tuple(kept_slots(spec, made, tokens))
    return _footprint(spec, codec, slots, itemsize)


def per_token(spec: ModelSpec, codec: Codec, itemsize: int, windows: bool = True) -> Footprint:
    """What one token takes that every layer keeps; without `windows`, what a token adds once they are full."""
    slots = (layer.kv_heads if windows or layer.window is None else 0 for layer in spec.layers)
    return _footprint(spec, codec, tuple(slots), itemsize)


def vector_bits(codec: Codec, layer: Layer, itemsize: int) -> tuple[float, float]:
    """Bits of the key and the value of one token in all heads of a layer: of the codes, and of what is beside them.

    A latent stream is stored once and read as keys and as values: it counts the mean of what the codec gives to each.
    """
    streams = list(layer.streams.values())
    codes, beside = 0.0, 0.0
    for side, stream in zip(SIDES, (streams[0], streams[-1]), strict=True):
        heads, width = stream.heads, stream.width
        if codec.joint(layer):
            heads, width = 1, heads * width
        one = codec.bits_of(width, side, itemsize)
        share = heads * len(streams) / 2
        codes, beside = codes + share * one[0], beside + share * one[1]
    return codes, beside


def kept_slots(spec: ModelSpec, policy: Policy, tokens: int) -> list[int]:
    """Tokens that each layer keeps of a sequence, summed over its kv heads."""
    found = []
    for index, (heads, layer) in enumerate(zip(layer_budgets(policy, spec), spec.layers, strict=True)):
        budgets = heads or (tokens,) * layer.kv_heads
        most = [policy.most(one, index, spec) for one in budgets] if policy.divides else budgets
        total = sum(min(tokens, limit(one, layer.window) or 0) for one in most)
        found.append(min(total, policy.total(budgets, index, spec)) if policy.divides else total)
    return found


def check(spec: ModelSpec, policy: Policy, codec: Codec) -> None:
    """Raises where no cache could have these; a latent stream, which kvtwin does not store yet, counts as one head."""
    check_policy(policy, spec)
    check_codec(
        codec, policy, replace(spec, layers=tuple(replace(each, latent=None) for each in spec.layers))
    )


def _footprint(spec: ModelSpec, codec: Codec, slots: tuple[int, ...], itemsize: int) -> Footprint:
    payload, scales = 0.0, 0.0
    for count, layer in zip(slots, spec.layers, strict=True):
        codes, beside = vector_bits(codec, layer, itemsize)
        # A whole token is as many slots as there are kv heads; multiplied first, so that whole bytes stay whole.
        payload += count * codes / (8 * layer.kv_heads)
        scales += count * beside / (8 * layer.kv_heads)
    return Footprint(slots, payload, scales, POSITION * sum(slots))
