"""A run of flax over four devices, in a process of its own: `python -m tests.sharded OUT CASE...` writes what it found.

jax fixes the number of its devices when it starts, so that the tests, which run on one, start this and compare.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from backends import backends
from framework.backend import Model
from framework.cache import Cache
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

DEVICES = 4
STEPS, MORE = 2, 5
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"

# Every axis has another size, and the vocabulary divides by two devices, not by four.
LAYERS = tuple(
    Layer(heads=12, kv_heads=4, head_dim=8, scale=8**-0.5, rope=Rope(theta=500.0, dim=8), window=window)
    for window in (None, 10)
)
SPEC = ModelSpec(
    family="llama", vocab=70, dim=20, ffn=28, layers=LAYERS, norm_eps=1e-5, positions=512, qkv_bias=True
)


@dataclass(frozen=True)
class Case:
    """A policy and a codec over a mesh, `shape` by `axes`, with as many rows."""

    policy: str
    codec: str = "full()"
    shape: tuple[int, ...] = (2, 2)
    axes: tuple[str, ...] = ("batch", "heads")
    rows: int = 6

    @property
    def devices(self) -> dict[str, int]:
        """Devices along both axes."""
        return {"batch": 1, "heads": 1} | dict(zip(self.axes, self.shape, strict=True))


CASES = {
    "overwritten": Case("h2o(budget=8)"),
    "in groups": Case("snapkv(budget=9, window=3, kernel=3)", "kivi(group=2, residual=4)", (1, 4), rows=3),
    "all kept": Case("full()", shape=(2,), axes=("heads",), rows=3),
}
SLOW = {
    "one set": Case("tova(budget=9)", "int8()", (4,), ("batch",), rows=8),
    "heads that differ": Case("adakv(budget=9, policy=snapkv(window=3, kernel=3))", shape=(4, 1), rows=8),
    "layers that differ": Case("cake(budget=9, policy=snapkv(window=3, kernel=3), window=3)"),
    "random": Case("random(budget=9)", "kvquant(bits=2, group=2, residual=2)", (1, 2), rows=3),
    "keys against keys": Case("keydiff(budget=9, interval=3)", "turboquant()"),
    "rotated by rank": Case("reposition(budget=9, policy=snapkv(window=3, kernel=3))"),
    "merged": Case("d2o(budget=9, policy=h2o())"),
    "read in a stream": Case(
        "compactor(budget=9, sinks=2, recent=3, chunk=5, sketch=3)", shape=(2, 1), rows=6
    ),
    "again": Case("h2o(budget=8)", "unbias(codec=kivi(bits=4, group=8, residual=8, regroup=True))"),
}
STEPPED = ("overwritten", "in groups")  # each head by itself, and looked at more closely


@cache
def texts(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, SPEC.vocab, (rows, 40), dtype=np.int32)


def prompt(rows: int) -> np.ndarray:
    """Ragged, padded on the right, and in row 1 on the left."""
    tokens = texts(rows)[:, :21].copy()
    tokens[0, 13:] = -1
    tokens[1, :4] = -1
    return tokens


def built(backend: str, mesh: Any = None) -> Model:
    return backends.get(backend).build(SPEC, random_weights(SPEC, 3), "float64", mesh=mesh)


def run(model: Model, case: Case) -> tuple[dict[str, np.ndarray], Cache]:
    """Prompt, single steps, sampled tokens; and what the cache then holds."""
    found: dict[str, np.ndarray] = {}
    logits, cache = model.step(
        prompt(case.rows), model.cache(case.policy, case.codec, case.rows), logits="all"
    )
    found["prompt"] = logits
    for step in range(STEPS):
        logits, cache = model.step(texts(case.rows)[:, 21 + step :][:, :1], cache)
        found[f"step.{step}"] = logits
    found["tokens"], found["after"], cache = model.decode(
        cache, logits[:, 0], Sampling(temperature=0.8, top_k=30, seed=5), (), MORE
    )
    return found | held(cache), cache


def held(cache: Cache) -> dict[str, np.ndarray]:
    """Kept sets, and all that the cache stores."""
    shot = cache.snapshot()
    found = {"seen": shot.seen, "dropped": shot.dropped}
    for index, layer in enumerate(shot.layers):
        found[f"kept.{index}"] = layer.positions
        for kind in ("streams", "memory", "heads", "tables"):
            found |= {f"{kind}.{index}.{key}": value for key, value in getattr(layer, kind).items()}
    return found


def lives(model: Model, rows: int, folder: Path) -> dict[str, np.ndarray]:
    """What a cache holds once it was copied, reordered, rolled back, saved and read again, and went on."""
    _, cache = model.step(texts(rows)[:, :7], model.cache(batch=rows), logits=None)
    cache.fork().rows([2, 0, 1]).roll_back(2).save(folder / "cache")
    logits, cache = model.step(texts(rows)[:, :1], model.restore(folder / "cache"))
    return held(cache) | {"logits": logits}


def listened(model: Model, rows: int) -> dict[str, np.ndarray]:
    """Values inside the model, a decision, and the gradients of a second pass."""
    taps: dict[str, np.ndarray] = {}
    decisions: list[Any] = []
    cache = model.cache("h2o(budget=8)", batch=rows)
    _, cache = model.step(prompt(rows), cache, logits="all", taps=taps, decisions=decisions)
    slopes = model.gradients(texts(rows)[:, 3:9], cache)
    return taps | {"chosen": decisions[-1].kept[..., :8], "gradients": np.stack(slopes)}


def in_its_own_process(out: Path, names: list[str]) -> subprocess.CompletedProcess:
    """This program on as many devices, with the flags that the tests run under."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.sharded", str(out), *names],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def mesh_of(case: Case) -> Any:
    import jax

    count = int(np.prod(case.shape))
    return jax.make_mesh(case.shape, case.axes, devices=jax.devices()[:count])


