"""The decode loop in torch: choose a token, step with it, until every row has stopped."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import array_api_compat.numpy
import array_api_compat.torch as xp
import numpy as np
import torch

from backends.torch import static
from backends.torch.cache import TorchCache
from backends.torch.convert import to_numpy, to_torch, widened
from backends.torch.static import settings
from framework.decode import Sampling, choose
from framework.random import gumbel
from framework.shapes import EMPTY

if TYPE_CHECKING:
    from backends.torch.model import TorchModel


@torch.inference_mode()
def decode(
    model: "TorchModel",
    cache: TorchCache,
    logits: np.ndarray,
    sampling: Sampling,
    stop: Sequence[int],
    steps: int,
    first: int = 0,
    active: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, TorchCache]:
    """See `framework.backend.Model.decode`."""
    if cache.pending:
        nothing = np.full((cache.batch, 1), EMPTY, np.int32)
        _, cache = model.step(nothing, cache, logits=None, phase="prefill")
    if model.device.type == "cuda" and static.qualifies(model, cache, steps):
        return static.decode(model, cache, logits, sampling, stop, steps, first, active)
    going = np.ones(cache.batch, bool) if active is None else np.array(active)
    out = np.full((cache.batch, steps), -1, np.int32)
    current = to_torch(logits, device=model.device)
    knobs = settings(sampling)
    rows = np.arange(cache.batch)
    for step in range(steps):
        if not going.any():
            break
        if sampling.temperature == 0:
            chosen = to_numpy(current.argmax(-1).to(torch.int32))
        else:
            # NumPy's noise: torch lacks the unsigned arithmetic.
            noise = gumbel(array_api_compat.numpy, sampling.seed, first + step, rows, model.spec.vocab)
            chosen = to_numpy(choose(xp, current.float(), to_torch(noise, device=model.device), *knobs))
        out[:, step] = np.where(going, chosen, -1)
        host = out[:, step : step + 1]
        fresh, cache = model.advance(to_torch(host, device=model.device), host, cache, "last", "decode")
        current = torch.where(to_torch(going, device=model.device)[:, None], widened(fresh[:, 0]), current)
        going &= ~np.isin(chosen, list(stop))
    return out, to_numpy(current), cache
