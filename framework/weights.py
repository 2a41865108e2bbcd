"""Weights: a flat dict from canonical name to NumPy array `[out, in]`, and the folders that hold them.

embed.weight [vocab, dim]    norm.weight [dim]    head.weight [vocab, dim], absent when tied
layers.{i}.  attention_norm, attention_post_norm, ffn_norm, ffn_post_norm  .weight [dim]
             attention.{query, key, value, output}  .weight, .bias
             attention.{query_norm, key_norm}  .weight [head_dim]
             ffn.{gate, up, down}  .weight, .bias
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from framework.config import read_json
from framework.errors import KvtwinError
from framework.family import Family, families
from framework.spec import Layer, ModelSpec

Weights = dict[str, Shaped[np.ndarray, "..."]]

# Name in a safetensors header -> name in config.json.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 6  # tensors named in one error


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a spec, by canonical name."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (spec.vocab, spec.dim)}
    for index, layer in enumerate(spec.layers):
        found |= {f"layers.{index}.{name}": shape for name, shape in _layer_shapes(spec, layer).items()}
    found["norm.weight"] = (spec.dim,)
    if not spec.tied:
        found["head.weight"] = (spec.vocab, spec.dim)
    return found


def _layer_shapes(spec: ModelSpec, layer: Layer) -> dict[str, tuple[int, ...]]:
    dim, ffn, wide, narrow = spec.dim, spec.ffn, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    norms = ["attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"]
    found: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (dim,) for name in norms if spec.post_norms or "post" not in name
    }
    if spec.query_key_norm:
        found |= {f"attention.{name}_norm.weight": (layer.head_dim,) for name in ("query", "key")}
    linears = [
        ("attention.query", wide, dim, spec.qkv_bias),
        ("attention.key", narrow, dim, spec.qkv_bias),
        ("attention.value", narrow, dim, spec.qkv_bias),
        ("attention.output", dim, wide, spec.output_bias),
        ("ffn.gate", ffn, dim, spec.ffn_bias),
        ("ffn.up", ffn, dim, spec.ffn_bias),
        ("ffn.down", dim, ffn, spec.ffn_bias),
    ]
    for name, out, inner, bias in linears:
        found[f"{name}.weight"] = (out, inner)
        if bias:
            found[f"{name}.bias"] = (out,)
    return found


def check(spec: ModelSpec, weights: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Raises KvtwinError naming every missing, unexpected and misshapen tensor at once, with both shapes.

    `names` adds the foreign names to the message.
    """
    found = weights.shapes if isinstance(weights, Stored) else None
    _check_shapes(
        shapes(spec), found or {name: tuple(value.shape) for name, value in weights.items()}, names or {}
    )


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> None:
    def shown(name: str) -> str:
        return f"{name} ({names[name]})" if name in names else name

    missing = [f"{shown(name)} {list(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{shown(name)} {list(found[name])}" for name in found if name not in expected]
    misshapen = [
        f"{shown(name)} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    faults = [f"{len(items)} {word}: {_some(items)}" for word, items in groups.items() if items]
    if faults:
        raise KvtwinError("the tensors do not fit the spec: " + "\n".join(faults))


def _some(items: list[str]) -> str:
    more = f"; and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return "; ".join(items[:SHOWN]) + more


class Stored(Mapping[str, np.ndarray]):
    """Weights in files: an array is read when it is asked for, and not held here.

    `shapes` says their shapes without reading. A file is open only meanwhile: what is mapped of one that stays open
    counts as memory of the process.
    """

    def __init__(
        self, paths: Mapping[str, Path], foreign: Mapping[str, str], shapes: dict[str, tuple[int, ...]]
    ):
        self.paths, self.foreign, self.shapes = paths, foreign, shapes

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        path = self.paths[name]
        with _intact(path), safe_open(path, framework="numpy") as file:
            found = file.get_tensor(self.foreign[name])
        if found.shape != self.shapes[name]:
            raise KvtwinError(
                f"{self.foreign[name]} in {path} has now the shape {found.shape}; expected {self.shapes[name]}, "
                "as when the file was opened: load again when it is whole"
            )
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read(folder: str | os.PathLike, spec: ModelSpec, family: Family) -> Stored:
    """The weights of a Hugging Face folder in the dtype they are stored in: one file, or shards with an index.

    Raises KvtwinError on missing, unexpected and misshapen tensors (all at once), on dtypes other than float32,
    float64, bfloat16 and float16, and on files that are corrupt or absent. A stored head beside tied embeddings is
    accepted where it equals them.
    """
    folder = Path(folder)
    names = family.names(spec)
    canonical = {foreign: name for name, foreign in names.items()}
    if spec.tied:
        canonical[family.head] = "head.weight"
    files = _opened(folder)
    where = {each: path for path, file in files.items() for each in file.keys() if not family.ignored(each)}
    found = {
        canonical.get(foreign, foreign): tuple(files[path].get_slice(foreign).get_shape())
        for foreign, path in where.items()
    }
    expected = shapes(replace(spec, tied=False)) if spec.tied and "head.weight" in found else shapes(spec)
    _check_shapes(expected, found, names)
    _check_dtypes({foreign: files[path] for foreign, path in where.items()})
    held = {canonical[foreign]: path for foreign, path in where.items()}
    if spec.tied and "head.weight" in held:
        _check_tied_head({name: files[path] for name, path in held.items()}, names, folder, family)
    return Stored(held, names, shapes(spec))


def _check_dtypes(where: Mapping[str, Any]) -> None:
    dtypes = {foreign: file.get_slice(foreign).get_dtype() for foreign, file in where.items()}
    wrong = [f"{foreign} {dtype}" for foreign, dtype in dtypes.items() if dtype not in DTYPES]
    if wrong:
        raise KvtwinError(
            f"dtypes that are not implemented: {_some(wrong)}\nexpected {', '.join(DTYPES.values())}"
        )


def _check_tied_head(held: Mapping[str, Any], names: Mapping[str, str], folder: Path, family: Family) -> None:
    head = held["head.weight"].get_tensor(family.head)
    if not np.array_equal(head, held["embed.weight"].get_tensor(names["embed.weight"])):
        raise KvtwinError(
            f"{folder}: {family.head} differs from the embeddings, though config.json says tie_word_embeddings\n"
            "expected them equal, or tie_word_embeddings false"
        )


def _opened(folder: Path) -> dict[Path, Any]:
    """The safetensors files of a folder, mapped."""
    files = {}
    for path in _files(folder):
        with _intact(path):
            files[path] = safe_open(path, framework="numpy")
    _check_index(folder, files)
    return files


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    """Errors of the format and of the system become KvtwinError with the file's path."""
    try:
        yield
    except SafetensorError as error:
        raise KvtwinError(
            f"{path} is not a whole safetensors file: {error}\nexpected an intact file: copy or download it again"
        ) from None
    except OSError as error:
        raise KvtwinError(f"{path} cannot be read: {error}") from None


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those that the index names, else the single one."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise KvtwinError(
            f"{folder} holds neither {SINGLE} nor {INDEX}; it holds {_some(found) or 'nothing'}\n"
            "expected safetensors: convert other formats first (save_pretrained writes safetensors)"
        )
    paths = [folder / name for name in sorted(set(_index(folder).values()))]
    missing = [path.name for path in paths if not path.exists() or path.parent != folder]
    if missing or not paths:
        raise KvtwinError(f"{folder / INDEX} names {_some(missing) or 'no file'}, which is not in {folder}")
    return paths


