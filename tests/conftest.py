"""What every test shares: libraries that start up quietly and answer the same way each time."""

import os
from collections.abc import Iterator

import pytest

# Read by the libraries when they are first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Unoptimised XLA compiles in half the time; `make test-slow` runs the optimised code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# The tensors of tests are tiny: handing them to a second thread takes ten times as long as the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def plain_xla() -> Iterator[None]:
    """XLA without its optimisations, which halves the time to compile: the same program, for what runs it briefly."""
    import jax

    before = jax.config.jax_disable_most_optimizations
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
