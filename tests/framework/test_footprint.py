"""framework/footprint.py: figures of published models, and what real caches and codecs measure."""

import math
from dataclasses import dataclass
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest

from backends import backends
from framework.architecture import architectures, open_architecture
from framework.codec import Codec, codecs
from framework.errors import KvtwinError
from framework.footprint import Footprint, footprint, per_token, vector_bits
from framework.groups import unfilled
from framework.policy import policies
from framework.spec import Layer, ModelSpec
from framework.weights import random_weights
from tests.twins import LENGTHS, column, hybrid, prompts

FULL, KEEP = codecs.make("full()"), policies.make("full()")
EXAMPLES = [codecs.spelling(each) for name in codecs.names() for each in codecs.get(name).examples()]


@dataclass(frozen=True, kw_only=True)
class Blocks(Codec):
    """Codes of so many bits, and 16 bits beside every 32 of them: what exl2, q8_0 and q4_0 take."""

    keys: int
    values: int

    def encode(self, xp: Any, x: Any, side: str) -> dict[str, Any]:
        raise AssertionError("counting bytes codes nothing")

    def read(self, xp: Any, parts: Any, side: str) -> Any:
        raise AssertionError("counting bytes codes nothing")

    def bits_of(self, width: int, side: str, itemsize: int) -> tuple[float, float]:
        return float(getattr(self, side) * width), 16.0 * width / 32


class Joint(Blocks):
    """The same of all heads as one."""

    def joint(self, layer: Layer) -> bool:
        return True

    def bits_of(self, width: int, side: str, itemsize: int) -> tuple[float, float]:
        return float(getattr(self, side) * width), 16.0 * math.ceil(width / 32)


class Wide(Blocks):
    """Vectors of multiples of 64 only."""

    def unfit(self, layer: Layer) -> str | None:
        return f"head_dim is {layer.head_dim}; expected a multiple of 64" if layer.head_dim % 64 else None


Q4, Q6, Q8 = Blocks(keys=4, values=4), Blocks(keys=8, values=4), Blocks(keys=8, values=8)

