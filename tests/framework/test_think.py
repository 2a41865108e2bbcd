"""think: the channels that loops choose, what is read of them, and what does not go."""

import numpy as np
import pytest

from framework.codec import codecs
from framework.codecs.think import Think
from framework.errors import KvtwinError
from framework.spec import Layer
from tests.libraries import LIBRARIES, everywhere, same_bytes

NUMPY = LIBRARIES["numpy"][0]


def chosen(keys, queries, count):
    """The channels with the largest norms of products of queries and keys, by loops in float64."""
    norms = []
    for channel in range(keys.shape[-1]):
        products = np.outer(queries[:, channel].astype(np.float64), keys[:, channel].astype(np.float64))
        norms.append(np.linalg.norm(products))
    best = sorted(range(len(norms)), key=lambda channel: (-norms[channel], channel))[:count]
    return sorted(best)


def made_of(codec, x, filled, queries):
    """The same parts from every library."""

    def each(xp, x):
        own, once = codec.encode_group(xp, x, filled_as(xp, x), queries_as(xp, x))
        return own | {f"once.{key}": part for key, part in once.items()}

    def filled_as(xp, x):
        return xp.asarray(filled)

    def queries_as(xp, x):
        return xp.asarray(queries)

    return same_bytes(everywhere(each, x, eager=x.shape[-1] == 10))


@pytest.mark.parametrize(("tokens", "width", "channels"), [(7, 10, 4), (16, 24, 24), (1, 6, 1)])
def test_it_keeps_what_the_queries_read_most(tokens, width, channels):
    random = np.random.default_rng(tokens)
    x = random.standard_normal((2, 3, tokens, width)) * 10.0 ** random.integers(-2, 3, (2, 3, 1, width))
    queries = random.standard_normal((2, 3, 5, width)) * 10.0 ** random.integers(-2, 3, (2, 3, 1, width))
    x, queries = x.astype(np.float32), queries.astype(np.float32)
    filled = random.random((2, 3, tokens)) < 0.7
    filled[..., 0] = True
    codec = Think(channels=channels, window=5, residual=4)
    parts = made_of(codec, x, filled, queries)
    once = np.repeat(parts.pop("once.channels")[..., None, :], tokens, axis=-2)
    back = codec.read(NUMPY, parts | {"channels": once}, "keys")
    assert parts["codes"].shape == (2, 3, tokens, channels)
    for row, head in np.ndindex(2, 3):
        kept = chosen(x[row, head][filled[row, head]], queries[row, head], channels)
        expected = np.zeros((tokens, width), np.float32)
        expected[:, kept] = x[row, head][:, kept].astype(np.float16)
        np.testing.assert_array_equal(back[row, head], expected)


def test_before_there_are_queries_the_keys_alone_decide():
    x = np.random.default_rng(0).standard_normal((1, 1, 6, 9)).astype(np.float32)
    codec, nothing = Think(channels=4), np.zeros((1, 1, 32, 9), np.float32)
    _, once = codec.encode_group(NUMPY, x, np.ones((1, 1, 6), bool), nothing)
    kept = np.flatnonzero(once["channels"][0, 0] >= 0).tolist()
    assert kept == chosen(x[0, 0], np.ones((1, 9)), 4)


def test_what_leaves_float16_shows():
    x = np.full((1, 1, 2, 4), 7e4, np.float32)
    own, _ = Think(channels=2).encode_group(
        NUMPY, x, np.ones((1, 1, 2), bool), np.ones((1, 1, 1, 4), np.float32)
    )
    assert np.isinf(own["codes"]).all()


def test_more_channels_than_there_are_are_refused():
    assert codecs.make("think(channels=65)").unfit(Layer(2, 2, 64, 1.0, None)) == (
        "head_dim 64; expected at least channels=65"
    )
    assert codecs.make("think(channels=64)").unfit(Layer(2, 2, 64, 1.0, None)) is None
    with pytest.raises(KvtwinError, match="think has window=0; expected at least 1"):
        codecs.make("think(window=0)")
