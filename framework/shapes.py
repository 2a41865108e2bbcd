"""Names of the axes that every signature uses, and the sizes that buffers are rounded to.

Axis order: residual `batch tokens dim`; attention `batch heads tokens head_dim`; cache `batch kv_heads slots
head_dim`; scores `batch kv_heads slots`. `position -1` marks an empty slot.
"""

EMPTY = -1


def bucket(size: int, least: int = 8) -> int:
    """`size` rounded up so that few different sizes occur and at most a quarter is waste.

    Each power of two is cut into four steps: 8, 16, 24, ..., 64, 80, 96, 112, 128, 160, ... A compiled function is
    compiled once per bucket, not once per size.
    """
    size = max(size, 1)
    grain = max(least, 1 << max(size - 1, 1).bit_length() >> 3)
    return -(-size // grain) * grain