def shapes(tree: Any) -> list[tuple[str, list[int], list[int]]]:
    """The name of each array, its shape, and what a device has of it."""
    import jax

    return [
        (jax.tree_util.keystr(path), list(x.shape), list(x.sharding.shard_shape(x.shape)))
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def decode_step(model: Any, case: Case) -> dict[str, Any]:
    """What passes between devices in a compiled decode step, and how much of the cache's share it reuses."""
    import jax

    from backends.flax import decode

    _, cache = model.step(prompt(case.rows), model.cache(case.policy, case.codec, case.rows), logits=None)
    cache = model.ready(cache, 1)
    with jax.enable_x64(True):
        made = decode.single.lower(
            model.skeleton, cache.plan, model.leaves, model.given(cache, 30), cache.state,
            texts(case.rows)[:, 0], np.array(1, np.int32),
        ).compile()  # fmt: skip
    share = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(cache.state)
    )
    passes = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", made.as_text())
    return {
        "passes": [(kind, re.findall(r"\w+\[([\d,]*)\]", what)) for what, kind in passes],
        "reused": made.memory_analysis().alias_size_in_bytes,
        "share": share,
    }


def refusals() -> dict[str, str]:
    """What is said where a mesh does not fit."""
    import jax

    def mesh(*shape: int, axes: tuple[str, ...] = ("batch", "heads")) -> Any:
        return jax.make_mesh(shape, axes, devices=jax.devices()[: int(np.prod(shape))])

    from dataclasses import replace

    three = replace(SPEC, ffn=27)
    weights, flax = random_weights(SPEC, 3), backends.get("flax")
    tries: dict[str, Callable[[], Any]] = {
        "kv heads": lambda: built("flax", mesh(1, 3)),
        "ffn": lambda: flax.build(three, random_weights(three, 3), mesh=mesh(2, 2)),
        "axes": lambda: built("flax", mesh(2, 2, axes=("batch", "model"))),
        "batch": lambda: built("flax", mesh(2, 2)).cache(batch=3),
        "rows": lambda: built("flax", mesh(2, 2)).cache(batch=4).rows([0, 1, 2]),
        "prompts": lambda: built("flax", mesh(2, 2)).generate("one"),
        "joint": lambda: flax.build(SPEC, weights, mesh=mesh(1, 2)).cache("full()", "exl3()", 2),
        "type": lambda: built("flax", [0, 1]),
        "reference": lambda: built("reference", mesh(1, 2)),
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = ""
        except KvtwinError as error:
            said[name] = str(error)
    return said


def main(out: Path, names: list[str]) -> None:
    from flax import nnx

    facts: dict[str, Any] = {}
    for name in names:
        case = {**CASES, **SLOW}[name]
        model: Any = built("flax", mesh_of(case))
        found, cache = run(model, case)
        if name == "all kept":
            found |= {f"lives.{key}": value for key, value in lives(model, case.rows, out).items()}
        if name == "random":
            found |= {f"listened.{key}": value for key, value in listened(model, case.rows).items()}
        np.savez(out / f"{name}.npz", **found)
        facts[name] = {
            "cache": shapes(cache.state),
            "parameters": shapes(nnx.state(model.decoder)),
            "bytes": vars(cache.bytes),
            "step": decode_step(model, case) if name in STEPPED else None,
        }
    facts["refusals"] = refusals() if "overwritten" in names else {}
    (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
