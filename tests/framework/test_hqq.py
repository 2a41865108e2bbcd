"""The judge hqq on `quanto`: what it made of the same groups without its optimiser, as tests/hqq recorded it."""

from pathlib import Path

import numpy as np
import pytest

from framework.codec import codecs
from framework.packing import unpack
from tests.libraries import LIBRARIES

RECORDED = Path(__file__).parents[1] / "hqq" / "recorded.npz"
NUMPY = LIBRARIES["numpy"][0]
ULP = 2.0**-23  # of float32
LEAST = 1 / 2e4  # the scale that hqq lets no other be smaller than


def both(bits):
    """The groups, codes of hqq, its scales and zeros, what it reads; and codes, scales, shifts and numbers of ours."""
    with np.load(RECORDED) as file:
        x, *theirs = (
            file[name] for name in ("x", f"codes{bits}", f"scales{bits}", f"zeros{bits}", f"read{bits}")
        )
    codec = codecs.make(f"quanto(bits={bits})")
    parts = codec.encode(NUMPY, x, "keys")
    codes, read = unpack(NUMPY, parts["codes"], bits), codec.read(NUMPY, parts, "keys")
    return x, theirs, (codes, parts["scales"][:, 0], parts["shifts"][:, 0], read)


@pytest.mark.parametrize("bits", [4, 2])
def test_codes_are_those_of_hqq(bits):
    """It multiplies by the inverse of the scale, then adds the shift in steps: the same but for the last bits."""
    x, theirs, ours = both(bits)
    wide = np.ptp(x, axis=1) > (2**bits - 1) * LEAST
    assert np.sum(wide) >= 46
    codes, scales, zeros, read = (each[wide] for each in theirs)
    np.testing.assert_array_equal(ours[0][wide], codes)
    np.testing.assert_allclose(ours[1][wide], scales, rtol=1.5 * ULP)
    np.testing.assert_allclose(ours[2][wide], zeros * scales, rtol=1.5 * ULP)
    apart = np.max(np.abs(ours[3][wide] - read), axis=1)
    assert np.max(apart / np.max(np.abs(x[wide]), axis=1)) < 3 * ULP


@pytest.mark.parametrize("bits", [4, 2])
def test_groups_of_little_range_have_all_codes_here_and_few_there(bits):
    """Its scale is 1/20000 at least, and 1 for a range up to 1/10000; ours is the range over 2^bits - 1 as ever."""
    x, (codes, scales, *_), (found, steps, _, read) = both(bits)
    span = np.ptp(x, axis=1)
    narrow, least = (span > 1e-4) & (span < (2**bits - 1) * LEAST), span <= 1e-4
    np.testing.assert_allclose(scales[narrow], LEAST, rtol=ULP)
    np.testing.assert_array_equal(scales[least], 1)
    assert least[40]
    assert (steps[40], scales[40]) == (0, 1)
    np.testing.assert_array_equal(read[40], x[40])
    for row in np.flatnonzero(narrow | least & (span > 0)):
        above = x[row].astype(float) - np.min(x[row])
        np.testing.assert_array_equal(codes[row], np.round(above / scales[row]))
        assert np.max(codes[row]) < np.max(found[row]) == 2**bits - 1
        assert steps[row] == pytest.approx(span[row] / (2**bits - 1), rel=2 * ULP)
