"""Attention is cut up in a way that suits the device, and gives the same in each."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from backends.flax.attention import ON_CPU, ON_GPU, STEP, Way, attention, usual
from backends.flax.convert import precision
from framework.compare import drift
from framework.spec import Layer


def made(tokens: int, slots: int) -> tuple[Any, ...]:
    """Queries, keys, values and positions: a row with padding, empty slots, and the tokens of the call last."""
    random = np.random.default_rng([tokens, slots])
    q = random.standard_normal((2, 3, 2, tokens, 6))
    k, v = random.standard_normal((2, 3, slots, 6)), random.standard_normal((2, 3, slots, 6))
    at = np.arange(slots - tokens, slots, dtype=np.int32)[None].repeat(2, 0)
    at[1, : tokens // 4] = -1
    held = np.broadcast_to(np.arange(slots, dtype=np.int32), (2, 3, slots)).copy()
    held[:, 1, ::5] = -1
    held[:, :, slots - tokens :] = at[:, None]
    return q, k, v, at, held


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize(
    ("tokens", "slots", "way"),
    [(1, 2 * STEP + 3, ON_GPU), (70, 90, Way(128, False)), (70, 90, Way(16, False))],
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (33, 1.5)])
def test_every_way_gives_the_same(
    tokens: int, slots: int, way: Way, window: int | None, softcap: float | None, with_sums: bool
) -> None:
    layer = Layer(heads=6, kv_heads=3, head_dim=6, scale=0.4, rope=None, window=window, softcap=softcap)
    given = made(tokens, slots)
    assert ON_CPU.block < tokens or ON_CPU.in_turn != way.in_turn
    with precision("float64"):
        mine, theirs = (
            jax.jit(lambda *x, way=each: attention(*x, layer, with_sums, way=way))(*given)
            for each in (way, replace(ON_CPU))
        )
    assert drift(np.asarray(mine[0]), np.asarray(theirs[0])) <= 1e-12
    assert np.abs(np.asarray(mine[0])[:, :, :, -1]).min() > 0
    assert (mine[1] is not None) == with_sums
    for one, other in zip(mine[1:], theirs[1:], strict=True):
        assert not with_sums or drift(np.asarray(one), np.asarray(other)) <= 1e-12


def test_the_usual_way_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert usual() is ON_GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert usual() is ON_CPU


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", "highest"), ("float64", "highest"), ("bfloat16", None)]
)
def test_float32_is_not_rounded_to_tf32(dtype: str, expected: str | None) -> None:
    with precision(dtype):
        assert jax.config.jax_default_matmul_precision == expected
