"""The codec `quanto`: a loop over single groups, from every library; the judges are optimum-quanto and transformers."""

import numpy as np
import pytest
import torch
from transformers import QuantizedCache
from transformers.cache_utils import QuantoQuantizedLayer

from backends import backends
from framework.codec import codecs, decoded
from framework.errors import KvtwinError
from framework.packing import unpack
from framework.spec import Layer
from tests.libraries import LIBRARIES, everywhere, same_bytes
from tests.tiny import huggingface, relative_drift, tiny_config, tiny_model, tiny_tokens

NUMPY = LIBRARIES["numpy"][0]
FORMS = [(4, 64), (2, 64), (4, 32), (2, 16)]  # bits and group; 64 is what transformers takes
f32 = np.float32


def quanto(bits, group=64):
    return codecs.make(f"quanto(bits={bits}, group={group})")


def group_of(values, bits):
    """Codes, scale and shift of one group, one float32 operation after the other."""
    shift = f32(-min(values))
    scale = f32(f32(max(values) + shift) / f32(2**bits - 1))
    if scale == 0:
        return [0] * len(values), scale, shift
    return [min(round(float(f32(f32(x + shift) / scale))), 2**bits - 1) for x in values], scale, shift


def values(seed=0):
    """[2 3 5 128]: vectors of many sizes; a minimum above 0, equal numbers, an outlier, numbers between two codes."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 3, 5, 128)) * 10.0 ** random.integers(-5, 6, (2, 3, 5, 1))
    x[0, 0, 0] += 1e6
    x[0, 1, 0, :64], x[0, 1, 0, 64:] = -1.7, 0.3
    x[0, 2, 0, 40] = 3e5
    step = random.integers(1025, 2048, (3, 5, 1)) * 2.0**-12
    x[1] = (random.integers(0, 30, (3, 5, 128)) / 2 - 4) * step  # ties of 4 bits
    x[1, ..., 0::16], x[1, ..., 1::16] = -4 * step, 11 * step
    return x.astype(f32)


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_groups_are_those_of_the_loop_from_every_library(bits, group):
    x, codec = values(), quanto(bits, group)
    made = same_bytes(everywhere(lambda xp, x: codec.encode(xp, x, "keys"), x, eager=group == 64))
    codes = unpack(NUMPY, made["codes"], bits)
    read = codec.read(NUMPY, made, "keys")
    assert made["codes"].shape[-1] == 128 * bits // 8
    assert made["scales"].dtype == made["shifts"].dtype == f32
    for place in np.ndindex(2, 3, 5):
        for number in range(128 // group):
            part = slice(number * group, (number + 1) * group)
            wanted, scale, shift = group_of(x[place][part], bits)
            np.testing.assert_array_equal(codes[place][part], wanted, str(place))
            assert (made["scales"][place][number], made["shifts"][place][number]) == (scale, shift), place
            np.testing.assert_array_equal(read[place][part], np.array(wanted, f32) * scale - shift)


def test_what_is_computed_before_is_rounded_before_it_is_coded():
    """In one compiled function, as in a model, a product would else be joined with the shift."""
    random = np.random.default_rng(3)
    wanted = (1000 + random.integers(0, 31, (100, 64)) / 2).astype(f32)  # half of them between two codes
    wanted[:, 0], wanted[:, 1] = 1000, 1015
    one = random.uniform(1, 2, wanted.shape).astype(f32)
    other = wanted / one
    one, other = np.where(one * other == wanted, [one, other], [np.ones_like(one), wanted])
    made = everywhere(
        lambda xp, one, other: quanto(4).encode(xp, one * other, "keys"), one, other, eager=False
    )
    np.testing.assert_array_equal(unpack(NUMPY, same_bytes(made)["codes"], 4), np.round(wanted - 1000))


def test_equal_numbers_are_read_exactly_and_tiny_ones_as_zeros():
    x = np.zeros((5, 64), f32)
    x[0], x[1], x[2], x[3, ::2], x[4, 1::2] = -1.7, 3e37, 1e-12, 1e-31, -1e-40
    for each in everywhere(lambda xp, x: quanto(4).encode(xp, x, "keys"), x).values():
        np.testing.assert_array_equal(each["scales"], 0)
        read = quanto(4).read(NUMPY, each, "keys")
        np.testing.assert_array_equal(read[:3], x[:3])
        np.testing.assert_array_equal(read[3:], 0)


@pytest.mark.parametrize(
    ("bad", "where"),
    [(np.nan, 70), (np.inf, 70), (-np.inf, 70), (-1e38, 70), (1e38, 70), (1e38, slice(64, None))],
)
def test_what_cannot_be_coded_has_an_infinite_scale_in_its_group_alone(bad, where):
    x = values()[0]
    x[2, 3, where] = bad
    made = same_bytes(everywhere(lambda xp, x: quanto(4).encode(xp, x, "keys"), x))
    assert np.argwhere(~np.isfinite(made["scales"])).tolist() == [[2, 3, 1]]
    assert made["scales"][2, 3, 1] == np.inf


@pytest.mark.parametrize("bits", [2, 4])
def test_white_noise_loses_what_its_range_says(bits):
    """Rounding errors are even within a step: the mean square is a twelfth of it; twice no number is rounded."""
    x = np.random.default_rng(5).standard_normal((1, 2, 2000, 128)).astype(f32)
    parts = quanto(bits).encode(NUMPY, x, "keys")
    error = decoded(quanto(bits), NUMPY, parts, "keys", f32) - x
    span = np.ptp(x.reshape(-1, 64).astype(float), axis=1)
    wanted = np.sqrt(np.mean((span / (2**bits - 1)) ** 2) / 12 * 62 / 64)
    assert np.sqrt(np.mean(error.astype(float) ** 2)) == pytest.approx(wanted, rel={2: 0.05, 4: 0.005}[bits])


def test_head_dims_that_are_no_multiple_of_the_group_are_refused():
    def layer(width):
        return Layer(heads=4, kv_heads=2, head_dim=width, scale=1.0, rope=None)

    assert quanto(4).unfit(layer(32)) == "head_dim 32; expected a multiple of group=64"
    assert quanto(4).unfit(layer(96)) is not None
    assert quanto(4).unfit(layer(128)) is quanto(4, 32).unfit(layer(96)) is None
    assert not quanto(4).joint(layer(32))


@pytest.mark.parametrize(
    ("bits", "group", "width"), [(4, 64, 64), (4, 16, 96), (2, 64, 64), (4, 48, 144), (2, 12, 36)]
)
def test_groups_need_not_end_where_a_piece_ends(bits, group, width):
    """Of four codes in a byte the first is that of the first quarter of the vector, whatever its groups are."""
    x = np.random.default_rng(5).standard_normal((2, 3, width)).astype(f32)
    codec = quanto(bits, group)
    parts = codec.encode(NUMPY, x, "keys")
    codes = unpack(NUMPY, parts["codes"], bits)
    read = codec.read(NUMPY, parts, "keys")
    for row, head, number in np.ndindex(x.shape):
        scale, shift = (parts[key][row, head, number // group] for key in ("scales", "shifts"))
        assert read[row, head, number] == f32(codes[row, head, number]) * scale - shift


@pytest.mark.parametrize("spelled", ["bits=8", "bits=3", "group=0", "group=-64", "group=6"])
def test_what_quanto_has_not_is_refused(spelled):
    with pytest.raises(KvtwinError, match=f"quanto has {spelled}; expected"):
        codecs.make(f"quanto({spelled})")


def unpacked(there, bits):
    """The tensor of optimum-quanto with a code a byte, which it would compile C++ to read; and its codes."""
    packed = (
        there._data._data.numpy()
    )  # row i of n has the groups i, n + i and so on, the first in its low bits
    codes = np.concatenate([packed >> place & (2**bits - 1) for place in range(0, 8, bits)])
    there._data = torch.from_numpy(codes)
    return there, codes


@pytest.mark.judge
@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_codes_and_scales_are_those_of_optimum_quanto(bits, group):
    from optimum.quanto import MaxOptimizer, qint2, qint4, quantize_weight

    for seed in range(1, 5):
        x, kind = torch.from_numpy(values(seed)), {2: qint2, 4: qint4}[bits]
        scale, shift = MaxOptimizer()(x, kind, 0, group)
        there, codes = unpacked(quantize_weight(x, kind, 0, scale, shift, group), bits)
        parts = quanto(bits, group).encode(NUMPY, x.numpy(), "values")
        np.testing.assert_array_equal(unpack(NUMPY, parts["codes"], bits), codes.reshape(x.shape))
        assert parts["scales"].tobytes() == scale.numpy().tobytes()
        assert parts["shifts"].tobytes() == shift.numpy().tobytes()
        read = quanto(bits, group).read(NUMPY, parts, "values")
        np.testing.assert_array_equal(read, there.dequantize().numpy())


@pytest.mark.judge
@pytest.mark.parametrize("bits", [2, 4])
def test_a_model_goes_on_as_under_the_cache_of_hugging_face(bits, monkeypatch):
    """That cache with no room for exact tokens: it codes all anew at each step, and finds the codes that it had."""
    config = tiny_config("llama", 1) | {"head_dim": 64}
    spec, weights = tiny_model("llama", 1, config)
    first, then = (tiny_tokens(spec, seed, tokens=tokens) for seed, tokens in ((1, 23), (2, 8)))
    code = QuantoQuantizedLayer._quantize
    monkeypatch.setattr(
        QuantoQuantizedLayer, "_quantize", lambda layer, x, axis: unpacked(code(layer, x, axis), bits)[0]
    )
    there = huggingface(config, weights)
    theirs = QuantizedCache("quanto", there.config, nbits=bits, residual_length=1)
    model = backends.get("torch").build(spec, weights, "float64")
    ours, exact = model.cache("full()", quanto(bits), 2), model.cache("full()", "full()", 2)
    lost = []
    for tokens in (first, *np.split(then, 8, axis=1)):
        with torch.inference_mode():
            wanted = there(torch.from_numpy(tokens).long(), past_key_values=theirs).logits[:, -1:].numpy()
        found, ours = model.step(tokens, ours)
        plain, exact = model.step(tokens, exact)
        assert relative_drift(found, wanted) < 1e-6
        lost.append(relative_drift(plain, wanted))
    assert lost[0] < 1e-6
    assert min(lost[1:]) > {2: 0.1, 4: 0.01}[bits]
