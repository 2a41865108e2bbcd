"""What every test shares: libraries that start up quietly and answer the same way each time."""

import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

# Read by the libraries when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Unoptimised XLA compiles in half the time; `make test-slow` runs the optimised code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What is compiled is counted here, and would fill the user's folder for caches.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
# The tensors of tests are tiny: handing them to a second thread takes ten times as long as the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# These assert for tests: a failure shows the values.
pytest.register_assert_rewrite("tests.hooked", "tests.ragged", "tests.scored", "tests.trajectories")

MAPS = Path("/proc/self/maps")
MANY = 30_000
TESTS = count(1)


def forget() -> None:
    """Let go of what jax has compiled: a function takes about 200 maps of memory, and a process may have 65,530."""
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module", autouse=True)
def compiled_code_goes() -> Iterator[None]:
    """Between modules, which share little."""
    yield
    forget()


@pytest.fixture(autouse=True)
def compiled_code_stays_within_bounds() -> Iterator[None]:
    """Within a module of many compilations."""
    yield
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        forget()
