"""centred: means by loops, what the inner codec is given, and what it is for."""

import numpy as np
import pytest

from framework.codec import Codec, codecs, decoded
from framework.codecs.centred import Centred
from framework.codecs.exl3 import Exl3
from framework.codecs.int8 import Int8
from framework.errors import KvtwinError
from framework.spec import Layer
from tests.libraries import LIBRARIES, everywhere, same_bytes

NUMPY = LIBRARIES["numpy"][0]


def read_back(codec: Codec, own, once, tokens):
    """What the keys of a group read as."""
    spread = {key: np.repeat(part[..., None, :], tokens, axis=-2) for key, part in once.items()}
    return decoded(codec, NUMPY, own | spread, "keys", np.float32)


@pytest.mark.parametrize("inner", [Int8(), Exl3()], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_the_mean_of_what_is_there_is_taken_out_and_put_back(inner, tokens):
    random = np.random.default_rng(tokens)
    x = (random.standard_normal((2, 3, tokens, 64)) + 50 * random.standard_normal(64)).astype(np.float32)
    filled = random.random((2, 3, tokens)) < 0.6
    filled[..., 0] = True
    codec = Centred(codec=inner, group=8, residual=8)

    def each(xp, x):
        own, once = codec.encode_group(xp, x, xp.asarray(filled), None)
        return own | {f"once.{key}": part for key, part in once.items()}

    parts = same_bytes(everywhere(each, x, eager=tokens == 5))
    mean = parts.pop("once.mean")
    for row, head in np.ndindex(2, 3):
        expected = x[row, head][filled[row, head]].astype(np.float64).mean(0)
        np.testing.assert_allclose(mean[row, head], expected, rtol=2**-11, atol=2e-3)
    rest = (x - mean.astype(np.float32)[..., None, :]).astype(np.float32)
    wanted = inner.encode(NUMPY, rest, "keys")
    for key, part in wanted.items():
        np.testing.assert_array_equal(parts[key], part)
    back = read_back(codec, parts, {"mean": mean}, tokens)
    inside = decoded(inner, NUMPY, wanted, "keys", np.float32)
    np.testing.assert_array_equal(back, inside + mean.astype(np.float32)[..., None, :])


def test_a_channel_that_is_large_in_every_key_costs_the_others_nothing():
    random = np.random.default_rng(3)
    x = random.standard_normal((1, 2, 32, 64)).astype(np.float32)
    x[..., 7] += 300
    full = np.ones((1, 2, 32), bool)
    codec = Centred(codec=Exl3(), group=32, residual=32)
    back = read_back(codec, *codec.encode_group(NUMPY, x, full, None), 32)
    alone = decoded(Exl3(), NUMPY, Exl3().encode(NUMPY, x, "keys"), "keys", np.float32)
    others = np.arange(64) != 7
    with_mean, without = (np.sqrt(np.mean((each - x)[..., others] ** 2)) for each in (back, alone))
    assert with_mean < 0.1 < 0.5 < without  # of numbers whose size is 1


def test_values_are_the_inner_codecs_own():
    x = np.random.default_rng(4).standard_normal((1, 2, 3, 64)).astype(np.float32)
    codec, inner = Centred(codec=Exl3()), Exl3()
    parts, wanted = (each.encode(NUMPY, x, "values") for each in (codec, inner))
    assert all((parts[key] == wanted[key]).all() for key in wanted)
    both = (decoded(each, NUMPY, wanted, "values", np.float32) for each in (codec, inner))
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("inner", ["full()", "kivi()", "unbias(codec=int8())"])
def test_what_cannot_stand_inside_is_refused(inner):
    with pytest.raises(KvtwinError, match="expected one that codes each token by itself, without unbias"):
        codecs.make(f"centred(codec={inner})")


def test_what_does_not_fit_the_inner_codec_does_not_fit():
    assert "head_dim 40" in (Centred(codec=Exl3()).unfit(Layer(2, 2, 40, 1.0, None)) or "")
    together = codecs.make("centred(codec=exl2_q4())").unfit(Layer(2, 2, 32, 1.0, None)) or ""
    assert "expected them coded one by one" in together
