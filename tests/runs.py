"""One small model with key biases, a long ragged text in calls of all kinds, and a cache after it, per backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from backends import backends
from framework.backend import Model
from framework.cache import Cache
from framework.codec import Codec
from framework.codecs.centred import Centred
from framework.codecs.int8 import Int8
from framework.codecs.kivi import Kivi
from framework.codecs.kvquant import Kvquant
from framework.codecs.think import Think
from framework.codecs.unbias import Unbias
from framework.compare import drift
from framework.weights import Weights, random_weights
from tests.twins import column, hybrid_spec, prompts, snapshot_drift, texts, unchecked

SPEC = hybrid_spec(qkv_bias=True)  # the second layer has a window
LENGTHS = (13, 16, 9)  # one compiled shape: flax lays prompts out in steps of 16 tokens
STEPS = 64

TWO = Kivi(group=2, residual=4)
AGAIN = Kivi(bits=4, group=8, residual=8, regroup=True)
BEFORE = Kvquant(group=4, residual=4)  # keys before their rotation
UNBIASED = Unbias(codec=TWO)
BOTH = Unbias(codec=Kvquant(bits=2, group=2, residual=2))
ODD = Kivi(bits=4, group=3, residual=6)  # of 8 channels: a shorter last group of values
LONG = Kivi(group=4, residual=16)  # longer than the window, so that tokens go before they are coded
THINK = Think(channels=5, window=3, residual=4)
CENTRED = Centred(codec=Int8(), group=5, residual=6)  # two groups a block
OFTEN = Kivi(group=4, residual=4, regroup=True)


@dataclass(frozen=True)
class Call:
    """What a step is given."""

    tokens: np.ndarray
    phase: Literal["prefill", "decode"] = "decode"
    evict: bool = True


@cache
def weights() -> Weights:
    return random_weights(SPEC, 3, np.float32)


@cache
def model(backend: str, dtype: str = "float64") -> Model:
    return backends.get(backend).build(SPEC, weights(), dtype)


def text(steps: int = STEPS) -> list[Call]:
    """A prompt and then steps. In a long one the prompt comes in two calls, rows are silent for a while, and some calls
    have several tokens; of a short one flax compiles little."""
    prompt = prompts(LENGTHS)
    if steps < STEPS // 2:
        return [Call(prompt, "prefill"), *(Call(column(step, LENGTHS)) for step in range(steps))]
    calls = [Call(prompt[:, :7], "prefill", evict=False), Call(prompt[:, 7:], "prefill")]
    at = np.array(LENGTHS)
    for step in range(steps):
        many = (3, 1, 2) if step % 21 == 13 else (1, 5 if step == 15 else 1, 1)
        given = np.where([step in (30, 50), 4 <= step < 15, False], 0, many)
        calls.append(Call(taken(at, given)))
        at = at + given
    return calls


def taken(at: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The next tokens of each row, padded on the right."""
    wide = np.arange(max(1, given.max()))
    every = texts(len(at))[np.arange(len(at))[:, None], at[:, None] + wide]
    return np.where(wide < given[:, None], every, -1)


def went(runner: Model, cache: Cache, calls: Sequence[Call]) -> tuple[list[np.ndarray], Cache]:
    """The logits of each call, and the cache after them."""
    found = []
    with unchecked():
        for call in calls:
            logits, cache = runner.step(call.tokens, cache, logits="all", phase=call.phase, evict=call.evict)
            found.append(logits)
    return found, cache


def begun(backend: str, policy: str, codec: Codec, steps: int = STEPS) -> tuple[list[np.ndarray], Cache]:
    """The logits of each call of `text`, and the cache after it."""
    runner = model(backend)
    return went(runner, runner.cache(policy, codec, len(LENGTHS)), text(steps))


@cache
def right(policy: str, codec: Codec, steps: int = STEPS) -> tuple[list[np.ndarray], Cache]:
    """What the reference makes of it; fork() before going on."""
    return begun("reference", policy, codec, steps)


def apart(found: tuple[list[np.ndarray], Cache], expected: tuple[list[np.ndarray], Cache]) -> float:
    """The largest drift of logits and of what the caches hold; infinite where positions or codes differ."""
    ours, theirs = found[1].snapshot(), expected[1].snapshot()
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for key, x in other.streams.items():
            if x.dtype != one.streams[key].dtype or (x != one.streams[key]).any():
                return np.inf
        if any(x.shape != one.tables[key].shape for key, x in other.tables.items()):
            return np.inf
    worst = max(drift(one, other) for one, other in zip(found[0], expected[0], strict=True))
    return max(worst, snapshot_drift(found[1], expected[1]))