def _index(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise KvtwinError(
            f"{folder / INDEX} has no weight_map; expected an object from tensor name to file name"
        )
    return index


def _check_index(folder: Path, files: Mapping[Path, Any]) -> None:
    """Raises where the index puts a tensor into a file that does not hold it."""
    if (folder / SINGLE).exists():
        return
    held = {path.name: set(file.keys()) for path, file in files.items()}
    wrong = [f"{tensor} in {name}" for tensor, name in _index(folder).items() if tensor not in held[name]]
    if wrong:
        raise KvtwinError(f"{folder / INDEX} names tensors that their files do not hold: {_some(wrong)}")


def write(folder: str | os.PathLike, spec: ModelSpec, weights: Weights) -> None:
    """A Hugging Face folder: config.json and one model.safetensors with the arrays bit for bit, under foreign names.

    Raises KvtwinError where the folder exists and is not empty, or the weights do not fit the spec. The folder
    appears complete or not at all.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KvtwinError(f"{folder} exists and is not empty; name a new folder, or remove it first")
    family = families.get(spec.family)()
    names = family.names(spec)
    check(spec, weights, names)
    dtype = str(weights["embed.weight"].dtype)
    if wrong := [
        f"{name} {value.dtype}" for name, value in weights.items() if str(value.dtype) not in DTYPES.values()
    ]:
        raise KvtwinError(
            f"dtypes that cannot be written: {_some(wrong)}\nexpected {', '.join(DTYPES.values())}"
        )
    config = family.config(spec) | {"dtype": dtype}
    # save_file writes the buffer of an array as it lies in memory, whatever its strides.
    arrays = {names[name]: np.ascontiguousarray(value) for name, value in weights.items()}
    with _appearing(folder) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(arrays, partial / SINGLE, metadata={"format": "pt"})


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name at the end, or vanishes on an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)  # mkdtemp makes folders that only the owner reads
        partial.rename(folder)
    except OSError as error:
        raise KvtwinError(f"{folder} cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def random_weights(spec: ModelSpec, seed: int, dtype: Any = np.float64) -> Weights:
    """Weights under which every part of a model moves the logits: embeddings of standard deviation 1, matrices of
    1 / sqrt(in), biases of 0.5, norms of effective weight 1 +- 0.1. The numbers depend on `seed` and the spec, and
    `dtype` only rounds them.
    """
    dtype = np.dtype(ml_dtypes.bfloat16 if str(dtype) == "bfloat16" else dtype)
    return {
        name: _random(name, shape, spec.norm_offset, np.random.default_rng([seed, index])).astype(dtype)
        for index, (name, shape) in enumerate(shapes(spec).items())
    }


def _random(
    name: str, shape: tuple[int, ...], norm_offset: float, generator: np.random.Generator
) -> Shaped[np.ndarray, "..."]:
    noise = generator.standard_normal(shape)
    if name.endswith("norm.weight"):
        return 1 - norm_offset + 0.1 * noise
    if name.endswith(".bias"):
        return 0.5 * noise
    return noise if name == "embed.weight" else noise / np.sqrt(shape[-1])
