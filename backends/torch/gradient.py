"""How much each layer's attention matters for the output: autograd through the model's own layers."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch.utils.checkpoint import checkpoint

from backends.torch.cache import TorchCache
from backends.torch.convert import to_numpy, to_torch, widened
from backends.torch.pages import opened
from backends.torch.rope import next_positions
from framework.policies.window import Window
from framework.rope import check_reach, ropes

if TYPE_CHECKING:
    from backends.torch.model import TorchModel


def gradients(model: "TorchModel", host: np.ndarray, cache: TorchCache) -> list[np.ndarray]:
    """See `framework.backend.Model.gradients`. Zeros are added to what attention gives, and differentiated by."""
    before, after = cache.seen, cache.admit((host >= 0).sum(1))
    for rope in ropes(model.spec):
        check_reach(rope, int(after.max()) - 1, cache.length)
        model.tables.grow(rope, cache.length, int(after.max()))
    with torch.inference_mode(False), torch.enable_grad():
        tokens, start, seen, question = (
            to_torch(x, device=model.device) for x in (host, before, after, cache.question)
        )
        rows = {"seen": seen, "question": question}
        x = model.decoder.embed(tokens.clamp(min=0)) * model.spec.embed_scale
        added = [torch.zeros_like(x, requires_grad=True) for _ in model.spec.layers]
        for index, nothing in enumerate(added):
            # A layer is run again when its gradient is due: only its input is held until then.
            x = checkpoint(
                _layer, model, index, x, nothing, tokens, start, rows, cache,
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        total = torch.where((tokens >= 0)[..., None], widened(x).square(), 0).sum()
        return [to_numpy(widened(each)) for each in torch.autograd.grad(total, added)]


def _layer(
    model: "TorchModel",
    index: int,
    x: Float[torch.Tensor, "batch tokens dim"],
    added: Float[torch.Tensor, "batch tokens dim"],
    tokens: Int[torch.Tensor, "batch tokens"],
    start: Int[torch.Tensor, "batch"],
    rows: dict[str, Int[torch.Tensor, "batch"]],
    cache: TorchCache,
) -> Float[torch.Tensor, "batch tokens dim"]:
    """One layer over its part of the cache, which stays as it is: appending to what has no room makes new tensors."""
    held = opened(cache.layers[index])
    full = {key: value[:, :, : held.fill] for key, value in held.streams.items()}
    positions = held.positions[:, :, : held.fill]
    layers = list(cache.layers)
    layers[index] = replace(held, streams=full, positions=positions, memory={}, heads={}, queries=None)
    silent = replace(cache, layers=layers, policy=Window(reposition=cache.policy.repositions))
    block = model.decoder.layers[index]
    new = next_positions(tokens >= 0, start)
    y, _, _ = model._attend(
        block,
        index,
        x,
        tokens,
        new,
        model.turns(new, silent),
        start,
        rows,
        silent,
        single=False,
        phase="pass",
    )
    return model._rest(block, index, x, y + added)
