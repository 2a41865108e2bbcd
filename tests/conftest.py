"""What every test shares: libraries that start up quietly and answer the same way each time."""

import os
import sys
from collections.abc import Iterator

import pytest

# Read by the libraries when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Unoptimised XLA compiles in half the time; `make test-slow` runs the optimised code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The tensors of tests are tiny: handing them to a second thread takes ten times as long as the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def compiled_code_goes() -> Iterator[None]:
    """XLA maps about 200 pieces of memory for each function that it compiles, and a process may have 65,530."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