# Elements of a token in all layers; KiB of a token at 16 bits, of all layers and of those without a window; KiB at 16
# bits that windows full to the brim take; KiB of a token at Q4, Q6, Q8; GiB at 16 bits and 131,072 tokens.
PUBLISHED = {
    "gpt2": (18432, 36.000, 36.000, 0, 10.12, 14.62, 19.12, 4.50),
    "llama-2-7b": (262144, 512.000, 512.000, 0, 144.00, 208.00, 272.00, 64.00),
    "llama-2-70b": (163840, 320.000, 320.000, 0, 90.00, 130.00, 170.00, 40.00),
    "llama-3-8b": (65536, 128.000, 128.000, 0, 36.00, 52.00, 68.00, 16.00),
    "llama-3.2-1b": (16384, 32.000, 32.000, 0, 9.00, 13.00, 17.00, 4.00),
    "llama-3.2-3b": (57344, 112.000, 112.000, 0, 31.50, 45.50, 59.50, 14.00),
    "llama-3.1-405b": (258048, 504.000, 504.000, 0, 141.75, 204.75, 267.75, 63.00),
    "mistral-7b": (65536, 128.000, 128.000, 0, 36.00, 52.00, 68.00, 16.00),
    "qwen2-0.5b": (6144, 12.000, 12.000, 0, 3.38, 4.88, 6.38, 1.50),
    "qwen2-1.5b": (14336, 28.000, 28.000, 0, 7.88, 11.38, 14.88, 3.50),
    "qwen2-7b": (28672, 56.000, 56.000, 0, 15.75, 22.75, 29.75, 7.00),
    "qwen2.5-14b": (98304, 192.000, 192.000, 0, 54.00, 78.00, 102.00, 24.00),
    "qwen2-72b": (163840, 320.000, 320.000, 0, 90.00, 130.00, 170.00, 40.00),
    "qwen3-8b": (73728, 144.000, 144.000, 0, 40.50, 58.50, 76.50, 18.00),
    "qwen3-30b-a3b": (49152, 96.000, 96.000, 0, 27.00, 39.00, 51.00, 12.00),
    "qwen3-235b-a22b": (96256, 188.000, 188.000, 0, 52.88, 76.38, 99.88, 23.50),
    "qwen3-next-80b-a3b": (12288, 24.000, 24.000, 0, 6.75, 9.75, 12.75, 3.00),
    "phi-3-mini": (196608, 384.000, 384.000, 0, 108.00, 156.00, 204.00, 48.00),
    "gemma-2-9b": (172032, 336.000, 168.000, 688128, 94.50, 136.50, 178.50, 21.66),
    "gemma-2-27b": (188416, 368.000, 184.000, 753664, 103.50, 149.50, 195.50, 23.72),
    "gemma-3-4b": (69632, 136.000, 20.000, 118784, 38.25, 55.25, 72.25, 2.61),
    "gemma-3-27b": (253952, 496.000, 80.000, 425984, 139.50, 201.50, 263.50, 10.41),
    "gpt-oss-20b": (24576, 48.000, 24.000, 3072, 13.50, 19.50, 25.50, 3.00),
    "gpt-oss-120b": (36864, 72.000, 36.000, 4608, 20.25, 29.25, 38.25, 4.50),
    "deepseek-v2-lite": (15552, 30.375, 30.375, 0, 8.54, 12.34, 16.14, 3.80),
    "deepseek-v2": (34560, 67.500, 67.500, 0, 18.98, 27.42, 35.86, 8.44),
    "deepseek-v3": (35136, 68.625, 68.625, 0, 19.30, 27.88, 36.46, 8.58),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_figures_of_published_models(name: str) -> None:
    elements, kib, beyond, windows, q4, q6, q8, gib = PUBLISHED[name]
    spec = open_architecture(name).spec
    token = per_token(spec, FULL, 2)
    assert (token.kv, token.scales) == (2 * elements, 0)
    assert token.kv / 1024 == kib
    assert per_token(spec, FULL, 2, windows=False).kv / 1024 == beyond
    wide = sum(
        layer.window * 2 * layer.kv_heads * layer.head_dim * 2 for layer in spec.layers if layer.window
    )
    assert wide / 1024 == windows
    for codec, expected in ((Q4, q4), (Q6, q6), (Q8, q8)):
        assert per_token(spec, codec, 2).kv / 1024 == pytest.approx(expected, abs=0.0051)
    assert footprint(spec, KEEP, FULL, 131072, 2).kv / 2**30 == pytest.approx(gib, abs=0.0051)


def test_every_published_model_has_its_figures() -> None:
    rows = {row["names"][0] for row in architectures().values()}
    assert rows - set(PUBLISHED) == {"mistral-7b-v0.1"}


@pytest.mark.parametrize(
    ("name", "codec", "kib"),
    [
        ("qwen2-7b", FULL, 56),
        ("qwen2-7b", Q6, 22.75),
        ("llama-3-8b", FULL, 128),
        ("llama-3-8b", Q4, 36),
        ("llama-2-7b", FULL, 512),
        ("deepseek-v3", FULL, 68.625),
        ("deepseek-v3", Q6, 61 * 576 * 6.5 / 8 / 1024),
        ("gpt2", Q4, 10.125),
        ("qwen2-7b", codecs.make("exl2_q6()"), 22.75),
        ("llama-3-8b", codecs.make("exl2_q4()"), 36),
    ],
)
def test_exact_figures(name: str, codec: Codec, kib: float) -> None:
    spec = open_architecture(name).spec
    assert per_token(spec, codec, 2).kv == kib * 1024
    assert footprint(spec, KEEP, codec, 10, 2).kv == 10 * kib * 1024


def test_a_window_stops_growing_one_token_before_it() -> None:
    spec = open_architecture("gpt-oss-20b").spec
    wide = per_token(spec, FULL, 2, windows=False).kv
    for tokens, held in ((100, 100), (127, 127), (128, 127), (1000, 127)):
        assert footprint(spec, KEEP, FULL, tokens, 2).kv == wide * (tokens + held)


def test_positions_are_four_bytes_a_slot_and_apart() -> None:
    spec = open_architecture("qwen2-7b").spec
    one = footprint(spec, KEEP, Q6, 10, 2)
    assert one.positions == 10 * 28 * 4 * 4
    assert (one.payload, one.scales) == (10 * 21 * 1024, 10 * 1.75 * 1024)


def uneven() -> ModelSpec:
    """Three layers of 2, 3 and 1 kv heads and different widths, the second with a window."""
    layers = tuple(
        Layer(heads=6, kv_heads=kv_heads, head_dim=width, scale=1.0, rope=None, window=window)
        for kv_heads, width, window in ((2, 64, None), (3, 32, 8), (1, 96, None))
    )
    return ModelSpec("llama", 9, 10, 11, layers, 1e-5, 99)


@pytest.mark.parametrize(
    ("policy", "tokens", "slots"),
    [
        ("full()", 5, (10, 15, 5)),
        ("full()", 20, (40, 21, 20)),
        ("window(budget=9)", 20, (18, 21, 9)),
        ("window(budget=9)", 6, (12, 18, 6)),
        ("window(budget=(9, 5, 30))", 20, (18, 15, 20)),
        ("window(budget=((9, 4), (6, 5, 30), 7), sinks=2)", 20, (13, 18, 7)),
        ("h2o(fraction=0.35)", 20, (14, 21, 7)),
        ("h2o(fraction=0.35)", 40, (28, 21, 14)),
        ("adakv(budget=9, policy=snapkv(window=2))", 20, (18, 21, 9)),
        ("fastgen(budget=9)", 20, (18, 21, 9)),
        ("pyramid(budget=6, beta=3, policy=snapkv(window=2))", 99, (20, 18, 6)),
    ],
)
def test_what_a_policy_keeps(policy: str, tokens: int, slots: tuple[int, ...]) -> None:
    assert footprint(uneven(), policies.make(policy), Q8, tokens, 2).slots == slots


def test_bytes_go_with_the_slots_of_each_layer() -> None:
    one = footprint(uneven(), policies.make("window(budget=((9, 4), (6, 5, 7), 8))"), Q6, 20, 2)
    elements = 13 * 64 + 18 * 32 + 8 * 96
    assert one == Footprint((13, 18, 8), elements * 12 / 8, elements * 2 * 16 / 32 / 8, 4 * (13 + 18 + 8))


def test_a_joint_codec_counts_all_heads_as_one_vector() -> None:
    layer = Layer(heads=6, kv_heads=3, head_dim=40, scale=1.0, rope=None)
    assert vector_bits(Joint(keys=4, values=2), layer, 2) == (6.0 * 120, 2 * 16.0 * 4)
    spec = ModelSpec("llama", 9, 10, 11, (layer,), 1e-5, 99)
    assert footprint(spec, KEEP, Joint(keys=4, values=2), 5, 2).kv == 5 * (6 * 120 + 128) / 8


@pytest.mark.parametrize(
    ("policy", "codec", "says"),
    [
        ("window(budget=9)", Joint(keys=4, values=4), "codes the heads of layer 0 together"),
        ("full()", Wide(keys=4, values=4), "cannot code layer 1: head_dim is 32; expected a multiple of 64"),
        ("merge(budget=9, policy=snapkv(window=2))", Q4, "code them again"),
        ("snapkv(budget=9, fraction=0.5)", Q4, "has a budget and a fraction"),
        ("cake(budget=((99, 99), (99, 99, 99), 99), policy=snapkv())", Q4, "a budget for each head"),
        ("window(budget=(9, 8))", Q4, "2 budgets"),
        ("window()", Q4, "no budget"),
        ("full(budget=9)", Q4, "keeps every token"),
    ],
)
def test_what_no_cache_can_be_is_refused(policy: str, codec: Codec, says: str) -> None:
    with pytest.raises(KvtwinError) as caught:
        footprint(uneven(), policies.make(policy), codec, 20, 2)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "policy", ["tova(budget=5)", "chunked(budget=8, chunk=2, policy=h2o())"], ids=["tova", "chunked"]
)
def test_one_kept_set_goes_with_a_joint_codec(policy: str) -> None:
    assert footprint(uneven(), policies.make(policy), Joint(keys=4, values=4), 20, 2).payload > 0


