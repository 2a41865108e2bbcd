"""The same calls on a model of one process and on one that is spread over two: what each gave, as NumPy.

As a program, `python -m tests.spread RANK FOLDER`, one of the two processes: it reads `cases.pickle` in the folder and
leaves `RANK.pickle` there.
"""

import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from backends import backends
from framework.backend import Model
from framework.cache import Cache, Decision
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.policy import policies
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

PROCESSES = 2
LENGTHS = (13, 17, 9)
ROPE = Rope(theta=500.0, dim=6)


def spec_of(kind: str) -> ModelSpec:
    """A model whose vocabulary does not divide: "tied" has biases, "free" a table, more norms and soft-caps,
    "pairs" two kv heads."""
    numbers = {"vocab": 301, "dim": 20, "ffn": 28, "norm_eps": 1e-5, "positions": 512, "family": "llama"}
    if kind == "pairs":
        return ModelSpec(layers=(Layer(6, 2, 6, 0.4, ROPE),) * 2, **numbers)
    if kind == "tied":
        biases = {"qkv_bias": True, "output_bias": True, "ffn_bias": True}
        layers = tuple(Layer(12, 4, 6, 6**-0.5, ROPE, window=window) for window in (None, 12))
        return ModelSpec(layers=layers, tied=True, **biases, **numbers)
    layers = (Layer(8, 4, 8, 0.5, ROPE, softcap=3.0), Layer(4, 4, 8, 0.4, None))
    extras = {"post_norms": True, "query_key_norm": True, "logit_softcap": 5.0, "embed_scale": 1.5}
    return ModelSpec(layers=layers, **extras, **numbers)


def model_of(kind: str, mesh: Any = None, spec: ModelSpec | None = None, dtype: str = "float64") -> Model:
    """The model with its random weights, the same in every process."""
    spec = spec or spec_of(kind)
    return backends.get("torch").build(spec, random_weights(spec, 5, np.float64), dtype, mesh=mesh)


def tokens_of(rows: int, columns: int) -> np.ndarray:
    """Random ids, the same each time."""
    return np.random.default_rng(11).integers(0, 301, (rows, columns), dtype=np.int32)


def prompts() -> np.ndarray:
    """A ragged prompt, padded on the right."""
    wide = max(LENGTHS)
    return np.where(np.arange(wide) < np.array(LENGTHS)[:, None], tokens_of(3, wide), -1)


def stepped(model: Model, policy: str, codec: str = "full()") -> dict[str, Any]:
    """A prompt in two calls, steps in which rows are silent or bring several tokens, and a decode loop of each kind."""
    cache, found = model.cache(policy, codec, 3), {}
    every = tokens_of(3, 40)
    calls: list[tuple[np.ndarray, str, bool]] = [
        (prompts()[:, :7], "prefill", False),
        (prompts()[:, 7:], "prefill", True),
    ]
    calls += [(np.where(np.array([[True], [False], [True]]), every[:, 20:21], -1), "decode", True)]
    calls += [(every[:, 21:24], "decode", True)]
    calls += [(every[:, column : column + 1], "decode", True) for column in (25, 26)]
    decisions: list[Decision] = []
    for number, (given, phase, evict) in enumerate(calls):
        logits, cache = model.step(
            given, cache, logits="all", phase=phase, evict=evict, decisions=decisions if number == 1 else None
        )
        found[f"logits {number}"] = logits
        found |= {f"kept {number}.{layer}": kept for layer, kept in enumerate(cache.kept)}
    for each in decisions:
        found |= {f"decision {each.layer} {key}": getattr(each, key) for key in ("scores", "kept", "budget")}
    last = logits[:, -1]
    for kind, sampling in (
        ("greedy", Sampling()),
        ("sampled", Sampling(temperature=0.9, top_p=0.95, seed=3)),
    ):
        new, last, cache = model.decode(cache, last, sampling, [7], 4)
        found |= {f"{kind} tokens": new, f"{kind} logits": last}
    return found | held(cache)


def held(cache: Cache) -> dict[str, Any]:
    """What a cache holds, by name."""
    found: dict[str, Any] = {"seen": cache.seen, "dropped": cache.last_eviction}
    for index, layer in enumerate(cache.snapshot().layers):
        every = layer.streams | layer.memory | layer.heads | {"positions": layer.positions}
        every |= {} if layer.queries is None else {"queries": layer.queries}
        found |= {f"held {index}.{key}": value for key, value in every.items()}
    return found


def generated(model: Model, policy: str, **options: Any) -> dict[str, Any]:
    """Text behind prompts of three lengths."""
    rows = [row[row >= 0].tolist() for row in prompts()]
    out = model.generate(rows, policy=policy, max_new_tokens=4, temperature=0.7, seed=2, stop=[], **options)
    return {"tokens": np.array(out.tokens)} | held(out.cache)


