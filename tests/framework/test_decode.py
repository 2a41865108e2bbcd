"""framework/decode.py: the chosen token, against a sorting oracle, Hugging Face's warpers, and between libraries."""

import array_api_compat.numpy as numpy_namespace
import array_api_compat.torch as torch_namespace
import array_api_strict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from framework.decode import Sampling, _check, _most, _nucleus, choose
from framework.errors import KvtwinError
from framework.random import gumbel

LIBRARIES = [numpy_namespace, torch_namespace, array_api_strict, jnp]
VOCABS = [7, 50, 257, 5000]


def name(xp):
    return xp.__name__


def logits_of(kind, vocab, seed, batch=3):
    """[batch vocab] float32: `smooth` has no ties, `ties` and `signs` many, `wide` every exponent, `banned` -inf."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(batch, vocab)) * 4
    if kind == "ties":
        x = np.round(x / 3)
    if kind == "signs":
        x = draw.integers(-1, 2, size=x.shape) * 1.0
    if kind == "wide":
        x = np.sign(x) * 2.0 ** draw.uniform(-60, 126, size=x.shape)
    if kind == "negative":
        x = x - 100
    if kind == "banned":
        x[:, 1::2] = -np.inf
    return x.astype(np.float32)


KINDS = ["smooth", "ties", "signs", "wide", "negative", "banned"]


def ranking(x):
    """Ids by falling logit, the lower id first among equals."""
    return np.argsort(-x, axis=-1, kind="stable")


def kept_by_rank(x, counts):
    keep = np.zeros(x.shape, dtype=bool)
    for row, (order, count) in enumerate(zip(ranking(x), counts, strict=True)):
        keep[row, order[:count]] = True
    return keep


def oracle(x, noise, temperature, top_k, top_p, min_p):
    """One row, in float64, by sorting: the id that `choose` must give."""
    if temperature == 0:
        return int(np.argmax(x))
    order = ranking(x[None])[0]
    order = order[: top_k or None]
    scaled = (x.astype(np.float64) - x.max()) / temperature
    weights = np.exp(scaled)
    if top_p < 1:
        share = np.cumsum(weights[order]) / weights[order].sum()
        order = order[: np.searchsorted(share, top_p) + 1]
    order = order[weights[order] >= min_p]
    return int(min(order, key=lambda each: (-(scaled + noise)[each], each)))


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_keeps_exactly_the_first_k_of_the_ranking(kind, vocab):
    x = logits_of(kind, vocab, seed=vocab)
    for counts in ([1, 2, 3], [vocab // 2, vocab - 1, vocab], [vocab // 3, 5, vocab + 9]):
        column = np.asarray(counts, dtype=np.int32)[:, None]
        assert np.array_equal(_most(np, x, column), kept_by_rank(x, counts)), counts


@pytest.mark.parametrize("xp", LIBRARIES, ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_exact_in_every_library(xp, kind):
    x = logits_of(kind, 61, seed=8)
    counts = np.asarray([[4], [33], [0]], dtype=np.int32)
    assert np.array_equal(
        np.asarray(_most(xp, xp.asarray(x), xp.asarray(counts))), kept_by_rank(x, [4, 33, 61])
    )


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_top_k_tells_neighbouring_floats_apart(distance):
    """Entries that differ in the last bits only, on both sides of zero and of a power of two."""
    for centre in (1.0, -1.0, 3.3e38, -3.3e38, 1e-18, -1e-18, 0.1, -100.0):
        x = np.full((1, 9), centre, dtype=np.float32)
        ladder = (
            np.asarray([centre], dtype=np.float32).view(np.int32) + np.arange(9, dtype=np.int32) * distance
        )
        x[0] = ladder.view(np.float32)[[4, 0, 7, 1, 8, 3, 2, 6, 5]]
        for count in range(1, 10):
            assert np.array_equal(
                _most(np, x, np.asarray([[count]], dtype=np.int32)), kept_by_rank(x, [count])
            ), (
                centre,
                count,
            )


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", ["smooth", "ties", "signs", "negative", "banned"])
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(kind, vocab):
    """For shares midway between two reachable ones, where float32 leaves no doubt."""
    x = logits_of(kind, vocab, seed=vocab + 1)
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    exact = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    for count in (1, 2, 3, 6):
        ordered = np.take_along_axis(exact, ranking(x), axis=-1)
        reached = np.cumsum(ordered, axis=-1) / ordered.sum(axis=-1, keepdims=True)
        before = reached[:, count - 2] if count > 1 else 0
        share = ((before + reached[:, count - 1]) / 2).astype(np.float32)
        clear = reached[:, count - 1] - before > 1e-5
        ours = _nucleus(np, x, weights, share[:, None])
        assert np.array_equal(ours[clear], kept_by_rank(x, [count] * 3)[clear]), count


def test_top_p_near_zero_keeps_the_largest():
    x = logits_of("ties", 50, seed=3)
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    assert np.array_equal(
        _nucleus(np, x, weights, np.asarray([[1e-38]], dtype=np.float32)), kept_by_rank(x, [1] * 3)
    )


def survivors(x, temperature, top_k=None, top_p=None, min_p=None):
    """Which tokens `choose` can give: noise that favours one token finds out whether it is left."""
    batch, vocab = x.shape
    left = np.zeros(x.shape, dtype=bool)
    for token in range(vocab):
        noise = np.zeros(x.shape, dtype=np.float32)
        noise[:, token] = 1e6
        left[:, token] = choose(np, x, noise, temperature, top_k, top_p, min_p) == token
    return left


@pytest.mark.parametrize("vocab", [7, 61])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(4, 1.0, 0.0), (0, 0.83, 0.0), (0, 1.0, 0.07), (5, 0.71, 0.0), (6, 0.93, 0.11), (1, 0.3, 0.5)],
)
def test_the_filters_are_those_of_hugging_face(vocab, temperature, top_k, top_p, min_p):
    x = logits_of("smooth", vocab, seed=vocab + 5)
    theirs = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(x))
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    theirs = TopPLogitsWarper(top_p)(None, theirs)
    theirs = MinPLogitsWarper(min_p)(None, theirs)
    left = survivors(x, temperature, top_k, top_p, min_p)
    assert np.array_equal(left, torch.isfinite(theirs).numpy())


SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (0.0, 3, 0.5, 0.5),
    (1.0, 0, 1.0, 0.0),
    (0.8, 5, 1.0, 0.0),
    (1.3, 0, 0.77, 0.0),
    (1.0, 0, 1.0, 0.13),
    (0.6, 40, 0.91, 0.02),
]


@pytest.mark.parametrize("vocab", [7, 50, 5000])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["smooth", "negative", "banned"])
def test_the_choice_is_the_oracle_s(kind, setting, vocab):
    x = logits_of(kind, vocab, seed=vocab)
    for step in range(5):
        noise = gumbel(np, 9, step, np.arange(3, dtype=np.int32), vocab)
        expected = [oracle(*row, *setting) for row in zip(x, noise, strict=True)]
        assert choose(np, x, noise, *setting).tolist() == expected


JITTED = jax.jit(lambda *arrays: choose(jnp, *arrays))


def choice(xp, x, noise, setting):
    """[batch] by this library; under jit, with traced settings, for jax."""
    types = (np.float32, np.int32, np.float32, np.float32)
    settings = [xp.asarray(np.asarray(each, dtype=dtype)) for each, dtype in zip(setting, types, strict=True)]
    arrays = (xp.asarray(x), xp.asarray(noise), *settings)
    chosen = JITTED(*arrays) if xp is jnp else choose(xp, *arrays)
    assert chosen.dtype == xp.int32
    return np.asarray(chosen)


@pytest.mark.parametrize("xp", LIBRARIES[1:], ids=name)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["smooth", "ties", "signs", "banned"])
def test_the_choice_is_the_same_in_every_library(xp, kind, setting):
    x = logits_of(kind, 259, seed=21)
    for step in range(5):
        noise = gumbel(np, 4, step, np.arange(3, dtype=np.int32), 259)
        assert np.array_equal(choice(xp, x, noise, setting), choice(numpy_namespace, x, noise, setting))


def test_new_settings_do_not_recompile():
    x, noise = logits_of("smooth", 11, seed=2), np.zeros((3, 11), dtype=np.float32)
    traced = jax.jit(lambda *arrays: choose(jnp, *arrays))
    for setting in SETTINGS:
        traced(x, noise, *map(jnp.asarray, setting))
    assert traced._cache_size() == 1


@pytest.mark.parametrize("xp", LIBRARIES, ids=name)
def test_settings_differ_by_row(xp):
    x, noise = logits_of("smooth", 31, seed=6), gumbel(np, 1, 1, np.arange(3, dtype=np.int32), 31)
    rows = [(0.0, 0, 1.0, 0.0), (1.5, 3, 1.0, 0.0), (0.9, 0, 0.6, 0.1)]
    columns = [np.asarray(each) for each in zip(*rows, strict=True)]
    expected = [choice(numpy_namespace, x, noise, row)[place] for place, row in enumerate(rows)]
    assert choice(xp, x, noise, columns).tolist() == expected


@pytest.mark.parametrize("xp", LIBRARIES, ids=name)
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1.0])
def test_equal_logits_give_the_lowest_id(xp, temperature):
    x = np.asarray([[1, 5, 5, 0, 5]], dtype=np.float32)
    assert choice(xp, x, np.zeros_like(x), (temperature, 0, 1.0, 0.0)).tolist() == [1]


def test_a_filter_left_out_is_a_filter_that_is_off():
    x, noise = logits_of("ties", 50, seed=4), gumbel(np, 3, 0, np.arange(3, dtype=np.int32), 50)
    assert np.array_equal(choose(np, x, noise, 0.9), choose(np, x, noise, 0.9, 0, 1.0, 0.0))


def test_a_small_temperature_stays_finite():
    x = logits_of("smooth", 50, seed=4) * 1000
    noise = gumbel(np, 3, 0, np.arange(3, dtype=np.int32), 50)
    assert np.array_equal(choose(np, x, noise, 1e-15, 9, 0.9, 0.1), np.argmax(x, axis=-1))


def test_samples_follow_the_softmax():
    x = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], dtype=np.float32)).repeat(20_000, axis=0)
    noise = gumbel(np, 12, 0, np.arange(20_000, dtype=np.int32), 4)
    drawn = np.bincount(choose(np, x, noise, 1.0), minlength=4) / 20_000
    np.testing.assert_allclose(drawn, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_default_sampling_is_greedy():
    assert Sampling() == Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0)
    assert hash(Sampling(temperature=1)) == hash(Sampling(temperature=1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 2},
        {"min_p": True},
        {"seed": -1},
        {"seed": 2**32},
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_by_name(wrong):
    (field,) = wrong
    with pytest.raises(KvtwinError, match=rf"^{field} is .*; expected "):
        Sampling(**wrong)


@pytest.mark.parametrize("kind", [float, int])
@pytest.mark.parametrize("wrong", ["hot", None, True, [1]], ids=str)
def test_a_setting_of_the_wrong_type_is_refused(kind, wrong):
    """Called directly: under pytest the signature's own check comes first."""
    with pytest.raises(KvtwinError, match="^top_k is .*; expected one"):
        _check("top_k", wrong, kind, lambda x: x >= 0, "one")
