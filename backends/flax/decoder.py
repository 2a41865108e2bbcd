"""The decoder's modules in Flax NNX, with canonical parameter names."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Shaped

from backends.flax.convert import wide, widened
from framework.spec import ModelSpec

Weights = dict[str, jax.Array]


def in_shares(name: str, x: Shaped[np.ndarray, "..."], shares: int) -> Shaped[np.ndarray, "..."]:
    """A tensor of `framework.fused` as the modules of so many devices have it: the rows of `gate_up` stand by device,
    its gates and then its ups. On an axis of their own they would be copied at each step."""
    if ".gate_up." not in name or shares == 1:
        return x
    return x.reshape(2, shares, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


class Linear(nnx.Module):
    """x W^T + b, with the weight [out, in]."""

    def __init__(self, weights: Weights, at: str):
        self.weight = nnx.Param(weights[f"{at}.weight"])
        bias = weights.get(f"{at}.bias")
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[jax.Array, "*axes inside"]) -> Float[jax.Array, "*axes out"]:
        weight = self.weight[...]
        y = jax.lax.dot_general(
            x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=wide(x.dtype)
        ).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...]


class RmsNorm(nnx.Module):
    """RMSNorm, computed in at least float32."""

    def __init__(self, weights: Weights, at: str, spec: ModelSpec):
        self.weight = nnx.Param(weights[f"{at}.weight"])
        self.eps, self.offset = spec.norm_eps, spec.norm_offset

    def __call__(self, x: Float[jax.Array, "*axes dim"]) -> Float[jax.Array, "*axes dim"]:
        full = widened(x)
        full = full * jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + self.eps)
        return (full * (widened(self.weight[...]) + self.offset)).astype(x.dtype)


class Attention(nnx.Module):
    """Projections of one layer, as `framework.fused` joins them; what happens between them is the cache's and
    `attention`'s."""

    def __init__(self, weights: Weights, at: str, spec: ModelSpec):
        self.query_key_value = Linear(weights, f"{at}.query_key_value")
        self.output = Linear(weights, f"{at}.output")
        if spec.query_key_norm:
            self.query_norm = RmsNorm(weights, f"{at}.query_norm", spec)
            self.key_norm = RmsNorm(weights, f"{at}.key_norm", spec)


class FeedForward(nnx.Module):
    """Gated feed-forward (arXiv 2002.05202), in the `shares` of as many devices."""

    def __init__(self, weights: Weights, at: str, spec: ModelSpec, shares: int):
        self.gate_up = Linear(weights, f"{at}.gate_up")
        self.down = Linear(weights, f"{at}.down")
        self.activation, self.shares = spec.activation, shares

    def __call__(self, x: Float[jax.Array, "*axes dim"]) -> Float[jax.Array, "*axes dim"]:
        gate, up = jnp.unstack(self.gate_up(x).reshape(*x.shape[:-1], self.shares, 2, -1), axis=-2)
        y = ACTIVATIONS[self.activation](gate) * up
        return self.down(y.reshape(*x.shape[:-1], -1))


class DecoderLayer(nnx.Module):
    """One layer of the decoder."""

    def __init__(self, weights: Weights, at: str, spec: ModelSpec, shares: int):
        self.attention_norm = RmsNorm(weights, f"{at}.attention_norm", spec)
        self.attention = Attention(weights, f"{at}.attention", spec)
        self.ffn_norm = RmsNorm(weights, f"{at}.ffn_norm", spec)
        self.ffn = FeedForward(weights, f"{at}.ffn", spec, shares)
        if spec.post_norms:
            self.attention_post_norm = RmsNorm(weights, f"{at}.attention_post_norm", spec)
            self.ffn_post_norm = RmsNorm(weights, f"{at}.ffn_post_norm", spec)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and head; the weights are `in_shares`."""

    def __init__(self, weights: Weights, spec: ModelSpec, shares: int = 1):
        self.embed = nnx.Param(weights["embed.weight"])
        self.layers = nnx.List(
            [DecoderLayer(weights, f"layers.{index}", spec, shares) for index in range(len(spec.layers))]
        )
        self.norm = RmsNorm(weights, "norm", spec)
        self.head = None if spec.tied else Linear(weights, "head")


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}
