"""TurboQuant: the codebook by its two conditions, the rotation as a product of matrices, codes one by one, distortion,
and inner products over seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from framework.codec import codecs, decoded
from framework.errors import KvtwinError
from framework.lloyd_max import codebook
from framework.packing import unpack
from framework.random import hash32
from framework.random_rotation import matrix, restored, rotated, stretch
from framework.short_norm import short_norm
from framework.spec import Layer
from tests.libraries import LIBRARIES, everywhere, same_bytes

NUMPY = LIBRARIES["numpy"][0]
MAX = {
    1: 0.3634,
    2: 0.1175,
    3: 0.03454,
    4: 0.009497,
}  # squared errors for a normal number (Max 1960, table I)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("width", [24, 80, 128])
def test_a_code_is_the_mean_of_its_cell_and_a_bound_halfway(width, bits):
    means, bounds = codebook(width, bits)
    assert (len(means), len(bounds)) == (2**bits, 2**bits - 1)
    np.testing.assert_allclose(bounds, (means[1:] + means[:-1]) / 2, atol=1e-8)
    edges = np.concatenate([[-1.0], (means[1:].astype(float) + means[:-1]) / 2, [1.0]])
    shape = (width - 1) / 2
    mass = np.diff(stats.beta(shape, shape, loc=-1, scale=2).cdf(edges))
    # The integral of x (1 - x^2)^(shape - 1) is -(1 - x^2)^shape / (2 shape).
    factor = math.exp(math.lgamma(width / 2) - math.lgamma(shape)) / math.sqrt(math.pi)
    moment = np.diff(-((1 - edges**2) ** shape) / (2 * shape)) * factor
    np.testing.assert_allclose(means, moment / mass, atol=2e-6)


def test_a_wide_codebook_is_that_of_the_normal_distribution():
    known = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}  # Max 1960, table I
    for bits, levels in known.items():
        means = codebook(4096, bits)[0] * 64
        np.testing.assert_allclose(means, [-each for each in reversed(levels)] + levels, rtol=1e-3)


def by_matrices(width, stream):
    """The rotation as three products each of signs, Hadamard blocks and, in blocks, a permutation."""
    size = next(2**power for power in range(20, -1, -1) if width % 2**power == 0)
    whole = np.eye(width)
    for number in range(3):
        place = np.arange(number * width, (number + 1) * width, dtype=np.int32)
        signs = [-1.0 if each % 2 else 1.0 for each in hash32(NUMPY, *stream, 0, place)]
        block = np.array([[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
        whole = whole @ np.diag(signs) @ np.kron(np.eye(width // size), block) / np.sqrt(size)
        if size < width:
            keys = hash32(NUMPY, *stream, 1, place)
            whole = whole[:, sorted(range(width), key=lambda each, keys=keys: keys[each])]
    return whole


@pytest.mark.parametrize("width", [64, 80])
@pytest.mark.parametrize("stream", [(0, 0), (5, 1)])
def test_the_rotation_is_a_product_of_matrices_and_comes_back(width, stream):
    wanted = by_matrices(width, stream)
    np.testing.assert_allclose(wanted @ wanted.T, np.eye(width), atol=1e-12)
    np.testing.assert_allclose(matrix(width, stream), wanted, atol=1e-7)
    x = np.random.default_rng(1).standard_normal((2, 3, width))
    np.testing.assert_allclose(rotated(NUMPY, x, stream) / stretch(width), x @ wanted, atol=1e-12)
    np.testing.assert_allclose(restored(NUMPY, x, stream) / stretch(width), x @ wanted.T, atol=1e-12)


def test_the_rotation_is_the_same_on_every_machine():
    row = [20, -12, 28, -4, -20, 12, -12, 20, -4, -20, 4, 20, 20, 4, -4, -20]
    np.testing.assert_array_equal(matrix(16, (0, 0))[0] * 64, row)


@pytest.mark.parametrize("width", [40, 64])
def test_norms_are_the_nearest_from_every_library(width):
    random = np.random.default_rng(3)
    x = random.standard_normal((400, width)) * 10.0 ** random.integers(-9, 6, (400, 1))
    x[0] = 0
    x[1:40] = 0
    x[1:20, 3] = 1024.5 + np.arange(19)  # halfway between two
    x[20:24, 0] = 65504, 65519.996, 65520, 65536
    x[24:26, 5] = 1e30, 1e-30
    x[26:30, 0] = 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 3 * 2.0**-24
    middles = random.integers(1024, 2047, (200, 1)) + 0.5  # between two float16 numbers, up to a rounding
    x[200:] *= middles / np.linalg.norm(x[200:], axis=-1, keepdims=True)
    x = x.astype(np.float32)
    got = same_bytes(everywhere(lambda xp, x: {"norms": short_norm(xp, x)}, x))["norms"]
    for row in range(400):
        with np.errstate(over="ignore"):
            square = x[row] * x[row]
            while len(square) > 1:
                square = np.append(square, np.zeros(len(square) % 2, np.float32))
                square = square[: len(square) // 2] + square[len(square) // 2 :]
            root = math.sqrt(square[0])
            wanted = np.float16(root)
        if root % 1 == 0.5:  # of two equally near the smaller
            wanted = np.float16(root - 0.5)
        if row == 22:
            wanted = 65504
        if row == 26:
            wanted = 0
        if row == 28:
            wanted = np.float16(2.0**-24)
        assert got[row, 0] == wanted, (row, root)
    assert np.isinf(got[23:25]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_of_what_is_not_finite_is_infinite(bad):
    x = np.ones((3, 8), np.float32)
    x[1, 2] = bad
    for xp, array in LIBRARIES.values():
        assert np.isinf(np.asarray(short_norm(xp, array(x)))).ravel().tolist() == [False, True, False]


def test_numbers_that_are_almost_nothing_have_the_same_codes_everywhere():
    x = (np.random.default_rng(6).standard_normal((1, 2, 63, 64)) * 1e-41).astype(np.float32)
    for slot in range(63):
        x[:, :, slot, slot : slot + 2] = 1  # they cancel, and leave less than 2^-126
    codec = codecs.make("turboquant(bits=2)")
    same_bytes(everywhere(lambda xp, x: codec.encode(xp, x, "keys"), x, eager=False))


def unit_vectors(count, width, seed=0):
    x = np.random.default_rng(seed).standard_normal((1, 1, count, width))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def there_and_back(text, x, side="keys"):
    codec = codecs.make(text)
    return decoded(codec, NUMPY, codec.encode(NUMPY, x, side), side, np.float32)


@pytest.mark.parametrize("bits", MAX)
def test_distortion_of_unit_vectors_is_that_of_the_paper(bits):
    x = unit_vectors(120, 1024)
    back = there_and_back(f"turboquant(bits={bits})", x)
    assert np.sum((back - x) ** 2, axis=-1).mean() == pytest.approx(MAX[bits], rel=0.03)


@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("bits", [2, 4])
def test_one_channel_alone_loses_no_more(width, bits):
    x = np.eye(width, dtype=np.float32)[None, None]
    lost = [
        np.sum((there_and_back(f"turboquant(bits={bits}, seed={seed})", x) - x) ** 2, axis=-1).mean()
        for seed in range(6)
    ]
    assert np.mean(lost) == pytest.approx(MAX[bits], rel=0.12)


@pytest.mark.parametrize(("residual", "side"), [(False, "keys"), (True, "keys"), (True, "values")])
def test_codes_are_the_nearest_in_the_book(residual, side):
    width, bits, seed = 80, 3, 4
    x = np.random.default_rng(2).standard_normal((2, 3, 5, width)).astype(np.float32) * 30
    codec = codecs.make(f"turboquant(bits={bits}, seed={seed}, residual={residual})")
    parts = same_bytes(everywhere(lambda xp, x: codec.encode(xp, x, side), x))
    codes = unpack(NUMPY, parts["codes"], bits)
    depth = bits - 1 if residual and side == "keys" else bits
    means = codebook(width, depth)[0].astype(float)
    norms = parts["scales"].astype(float)
    np.testing.assert_allclose(norms[..., 0], np.linalg.norm(x, axis=-1), rtol=2**-11)
    unit = x.astype(float) @ by_matrices(width, (seed, 0)) / norms
    distance = np.abs(unit[..., None] - means)
    near = np.sort(distance, axis=-1)
    clear = near[..., 1] - near[..., 0] > 1e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal((codes % 2**depth)[clear], np.argmin(distance, axis=-1)[clear])
    rebuilt = means[codes % 2**depth]
    assert ("residuals" in parts) == (depth < bits)
    if depth < bits:
        left = unit - rebuilt
        length = np.linalg.norm(left, axis=-1, keepdims=True)
        np.testing.assert_allclose(parts["residuals"], length, rtol=2**-10)
        turned = left @ by_matrices(width, (seed, 1))
        clear = np.abs(turned) > 1e-5
        np.testing.assert_array_equal((codes >> depth)[clear], (turned > 0)[clear])
        signs = np.where(codes >> depth, 1.0, -1.0)
        mean = np.abs(unit_vectors(20_000, width)[..., 0]).mean()
        rebuilt = rebuilt + signs @ by_matrices(width, (seed, 1)).T * length / (width * mean)
    back = rebuilt @ by_matrices(width, (seed, 0)).T * norms
    got = decoded(codec, NUMPY, parts, side, np.float32)
    assert np.abs(got - back).max() < 0.02 * np.abs(back).max()
    assert np.linalg.norm(got - x) < 0.5 * np.linalg.norm(x)


def test_inner_products_are_right_on_average_over_seeds_with_the_residual():
    width, seeds = 64, 150
    random = np.random.default_rng(8)
    keys = random.standard_normal((1, 1, 6, width)).astype(np.float32)
    keys[..., 3] += 12  # an outlier channel
    queries = keys[0, 0] + random.standard_normal((6, width))
    exact = np.sum(queries * keys[0, 0], axis=-1)
    found = {
        residual: np.array(
            [
                np.sum(
                    queries
                    * there_and_back(f"turboquant(bits=2, seed={seed}, residual={residual})", keys)[0, 0],
                    axis=-1,
                )
                for seed in range(seeds)
            ]
        )
        for residual in (False, True)
    }
    apart = (found[True].mean(axis=0) - exact) / (found[True].std(axis=0) / np.sqrt(seeds))
    assert np.abs(apart).max() < 3.5
    assert np.abs(found[True].mean(axis=0) / exact - 1).max() < 0.03
    assert (found[False].mean(axis=0) < 0.93 * exact).all()


@pytest.mark.parametrize("text", ["bits=0", "bits=7", "bits=1, residual=True"])
def test_bits_that_there_are_not_are_refused(text):
    with pytest.raises(KvtwinError, match="expected an integer from"):
        codecs.make(f"turboquant({text})")


@pytest.mark.parametrize(("head_dim", "fits"), [(20, False), (36, False), (40, True), (80, True)])
def test_head_dim_is_a_multiple_of_8(head_dim, fits):
    layer = Layer(heads=4, kv_heads=2, head_dim=head_dim, scale=1.0, rope=None)
    assert (codecs.make("turboquant()").unfit(layer) is None) == fits
