"""kvtwin's own backends as an engine: `python -m experiments.engines.kvtwin torch`, or `flax`.

A full cache is filled with random keys and values, since time does not depend on them; under a policy or a codec the
context is read, 1,024 tokens at a time, and evicted after each.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np

from backends import backends
from experiments.benches.case import FLOAT, FULL, Case
from experiments.engines.protocol import Block, Program, serve
from experiments.engines.settling import settle_jax, settle_torch
from framework.backend import Model
from framework.cache import Cache
from framework.decode import Sampling
from framework.eviction import resolved
from framework.generate import prefill
from framework.policy import policies

CHUNK = 1024
# Steps off the clock: buffers that a copy of a cache has too small grow in one, and in a few a GPU's graph is made.
AHEAD, AHEAD_ON_GPU = 1, 5


class Kvtwin(Program):
    """One backend."""

    def __init__(self, name: str):
        self.backend = backends.get(name)
        self.settle = settle_jax if name == "flax" else settle_torch
        self.ahead = AHEAD
        self.model: Model

    def load(self, folder: str, dtype: str = FLOAT) -> None:
        self.model = self.backend.load(folder, dtype)
        device = getattr(self.model, "device", None)
        self.ahead = AHEAD_ON_GPU if device is not None and device.type == "cuda" else AHEAD
        self.settle()

    def prepare(self, case: Case) -> Block:
        return {"decode": self._decode, "prefill": self._prefill, "start": self._start}[case.kind](case)

    def _tokens(self, case: Case) -> np.ndarray:
        random = np.random.default_rng(0)
        return random.integers(0, self.model.spec.vocab, (case.batch, case.context))

    def _decode(self, case: Case) -> Block:
        cache = self._filled(case) if (case.policy, case.codec) == (FULL, FULL) else self._read(case)

        def fresh() -> Cache:
            return self._decoded(cache.fork(), self.ahead)

        facts = {"cache_bytes": float(cache.bytes.capacity)}
        return Block(lambda copy: self._decoded(copy, case.steps), fresh, facts, self.settle)

    def _decoded(self, cache: Cache, steps: int) -> Cache:
        logits = np.zeros((cache.batch, self.model.spec.vocab), np.float32)
        return self.model.decode(cache, logits, Sampling(), (), steps)[2]

    def _read(self, case: Case) -> Cache:
        rows, made = self._tokens(case).tolist(), policies.make(case.policy)
        evict: Literal["prompt", "chunk"] = "chunk" if made.evicts else "prompt"
        # As generate does.
        return prefill(self.model, rows, None, made, case.codec, case.steps + self.ahead, CHUNK, evict)[0]

    def _filled(self, case: Case) -> Cache:
        """A full cache as if it had seen the context."""
        random, held = np.random.default_rng(0), self.model.cache(batch=case.batch).snapshot()
        layers = []
        for layer, empty in zip(self.model.spec.layers, held.layers, strict=True):
            shape = (case.batch, layer.kv_heads, case.context)
            streams = {
                name: random.standard_normal((*shape, layer.head_dim), np.float32) for name in empty.streams
            }
            positions = np.broadcast_to(np.arange(case.context, dtype=np.int32), shape)
            layers.append(replace(empty, streams=streams, positions=positions))
        seen = np.full(case.batch, case.context, np.int32)
        cache = self.model.restore(replace(held, layers=tuple(layers), seen=seen))
        # Fixed buffers get the room for a block, and give it back with what is in it.
        room = case.steps + self.ahead
        return self._decoded(cache, room).roll_back(room)

    def _prefill(self, case: Case) -> Block:
        tokens, policy = self._tokens(case), resolved(policies.make(case.policy), case.context)

        def work(cache: Cache) -> tuple[np.ndarray, Cache]:
            logits, cache = self.model.step(tokens, cache)
            return logits[:, -1:].argmax(-1), cache

        return Block(work, lambda: self.model.cache(policy, case.codec, case.batch), settle=self.settle)

    def _start(self, case: Case) -> Block:
        rows = self._tokens(case).tolist()
        return Block(lambda _: self.model.generate(rows, max_new_tokens=1, stop=()))


if __name__ == "__main__":
    serve(partial(Kvtwin, sys.argv[1]))
