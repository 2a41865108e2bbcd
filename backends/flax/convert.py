"""Where NumPy meets jax: the only place that turns one into the other, and the precision that a call runs in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

PAGE = 2**21  # bytes of a large page
DTYPES = {"float32": jnp.float32, "float64": jnp.float64, "bfloat16": jnp.bfloat16}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """64-bit types exist inside for float64 and only then; products of a float32 model are not rounded to TF32.

    Outside of it jax casts a float64 array down without a word, so every call of a model runs inside.
    """
    exact = None if dtype == "bfloat16" else "highest"
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision(exact):
        yield


def to_jax(x: np.ndarray, dtype: Any = None) -> jax.Array:
    """The array on the device, cast in NumPy so that nothing is compiled."""
    return jax.device_put(np.array(x, dtype=dtype))


def parameter(x: np.ndarray, dtype: Any, sharding: NamedSharding | None = None) -> jax.Array:
    """The array for many reads: on a CPU a large one begins where a large page of memory can, unless it is to lie on
    several devices.

    XLA's own buffers lie in pages of 4 KiB; NumPy asks the system for large ones, which it can have where they fit.
    """
    kind = np.dtype(dtype)
    if sharding is not None:
        return jax.device_put(np.array(x, kind), sharding)
    size = x.size * kind.itemsize
    if size < 4 * PAGE:
        return to_jax(x, kind)
    room = np.empty(size + PAGE, np.uint8)
    start = -room.ctypes.data % PAGE
    held = room[start : start + size].view(kind).reshape(x.shape)
    np.copyto(held, x, casting="unsafe")
    return jax.device_put(held, may_alias=True)


def to_numpy(x: jax.Array) -> np.ndarray:
    """A NumPy copy; bfloat16 as ml_dtypes.bfloat16."""
    return np.array(x)


def widened(x: jax.Array) -> jax.Array:
    """The array in at least float32."""
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def wide(dtype: Any) -> Any:
    """The dtype in which a model of this dtype keeps numbers that add up: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
