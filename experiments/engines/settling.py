"""Waiting until a library has done what it has begun."""


def settle_torch() -> None:
    """Wait for a GPU; on a CPU torch returns when the work is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def settle_jax() -> None:
    """Wait for what jax has begun, which it does not do by itself."""
    import jax

    for each in jax.live_arrays():
        each.block_until_ready()
