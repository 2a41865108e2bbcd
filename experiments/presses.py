"""A way in from kvpress: an existing press scores a prompt on the torch backend, to be held against its port.

Torch only, and for that comparison only: a policy is array code for every backend, a press is a torch object that
reaches into Hugging Face's modules. Any object does that has kvpress' method `score(module, hidden_states, keys,
values, attentions, kwargs)`; kvpress itself is not needed. A press that fetches something by the model's name is to be
given it before. As with Hugging Face's models, a press does not know of sliding windows, soft-caps, or a query scale
other than 1 / sqrt(head_dim).

    scores = press_scores(model, press, tokens)
    positions = kept(scores, budget=64)
    _, cache = model.step(tokens, model.cache("random(budget=64)"), forced=positions)    # goes on from the press' cache
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from backends.torch.convert import to_numpy, widened
from backends.torch.decoder import Attention as Projections
from backends.torch.model import TorchModel
from framework.backend import Model
from framework.errors import KvtwinError
from framework.eviction import survivors
from framework.policy import attends
from framework.rope import angles
from framework.spec import Layer


class Projection(nn.Module):
    """A linear map with the norm of each head behind it, where the model has one: presses look for it by class."""

    def __init__(self, linear: nn.Linear, norm: nn.Module | None, head_dim: int):
        super().__init__()
        self.linear, self.norm, self.head_dim = linear, norm, head_dim

    @property
    def weight(self) -> torch.Tensor:
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y if self.norm is None else self.norm(y.unflatten(-1, (-1, self.head_dim))).flatten(-2)


@dataclass
class Attention:
    """What stands in for Hugging Face's attention module: what presses ask it for."""

    layer_idx: int
    layer: Layer
    config: SimpleNamespace
    q_proj: Projection
    k_proj: Projection
    v_proj: nn.Linear
    o_proj: nn.Module

    @property
    def head_dim(self) -> int:
        return self.layer.head_dim

    @property
    def num_key_value_groups(self) -> int:
        return self.layer.group

    def rotary_emb(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [batch, positions, head_dim], each half of the channels the same, in the dtype of `x`."""
        shape = (*position_ids.shape, self.head_dim // 2)
        cos, sin = np.ones(shape), np.zeros(shape)
        if self.layer.rope is not None:
            cos, sin = angles(self.layer.rope, position_ids.cpu().numpy())
        both = (torch.from_numpy(np.concatenate([one, one], -1)) for one in (cos, sin))
        first, second = (one.to(device=x.device, dtype=x.dtype) for one in both)
        return first, second


def projections(block: Projections) -> list[nn.Linear]:
    """The maps of a layer to queries, keys and values, which the model holds as one."""
    joined = block.query_key_value
    weights = [part.flatten(1).T for part in block.split(joined.weight.T)]
    biases = [None] * 3 if joined.bias is None else [part.flatten() for part in block.split(joined.bias)]
    made = []
    for weight, bias in zip(weights, biases, strict=True):
        one = nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
        one.weight = nn.Parameter(weight, requires_grad=False)
        one.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        made.append(one)
    return made


def stand_in(model: TorchModel, index: int, eager: bool) -> Attention:
    """The module of one layer."""
    layer, block = model.spec.layers[index], model.decoder.layers[index].attention
    if layer.rope is not None and layer.rope.dim != layer.head_dim:
        raise KvtwinError(
            f"layer {index} rotates {layer.rope.dim} of {layer.head_dim} channels; presses expect all to be rotated"
        )
    config = SimpleNamespace(
        num_attention_heads=layer.heads,
        num_key_value_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        hidden_size=model.spec.dim,
        num_hidden_layers=len(model.spec.layers),
        _attn_implementation="eager" if eager else "sdpa",
    )
    query, key, value = projections(block)
    norms = [getattr(block, norm, None) for norm in ("query_norm", "key_norm")]
    return Attention(
        index, layer, config, Projection(query, norms[0], layer.head_dim),
        Projection(key, norms[1], layer.head_dim), value, block.output,
    )  # fmt: skip


def attentions_of(queries: torch.Tensor, keys: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The model's own attention weights [batch, heads, tokens, tokens], which eager attention hands to presses."""
    wide = widened(keys).repeat_interleave(layer.group, dim=1)
    logits = widened(queries) @ wide.transpose(2, 3) * layer.scale
    if layer.softcap is not None:
        logits = torch.tanh(logits / layer.softcap) * layer.softcap
    here = torch.arange(keys.shape[2], device=keys.device)
    seen = attends(here[:, None], here[None, :], layer.window)
    return logits.where(seen, -torch.inf).softmax(-1).to(keys.dtype)


def press_scores(
    model: Model, press: Any, tokens: Int[np.ndarray, "batch tokens"], attentions: bool = False
) -> list[Float[np.ndarray, "batch kv_heads tokens"]]:
    """What a press scores each token of a prompt, per layer. `attentions` hands it the attention weights, as eager
    attention does; otherwise it gets None.
    """
    if not isinstance(model, TorchModel):
        raise KvtwinError(
            f"a press runs on the torch backend; expected its model, not {type(model).__name__}"
        )
    if (np.asarray(tokens) < 0).any():
        raise KvtwinError("presses know no padding; expected prompts of one length, without -1")
    taps: dict[str, np.ndarray] = {}
    model.step(tokens, logits=None, taps=taps)
    return [
        _scored(model, press, taps, index, attentions, np.asarray(tokens).shape)
        for index in range(len(model.spec.layers))
    ]


@torch.inference_mode()
def _scored(
    model: TorchModel,
    press: Any,
    taps: dict[str, np.ndarray],
    index: int,
    eager: bool,
    shape: tuple[int, ...],
) -> np.ndarray:
    module, at = stand_in(model, index, eager), f"layers.{index}"

    def tapped(name: str) -> torch.Tensor:
        return torch.from_numpy(taps[f"{at}.{name}"]).to(device=model.device, dtype=model.kind)

    hidden = tapped("attention_norm")
    queries, keys, values = (
        tapped(f"attention.{name}").transpose(1, 2) for name in ("query_rotated", "key_rotated", "value")
    )
    here = torch.arange(shape[1], device=model.device)
    kwargs = {
        "hidden_states": hidden,
        "position_embeddings": module.rotary_emb(hidden, here[None]),
        "cache_position": here,
    }
    weights = attentions_of(queries, keys, module.layer) if eager else None
    scores = press.score(module, hidden, keys, values, weights, kwargs)
    expected = (shape[0], module.layer.kv_heads, shape[1])
    if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != expected:
        came = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise KvtwinError(
            f"{type(press).__name__} scored {came} in layer {index}; expected a tensor {expected}: "
            "one number per (batch, kv_heads, tokens)"
        )
    return to_numpy(widened(scores))


def kept(
    scores: Sequence[Float[np.ndarray, "batch kv_heads tokens"]], budget: int
) -> list[Int[np.ndarray, "batch kv_heads budget"]]:
    """Positions that stay by these scores, per layer, in order; of equal scores the newer, where presses take any."""
    return [
        survivors(xp, each, None, np.ones(each.shape, bool), np.full(each.shape[:2], budget), budget)
        for each in scores
    ]