def three_layers(head_dim: int) -> ModelSpec:
    """A model that runs: kv heads and widths of the layers are alike, windows are not."""
    layers = tuple(
        Layer(heads=6, kv_heads=3, head_dim=head_dim, scale=head_dim**-0.5, rope=None, window=window)
        for window in (None, 9, None)
    )
    return ModelSpec("llama", 50, 14, 16, layers, 1e-5, 64, qkv_bias=True)


SPELLED = (
    "full()",
    "window(budget=7)",
    "h2o(budget=(7, 5, 30))",
    "window(budget=((7, 5, 9), 6, (4, 8, 30)))",
    "snapkv(budget=8, window=3, kernel=3)",
)


def predicted(spec: ModelSpec, policy: str, codec: str, itemsize: int, seen: Any) -> tuple[float, float, int]:
    each = [footprint(spec, policies.make(policy), codecs.make(codec), int(one), itemsize) for one in seen]
    return (
        sum(one.payload for one in each),
        sum(one.scales for one in each),
        sum(one.positions for one in each),
    )


def hold(backend: str, dtype: str, policy: str, codec: str, head_dim: int) -> None:
    """Ragged rows after a prompt and after each of two steps; windows and budgets above, within and below them."""
    spec = three_layers(head_dim)
    model = backends.get(backend).build(spec, random_weights(spec, 1, np.float32), dtype)
    rows = [list(range(20)), list(range(4)), list(range(13))]
    itemsize = {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]
    cache = model.cache(policy, codec, batch=3)
    # Of groups of keys the prediction is that of one prompt.
    steps = [] if codecs.make(codec).together else [[[1], [2], [3]], [[4], [5], [6]]]
    for tokens in (rows, *steps):
        _, cache = model.step(tokens, cache, logits=None)
        payload, scales, positions = predicted(spec, policy, codec, itemsize, cache.seen)
        assert (cache.bytes.payload, cache.bytes.scales) == (payload, scales)
        assert cache.bytes.positions >= positions  # pages say where heads begin, too
        assert cache.bytes.positions == positions or backend == "torch"