def lives(model: Model, folder: Path) -> dict[str, Any]:
    """Saved, restored, forked, cut into rows and rolled back; taps; one set forced on the policy."""
    _, cache = model.step(prompts(), model.cache("h2o(budget=8)", batch=3), phase="prefill")
    cache.save(folder / "h2o")
    new = tokens_of(3, 30)[:, 29:]
    again, other = model.step(new, model.restore(folder / "h2o"))
    fork, rows = cache.fork(), cache.rows([2, 0])
    taps: dict[str, np.ndarray] = {}
    straight, cache = model.step(new, cache, taps=taps)
    found = {"straight": straight, "restored": again, "rows": model.step(new[[2, 0]], rows)[0]}
    found |= {f"restored {key}": value for key, value in held(other).items()}
    found |= {f"tap {key}": value for key, value in taps.items()}
    chosen = [np.tile(np.array([0, 2, 5], np.int32), (3, layer.kv_heads, 1)) for layer in model.spec.layers]
    _, cache = model.step(np.full((3, 1), -1), fork, phase="prefill", forced=chosen)
    found |= {f"forced {index}": kept for index, kept in enumerate(cache.kept)}
    _, cache = model.step(prompts(), model.cache(batch=3))
    _, cache = model.step(new, cache)
    found["back"], cache = model.step(new, cache.roll_back(1))
    return found | held(cache)


def occupied(model: Any) -> dict[str, Any]:
    """What this process holds: bytes of parameters that are spread, of the others, and of a cache; and the parameters
    as the mesh knows them."""
    _, cache = model.step(prompts(), model.cache("window(budget=8)", batch=3))
    every = dict(model.decoder.named_parameters())
    spread = {name: x for name, x in every.items() if isinstance(x, DTensor)}
    return {
        "spread": sum(x.to_local().untyped_storage().nbytes() for x in spread.values()),
        "others": sum(x.untyped_storage().nbytes() for name, x in every.items() if name not in spread),
        "names": sorted(spread),
        "parameters": {name: x.full_tensor().numpy() for name, x in spread.items()},
        "bytes": asdict(cache.bytes),
        "keys": sum(layer.streams["keys"].untyped_storage().nbytes() for layer in cache.layers),
    }


def refusal(act: Callable[[], Any]) -> str:
    """What a call is refused with."""
    try:
        act()
    except KvtwinError as error:
        return str(error)
    return "not refused"


def refusals(model: Model, mesh: DeviceMesh, folder: Path) -> dict[str, str]:
    """What a mesh cannot do, by name; all processes go on from each."""
    one = Layer(3, 3, 6, 0.4, None)
    narrow = ModelSpec("llama", 301, 20, 28, (one,), 1e-5, 512)
    odd = ModelSpec("llama", 301, 20, 27, (Layer(4, 4, 6, 0.4, None),), 1e-5, 512)
    wide = model_of("", mesh, ModelSpec("llama", 301, 20, 28, (Layer(4, 4, 16, 0.4, None),), 1e-5, 512))
    cache = model.cache(codec="int8()", batch=1)
    weights = random_weights(model.spec, 5, np.float64)
    weights["layers.0.attention.value.weight"][0] = np.inf  # of the first process's first head
    broken = backends.get("torch").build(model.spec, weights, "float64", mesh=mesh)
    acts: dict[str, Callable[[], Any]] = {
        "heads": lambda: model_of("", mesh, narrow),
        "ffn": lambda: model_of("", mesh, odd),
        "names": lambda: model_of("tied", init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))),
        "two": lambda: model_of("tied", init_device_mesh("cpu", (1, 2), mesh_dim_names=("batch", "heads"))),
        "no mesh": lambda: model_of("tied", 2),
        "kvgrad": lambda: model.cache("kvgrad(budget=9)"),
        "gradients": lambda: model.gradients(tokens_of(1, 4), cache),
        "kivi": lambda: wide.cache(codec="kivi(group=2, residual=4)"),
        "joint": lambda: wide.cache(codec="exl2_q4()"),
        "save": lambda: cache.save(folder / "none" / "cache"),
        "uncodable": lambda: broken.step(tokens_of(1, 4), broken.cache(codec="int8()")),
    }
    return {key: refusal(act) for key, act in acts.items()}


def answers(cases: Sequence[tuple[str, ...]], mesh: Any, folder: Path) -> dict[tuple[str, ...], Any]:
    """What each case gives."""
    models = {kind: model_of(kind, mesh) for kind in ("tied", "free", "pairs")}
    found: dict[tuple[str, ...], Any] = {}
    for case in cases:
        what, kind, *rest = case
        model = models[kind]
        if what == "stepped":
            found[case] = stepped(model, *rest)
        elif what == "generated":
            found[case] = generated(model, rest[0], **OPTIONS[rest[1]])
        elif what == "lives":
            found[case] = lives(model, folder)
        elif what == "memory":
            found[case] = occupied(model)
        elif what == "rows":  # a mesh with a dimension more, along which each process has rows of its own
            both = (
                init_device_mesh("cpu", (PROCESSES, 1), mesh_dim_names=("batch", "heads")) if mesh else None
            )
            found[case] = stepped(model_of(kind, both and both["heads"]), *rest)
        else:
            found[case] = refusals(model, mesh, folder)
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "question": {"question": [5, 9, 2]},
    "chunks": {"question": [5, 9, 2], "chunk": 6, "evict": "chunk"},
}


def examples() -> list[tuple[str, ...]]:
    """Every example of every policy that needs no gradients."""
    every = (policies.spelling(each) for name in policies.names() for each in policies.get(name).examples())
    kinds = {each: "pairs" if "sink_recent" in each else "tied" for each in every if "kvgrad" not in each}
    return [("stepped", kind, each) for each, kind in kinds.items()]


def main(rank: int, folder: Path) -> None:
    """One process: the cases that stand in `cases.pickle`."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=PROCESSES,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("heads",))
    cases = pickle.loads((folder / "cases.pickle").read_bytes())
    found = answers(cases, mesh, folder)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
