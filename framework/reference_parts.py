"""What the reference decoder is made of, in NumPy: norm, rotation, softmax, activations."""

import numpy as np

from framework.rope import angles
from framework.spec import Rope


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, offset: float) -> np.ndarray:
    """RMSNorm (arXiv 1910.07467)."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (weight + offset)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotary embedding of [..., tokens, head_dim]: channel i turns with channel i + half."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def turned(rope: Rope | None, length: int | None, x: np.ndarray, where: np.ndarray) -> np.ndarray:
    """[tokens heads head_dim] rotated to these positions."""
    if rope is None:
        return x
    cos, sin = angles(rope, where, length)
    return rotate(x, cos[:, None], sin[:, None])


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}