@pytest.mark.parametrize("policy", SPELLED)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", "float64"), ("torch", "float32"), ("torch", "bfloat16")]
)
def test_it_is_what_a_cache_measures(backend: str, dtype: str, policy: str) -> None:
    hold(backend, dtype, policy, "full()", 10)


@pytest.mark.parametrize("codec", EXAMPLES)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", "float64"), ("torch", "bfloat16")])
def test_it_is_what_a_coded_cache_measures(backend: str, dtype: str, codec: str) -> None:
    made = codecs.make(codec)
    # Of which tokens a group is left, and how many of the newest, only the text could say under a policy that chooses.
    policy = "tova(budget=7)" if made.joint(three_layers(64).layers[0]) else SPELLED[0 if made.recent else 3]
    hold(backend, dtype, policy, codec, 64)


@pytest.mark.parametrize("name", policies.names())
def test_every_policy_keeps_what_is_said_or_less(name: str) -> None:
    """Less only where the text decides how much, and that the prediction calls the most."""
    policy = policies.get(name).examples()[0]
    model = hybrid("torch", "float32")
    _, cache = model.step(prompts(), model.cache(policy, batch=3), logits=None)
    _, cache = model.step(column(0), cache, logits=None)
    each = [footprint(model.spec, policy, FULL, length + 1, 4).kv for length in LENGTHS]
    late = len(LENGTHS) * per_token(model.spec, FULL, 4).kv if policy.interval > 1 else 0
    if policy.divides or policy.allocates:
        assert 0 < cache.bytes.payload <= sum(each) + late
    else:
        assert cache.bytes.payload == sum(each) + late


@pytest.mark.parametrize("name", codecs.names())
def test_the_bits_of_a_codec_are_those_of_its_arrays(name: str) -> None:
    """Every example, both sides, in a layer whose heads are coded one by one or as one."""
    slots = 6
    layer = Layer(heads=6, kv_heads=3, head_dim=128, scale=1.0, rope=None)
    spec = ModelSpec("llama", 9, 10, 11, (layer,), 1e-5, 99, qkv_bias=True)
    for codec in codecs.get(name).examples():
        heads, width = (1, 3 * 128) if codec.joint(layer) else (3, 128)
        x = np.random.default_rng(2).standard_normal((1, heads, slots, width)).astype(np.float32)
        found = [0, 0]
        for side in ("keys", "values"):
            made = codec.encode(xp, x, side)
            if side == "keys" and codec.together:
                made = {
                    key.removeprefix("keys."): part for key, part in unfilled(xp, codec, layer, x).items()
                }
            parts = {key: np.asarray(part) for key, part in made.items()}
            assert all(part.shape[:3] == (1, heads, slots) for part in parts.values())
            codes = parts.pop("codes").nbytes
            beside = sum(part.nbytes for part in parts.values())
            assert (8 * codes, 8 * beside) == tuple(
                heads * slots * each for each in codec.bits_of(width, side, 4)
            )
            found = [found[0] + codes, found[1] + beside]
        one = footprint(spec, KEEP, codec, slots, 4)
        newest = min(codec.recent, slots) * heads * 2 * width * 4
        complete = slots - slots % codec.recent if codec.together else 0
        groups = -(-complete // codec.together) if codec.together else 0
        shared = groups * heads * codec.group_bits(width, 4) / 8 + 4 * heads * codec.regroups
        assert [one.payload, one.scales] == [found[0] + newest, found[1] + shared]
