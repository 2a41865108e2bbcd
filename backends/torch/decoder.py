"""The decoder's modules in torch, with canonical parameter names."""

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn import functional

from backends.torch.convert import widened
from backends.torch.linear import Linear, Wide, local, many
from framework.spec import Layer, ModelSpec

BLOCK = 1024  # rows at a time: arrays of so many stay below 32 MiB


class RmsNorm(nn.Module):
    """RMSNorm, computed in at least float32."""

    def __init__(self, dim: int, eps: float, offset: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps, self.offset = eps, offset

    def forward(self, x: Float[torch.Tensor, "*axes dim"]) -> Float[torch.Tensor, "*axes dim"]:
        if x.is_cuda and not self.offset:
            return self.fused(x)
        # On a CPU functional.rms_norm takes seven times as long, for 2,048 rows of 896.
        wide = widened(x)
        weight = widened(self.weight) + self.offset if self.offset else widened(self.weight)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * weight).to(x.dtype)

    def fused(self, x: Float[torch.Tensor, "*axes dim"]) -> Float[torch.Tensor, "*axes dim"]:
        """The same in one kernel of a GPU, without an offset."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Projections of one layer; what happens between them is the cache's and `attention`'s."""

    def __init__(self, spec: ModelSpec, layer: Layer, cores: int):
        super().__init__()
        self.layer = layer
        rows = layer.kv_heads * (layer.group + 2) * layer.head_dim
        self.query_key_value = Linear(spec.dim, rows, spec.qkv_bias, cores)
        self.output = Linear(layer.heads * layer.head_dim, spec.dim, spec.output_bias, cores)
        if spec.query_key_norm:
            self.query_norm = RmsNorm(layer.head_dim, spec.norm_eps, spec.norm_offset)
            self.key_norm = RmsNorm(layer.head_dim, spec.norm_eps, spec.norm_offset)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [.. kv_heads group head_dim], keys and values [.. kv_heads head_dim] of what is joined on the last
        axis."""
        heads = x.unflatten(-1, (self.layer.kv_heads, self.layer.group + 2, self.layer.head_dim))
        return heads[..., :-2, :], heads[..., -2, :], heads[..., -1, :]


class FeedForward(nn.Module):
    """Gated feed-forward (arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, cores: int):
        super().__init__()
        self.gate_up = Wide(spec.dim, 2 * spec.ffn, spec.ffn_bias, cores, least=2)
        self.down = Linear(spec.ffn, spec.dim, spec.ffn_bias, cores)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x: Float[torch.Tensor, "*axes dim"]) -> Float[torch.Tensor, "*axes dim"]:
        if not many(x):
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)
        return torch.cat([self._block(rows) for rows in x.flatten(0, -2).split(BLOCK)]).view_as(x)

    def _block(self, rows: Float[torch.Tensor, "rows dim"]) -> Float[torch.Tensor, "rows dim"]:
        """The same part by part, so that what is between is small.

        The C library asks the system for larger pieces of memory each time anew, and clearing their pages takes longer
        than to write them: whole, 2,048 rows of 4,864 gates took 19 ms where in place they take 5.
        """
        half = self.gate_up.parts // 2
        parts = [
            self.activation(self.gate_up.part(rows, index)) * self.gate_up.part(rows, half + index)
            for index in range(half)
        ]
        return self.down(torch.cat(parts, dim=-1))


class DecoderLayer(nn.Module):
    """One layer of the decoder."""

    def __init__(self, spec: ModelSpec, layer: Layer, cores: int):
        super().__init__()
        self.attention_norm = RmsNorm(spec.dim, spec.norm_eps, spec.norm_offset)
        self.attention = Attention(spec, layer, cores)
        self.ffn_norm = RmsNorm(spec.dim, spec.norm_eps, spec.norm_offset)
        self.ffn = FeedForward(spec, cores)
        if spec.post_norms:
            self.attention_post_norm = RmsNorm(spec.dim, spec.norm_eps, spec.norm_offset)
            self.ffn_post_norm = RmsNorm(spec.dim, spec.norm_eps, spec.norm_offset)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head, for a machine with so many cores."""

    def __init__(self, spec: ModelSpec, cores: int):
        super().__init__()
        self.table = None if spec.tied else nn.Embedding(spec.vocab, spec.dim)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer, cores) for layer in spec.layers)
        self.norm = RmsNorm(spec.dim, spec.norm_eps, spec.norm_offset)
        self.head = Wide(spec.dim, spec.vocab, False, cores)

    def embed(self, tokens: Int[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes dim"]:
        """The embedding of each token."""
        if self.table is None:
            return self.head.rows(tokens)
        return functional.embedding(tokens, local(self.table.weight))


ACTIVATIONS = {"silu": functional.silu, "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh")}
