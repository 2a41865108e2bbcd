"""How many bytes the keys and values of a model take, from numbers alone: what `cache.bytes` measures on a cache.

The formula: in each layer, kept tokens times the bits that the codec gives to a key and to a value of each kv head;
under a codec that keeps the newest tokens exact, those in the model's floats as well; and what each group of keys has
once (`framework/groups.py`).
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
    """Bytes of one sequence between two calls; `payload`, `scales` and `positions` as in `framework.cache.Bytes`.

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
    the budget allows. Groups of keys are those of one prompt. Raises KvtwinError where no cache could have this policy,
    this codec and these layers.
    """
    made = resolved(policy, tokens)
    check(spec, made, codec)
    heads = kept_heads(spec, made, tokens)
    slots = tuple(sum(each) for each in heads)
    one = _footprint(spec, codec, slots, itemsize)
    if not codec.recent:
        return one
    payload, scales = one.payload, one.scales
    coded = tokens - tokens % codec.recent
    for layer, each in zip(spec.layers, heads, strict=True):
        payload += sum(min(count, codec.recent) for count in each) * 2 * layer.head_dim * itemsize
        if codec.together:
            # Without a policy that chooses, what is kept is the newest.
            old = [min(count, coded) if made.evicts else max(0, count - tokens + coded) for count in each]
            groups = sum(-(-count // codec.together) for count in old)
            scales += groups * codec.group_bits(layer.head_dim, itemsize) / 8
        scales += 4 * layer.kv_heads if codec.regroups else 0
    return Footprint(slots, payload, scales, one.positions)


def per_token(spec: ModelSpec, codec: Codec, itemsize: int, windows: bool = True) -> Footprint:
    """What one token takes that every layer keeps; without `windows`, what a token adds once they are full.

    Far from the newest, so that it is coded, with its share of what its group has once.
    """
    slots = (layer.kv_heads if windows or layer.window is None else 0 for layer in spec.layers)
    return _footprint(spec, codec, tuple(slots), itemsize, shared=True)


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


def kept_heads(spec: ModelSpec, policy: Policy, tokens: int) -> list[list[int]]:
    """Tokens that each kv head of each layer keeps of a sequence; shares that the text decides are even ones."""
    found = []
    for index, (heads, layer) in enumerate(zip(layer_budgets(policy, spec), spec.layers, strict=True)):
        budgets = heads or (tokens,) * layer.kv_heads
        most = [policy.most(one, index, spec) for one in budgets] if policy.divides else budgets
        each = [min(tokens, limit(one, layer.window) or 0) for one in most]
        if policy.divides:
            total = min(sum(each), policy.total(budgets, index, spec))
            each = [(total + number) // layer.kv_heads for number in range(layer.kv_heads)]
        found.append(each)
    return found


def check(spec: ModelSpec, policy: Policy, codec: Codec) -> None:
    """Raises where no cache could have these; a latent stream, which kvtwin does not store yet, counts as one head."""
    check_policy(policy, spec)
    check_codec(
        codec, policy, replace(spec, layers=tuple(replace(each, latent=None) for each in spec.layers))
    )


def _footprint(
    spec: ModelSpec, codec: Codec, slots: tuple[int, ...], itemsize: int, shared: bool = False
) -> Footprint:
    payload, scales = 0.0, 0.0
    for count, layer in zip(slots, spec.layers, strict=True):
        codes, beside = vector_bits(codec, layer, itemsize)
        if shared and codec.together:
            beside += layer.kv_heads * codec.group_bits(layer.head_dim, itemsize) / codec.together
        # A whole token is as many slots as there are kv heads; multiplied first, so that whole bytes stay whole.
        payload += count * codes / (8 * layer.kv_heads)
        scales += count * beside / (8 * layer.kv_heads)
    return Footprint(slots, payload, scales, POSITION * sum(slots))
