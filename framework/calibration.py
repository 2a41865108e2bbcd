"""Files of arrays that a policy needs beside a model's weights: written once from calibration text, read with checks.

A file is safetensors and says of which kind its arrays are and which model they belong to. `random:SEED` stands for a
file of random unit vectors: the control that anything calibrated should beat.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from framework.errors import KvtwinError
from framework.random import normal
from framework.spec import ModelSpec

FORMAT = "kvtwin-arrays-1"
RANDOM = "random:"

Arrays = dict[str, np.ndarray]


def fingerprint(spec: ModelSpec) -> str:
    """What tells one model's numbers from another's."""
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:16]


def digest_of(path: str | os.PathLike) -> str:
    """The first 16 hexadecimal digits of a file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def write_arrays(
    path: str | os.PathLike, kind: str, arrays: Mapping[str, np.ndarray], spec: ModelSpec
) -> str:
    """Write the arrays of one kind ("filters", "gates"), whole or not at all; returns the file's digest."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    facts = {"format": FORMAT, "kind": kind, "model": fingerprint(spec)}
    try:
        plain = {key: np.ascontiguousarray(value, np.float32) for key, value in arrays.items()}
        save_file(plain, temporary, metadata={"kvtwin": json.dumps(facts)})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise KvtwinError(f"cannot write the {kind} to {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest_of(target)


def read_arrays(path: str, digest: str, kind: str, spec: ModelSpec) -> Arrays:
    """The arrays of this model; another model's, another kind's, another digest or a damaged file is refused."""
    if not Path(path).is_file():
        raise KvtwinError(f'no {kind} at {path!r}; expected a file of them, or "random:0" for random ones')
    if digest and digest_of(path) != digest:
        raise KvtwinError(f"{path} has the digest {digest_of(path)}; expected {digest}")
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads((file.metadata() or {}).get("kvtwin", "{}"))
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise KvtwinError(f"{path} is not a readable file of {kind}: {error}") from error
    if not isinstance(facts, dict) or (facts.get("format"), facts.get("kind")) != (FORMAT, kind):
        raise KvtwinError(f"{path} is not a file of {kind} of the format {FORMAT}")
    if facts.get("model") != fingerprint(spec):
        raise KvtwinError(
            f"{path} holds the {kind} of another model ({facts.get('model')}); expected {fingerprint(spec)}: "
            "make them for this one"
        )
    return arrays


def check_arrays(path: str, arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """The arrays, refused unless they are finite and have these shapes."""
    came = {key: value.shape for key, value in arrays.items()}
    if came != dict(shapes):
        odd = sorted(key for key in {*came, *shapes} if came.get(key) != shapes.get(key))[0]
        raise KvtwinError(
            f"{path}: {odd} has shape {came.get(odd)}; expected {shapes.get(odd)}; the file is damaged"
        )
    if not all(np.isfinite(value).all() for value in arrays.values()):
        raise KvtwinError(f"{path} holds numbers that are not finite; the file is damaged")
    return arrays


def random_arrays(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """For `random:SEED`: random vectors of length 1 along the last axis."""
    seed = path.removeprefix(RANDOM)
    if not seed.isdecimal():
        raise KvtwinError(f"{path!r} names no file and no seed; expected random:0 or another whole number")
    drawn = {key: normal((int(seed), number), shape) for number, (key, shape) in enumerate(shapes.items())}
    return {key: value / np.linalg.norm(value, axis=-1, keepdims=True) for key, value in drawn.items()}
