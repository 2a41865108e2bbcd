"""Records what hqq makes of groups, for tests/framework/test_hqq.py. Run by hand, in an environment of its own.

Where hqq is installed, transformers imports it, and it torch's compiler: two seconds more in each process, and a
warning of torch, which is an error in tests. Its installation also runs `python setup_cuda.py install` with the first
python of the path, unless it is told not to:

    python -m venv /tmp/hqq
    DISABLE_CUDA=1 /tmp/hqq/bin/pip install hqq==0.2.8.post1 torch==2.13.0 \\
        --extra-index-url https://download.pytorch.org/whl/cpu
    /tmp/hqq/bin/python tests/hqq/record.py tests/hqq/recorded.npz

Recorded without hqq's optimiser, which moves zeros until the error is small, and is no formula.
"""

import sys

import numpy as np
import torch
from hqq.core.quantize import Quantizer

GROUP = 64


def groups() -> np.ndarray:
    """[60 64]: of many sizes; from 20 on far from 0; at 40 equal numbers, and from 41 on of less and less range."""
    random = np.random.default_rng(0)
    x = random.standard_normal((60, GROUP)) * 10.0 ** random.integers(-1, 5, (60, 1))
    x[20:40] += random.uniform(-8, 8, (20, 1)) * np.ptp(x[20:40], axis=1, keepdims=True)
    x[40] = -1.7
    x[41:] *= 10.0 ** np.linspace(-2, -6, 19)[:, None] / np.ptp(x[41:], axis=1, keepdims=True)
    return x.astype(np.float32)


def recorded(x: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Codes, scales, zeros and what is read, by name."""
    packed, meta = Quantizer.quantize(
        torch.from_numpy(x), nbits=bits, group_size=GROUP, optimize=False, axis=1, device="cpu"
    )
    codes = Quantizer.unpack[meta["packing"]](packed, dtype=torch.uint8)
    read = Quantizer.dequantize(packed, meta | {"compute_dtype": torch.float32})
    parts = {"codes": codes, "scales": meta["scale"][:, 0], "zeros": meta["zero"][:, 0], "read": read}
    return {f"{name}{bits}": part.numpy() for name, part in parts.items()}


if __name__ == "__main__":
    numbers = groups()
    np.savez_compressed(sys.argv[1], x=numbers, **recorded(numbers, 4), **recorded(numbers, 2))
