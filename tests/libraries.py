"""The array libraries, and one function run in all of them: what tests of codecs share."""

from collections.abc import Callable
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import jax
import jax.numpy
import numpy as np

LIBRARIES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "numpy": (array_api_compat.numpy, np.asarray),
    "torch": (array_api_compat.torch, array_api_compat.torch.asarray),
    "jax": (jax.numpy, jax.numpy.asarray),
}
Arrays = dict[str, np.ndarray]


def everywhere(
    f: Callable[..., dict[str, Any]], *arrays: np.ndarray, eager: bool = True
) -> dict[str, Arrays]:
    """What `f(xp, *arrays)` makes, by library; jax twice, as it goes, unless `eager` is False, and compiled."""
    made = {
        name: f(xp, *(array(np.array(each)) for each in arrays))
        for name, (xp, array) in LIBRARIES.items()
        if eager or name != "jax"
    }
    made["jit"] = jax.jit(lambda *arrays: f(jax.numpy, *arrays))(*arrays)
    return {name: {part: np.asarray(x) for part, x in parts.items()} for name, parts in made.items()}


def same_bytes(made: dict[str, Arrays]) -> Arrays:
    """The arrays of NumPy, once those of all others are found to be the same byte by byte."""
    expected = made["numpy"]
    for library, parts in made.items():
        assert set(parts) == set(expected)
        for name, part in parts.items():
            assert (part.dtype, part.shape) == (expected[name].dtype, expected[name].shape), (library, name)
            np.testing.assert_array_equal(
                np.ascontiguousarray(part).view(np.uint8),
                np.ascontiguousarray(expected[name]).view(np.uint8),
                err_msg=f"{library} {name}",
            )
    return expected
