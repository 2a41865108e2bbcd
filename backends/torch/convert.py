"""Where NumPy meets torch: the only place that turns one into the other."""

import ml_dtypes
import numpy as np
import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def to_torch(
    x: np.ndarray, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """A tensor with its own memory, cast to `dtype` if given."""
    x = np.ascontiguousarray(x)
    if x.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(x.copy())
    return tensor.to(device=device, dtype=dtype)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """The tensor as NumPy; bfloat16 as ml_dtypes.bfloat16."""
    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return x.numpy().copy()


def widened(x: torch.Tensor) -> torch.Tensor:
    """The tensor in at least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
