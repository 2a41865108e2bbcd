"""Files of arrays that a policy needs beside a model's weights: written once from calibration text, read with checks.

A file is safetensors with one array per layer and says which model it belongs to. `random:SEED` stands for a file of
random unit vectors: the control that any calibrated direction should beat.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from framework.errors import KvtwinError
from framework.random import normal
from framework.spec import ModelSpec

FORMAT = "kvtwin-filters-1"
RANDOM = "random:"

Filters = dict[str, Float[np.ndarray, "kv_heads head_dim"]]


def fingerprint(spec: ModelSpec) -> str:
    """What tells one model's numbers from another's."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:16]


def digest_of(path: str | os.PathLike) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_filters(path: str | os.PathLike, filters: Mapping[str, np.ndarray], spec: ModelSpec) -> str:
    """Write one direction per layer and kv head, whole or not at all; returns the file's digest."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    facts = {"format": FORMAT, "model": fingerprint(spec)}
    try:
        arrays = {key: np.ascontiguousarray(value, np.float32) for key, value in filters.items()}
        save_file(arrays, temporary, metadata={"kvtwin": json.dumps(facts)})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise KvtwinError(f"cannot write the filters to {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest_of(target)


def read_filters(path: str, digest: str, spec: ModelSpec) -> Filters:
    """The filters of this model; another model's, another digest or a damaged file is refused."""
    if path.startswith(RANDOM):
        return _random(path, spec)
    if not path:
        raise KvtwinError(
            'q_filter has no path; expected the file that `kvtwin filters MODEL TEXT --out FILE` writes, or "random:0"'
        )
    if not Path(path).is_file():
        raise KvtwinError(f"no filters at {path!r}; `kvtwin filters MODEL TEXT --out {path}` writes them")
    if digest and digest_of(path) != digest:
        raise KvtwinError(f"{path} has the digest {digest_of(path)}; expected {digest}")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("kvtwin", "{}"))
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise KvtwinError(f"{path} is not a readable file of filters: {error}") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise KvtwinError(f"{path} is not a file of filters of the format {FORMAT}")
    if facts.get("model") != fingerprint(spec):
        raise KvtwinError(
            f"{path} holds the filters of another model ({facts.get('model')}); expected {fingerprint(spec)}: "
            "compute them with this one"
        )
    shapes = {f"layers.{index}": (layer.kv_heads, layer.head_dim) for index, layer in enumerate(spec.layers)}
    came = {key: value.shape for key, value in arrays.items()}
    if came != shapes or not all(np.isfinite(value).all() for value in arrays.values()):
        raise KvtwinError(f"{path} holds {came}; expected finite arrays {shapes}; the file is damaged")
    return arrays


def _random(path: str, spec: ModelSpec) -> Filters:
    seed = path.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise KvtwinError(f"{path!r} names no file and no seed; expected random:0 or another whole number")
    drawn = {
        f"layers.{index}": normal((int(seed), index), (layer.kv_heads, layer.head_dim))
        for index, layer in enumerate(spec.layers)
    }
    return {key: value / np.linalg.norm(value, axis=-1, keepdims=True) for key, value in drawn.items()}
