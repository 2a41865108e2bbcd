"""A cache as data: NumPy arrays in one canonical order, which every backend can give and take.

Slots are in position order with the empty ones last, so two caches that hold the same tokens are equal as snapshots
whatever their physical layout. The file form is one safetensors file; it is written under a temporary name and renamed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from framework.codec import Codec, codecs
from framework.coding import layout
from framework.errors import KvtwinError
from framework.eviction import slot_memory
from framework.groups import ROW, asked, canonical_tables, fixed_rows, of_groups, tables_layout
from framework.policy import Policy, policies
from framework.shapes import EMPTY
from framework.spec import Layer, ModelSpec

FORMAT = "kvtwin-cache-4"
WHOLE = ("seen", "dropped", "question", "positions", "query_positions", "budget")  # integers
FACTS = ("policy", "codec", "dtype", "steps", "pending", "capacity", "length")


@dataclass(frozen=True)
class LayerSnapshot:
    """One layer: its streams, positions, the policy's memory per slot and per head, and the newest queries.

    Streams are as a codec made them, one head for all where they are coded as one. Queries are None where nobody asks
    for them. `tables`: what a codec keeps beside the slots (`framework/groups.py`).
    """

    streams: dict[str, Shaped[np.ndarray, "batch _ slots _"]]
    positions: Int[np.ndarray, "batch kv_heads slots"]
    memory: dict[str, Shaped[np.ndarray, "batch kv_heads slots"]]
    heads: dict[str, Shaped[np.ndarray, "batch kv_heads *rest"]]
    queries: Shaped[np.ndarray, "batch kv_heads group window head_dim"] | None = None
    query_positions: Int[np.ndarray, "batch window"] | None = None
    tables: dict[str, Shaped[np.ndarray, "batch kv_heads rows _"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A whole cache.

    `seen`: tokens of each row so far. `dropped`: what `seen` was when a token of the row was last evicted (0: never).
    `question`: the position at which the question of each row begins, FAR where there is none.
    `budgets`: tokens kept by each head of each layer, None where no budget holds. `steps`: decode steps since the last
    prefill; 0 where the policy has no interval. `pending`: the last call appended
    without evicting. `length`: the declared final length, or None.
    """

    spec: ModelSpec
    policy: str
    codec: str
    dtype: str
    layers: tuple[LayerSnapshot, ...]
    seen: Int[np.ndarray, "batch"]
    dropped: Int[np.ndarray, "batch"]
    question: Int[np.ndarray, "batch"]
    budgets: tuple[Int[np.ndarray, "batch kv_heads"] | None, ...]
    steps: int
    pending: bool
    capacity: int | None
    length: int | None

    @property
    def kept(self) -> list[Int[np.ndarray, "batch kv_heads kept"]]:
        """Positions held in each layer, rising, -1 padded."""
        return [layer.positions for layer in self.layers]

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, or leave what was there."""
        arrays = {"seen": self.seen, "dropped": self.dropped, "question": self.question}
        for index, layer in enumerate(self.layers):
            arrays |= {f"{index}.stream.{key}": value for key, value in layer.streams.items()}
            arrays |= {f"{index}.table.{key}": value for key, value in layer.tables.items()}
            arrays |= {f"{index}.memory.{key}": value for key, value in layer.memory.items()}
            arrays |= {f"{index}.heads.{key}": value for key, value in layer.heads.items()}
            arrays[f"{index}.positions"] = layer.positions
            if layer.queries is not None and layer.query_positions is not None:
                arrays[f"{index}.queries"] = layer.queries
                arrays[f"{index}.query_positions"] = layer.query_positions
            budget = self.budgets[index]
            if budget is not None:
                arrays[f"{index}.budget"] = budget
        facts = {key: getattr(self, key) for key in FACTS} | {"format": FORMAT, "spec": asdict(self.spec)}
        target = Path(path)
        if not target.parent.is_dir():
            raise KvtwinError(f"cannot save the cache to {target}: the folder {target.parent} does not exist")
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
            save_file(contiguous, temporary, metadata={"kvtwin": json.dumps(facts)})
            os.replace(temporary, target)
        except (OSError, SafetensorError) as error:
            raise KvtwinError(f"cannot save the cache to {target}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike, spec: ModelSpec) -> "Snapshot":
        """Read a file that `save` wrote, for a model of this spec; anything else is refused."""
        if not Path(path).is_file():
            raise KvtwinError(f"no cache file at {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("kvtwin", "{}"))
                arrays = {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise KvtwinError(f"{path} is not a readable cache file: {error}") from error
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            raise KvtwinError(f"{path} is not a kvtwin cache of format {FORMAT}")
        came, expected = facts.pop("spec", {}), json.loads(json.dumps(asdict(spec)))
        if came != expected:
            differing = sorted(key for key in expected if came.get(key) != expected[key])
            raise KvtwinError(
                f"{path} is a cache of another model: {', '.join(differing)} differ from this model's spec"
            )
        if set(facts) != set(FACTS):
            raise KvtwinError(f"{path} has the facts {sorted(facts)}; expected {sorted(FACTS)}")
        _check(path, arrays, spec, policies.make(facts["policy"]), codecs.make(facts["codec"]))
        layers = tuple(_layer(arrays, index) for index in range(len(spec.layers)))
        budgets = tuple(arrays.get(f"{index}.budget") for index in range(len(spec.layers)))
        rows = {key: arrays[key] for key in ("seen", "dropped", "question")}
        return cls(spec=spec, layers=layers, budgets=budgets, **rows, **facts)


def _check(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], spec: ModelSpec, policy: Policy, codec: Codec
) -> None:
    """Raises unless the arrays are those of a cache of this spec, policy and codec."""
    batch, newest = arrays["seen"].size if "seen" in arrays else 0, asked(policy, codec)
    expected: dict[str, tuple[int, ...]] = dict.fromkeys(("seen", "dropped", "question"), (batch,))
    for index, layer in enumerate(spec.layers):
        slots = arrays.get(f"{index}.positions", np.zeros(0)).shape[-1]
        expected[f"{index}.positions"] = (batch, layer.kv_heads, slots)
        for key, (stream, _) in layout(codec, layer).items():
            expected[f"{index}.stream.{key}"] = (batch, stream.heads, slots, stream.width)
        heads = (batch, layer.kv_heads)
        tables = tables_layout(codec, layer)
        rows = next(
            (
                x.shape[2:3]
                for key in of_groups(tables)
                if (x := arrays.get(f"{index}.table.{key}")) is not None
            ),
            (),
        )
        for key, (stream, _) in tables.items():
            fixed = fixed_rows(codec, key)
            expected[f"{index}.table.{key}"] = (*heads, *(rows if fixed is None else (fixed,)), stream.width)
        expected |= {f"{index}.memory.{key}": (*heads, slots) for key in slot_memory(policy)}
        expected |= {
            f"{index}.heads.{key}": (*heads, *rest) for key, rest in policy.head_memory(layer).items()
        }
        if policy.evicts:
            expected[f"{index}.budget"] = heads
        if newest:
            expected[f"{index}.queries"] = (batch, layer.kv_heads, layer.group, newest, layer.head_dim)
            expected[f"{index}.query_positions"] = (batch, newest)
    for key in [*expected, *arrays]:
        if key not in arrays:
            raise KvtwinError(f"{path} lacks the array {key!r}; the file is damaged")
        if key not in expected:
            raise KvtwinError(
                f"{path} has an array {key!r} that its policy does not explain; the file is damaged"
            )
        own = ".memory." in key or ".heads." in key  # called whatever the policy likes
        came, number = arrays[key], key.partition(".")[0]
        kind = _kind(codec, spec.layers[int(number)], key) if number.isdigit() else None
        if kind is not None:
            if came.dtype != kind:
                raise KvtwinError(
                    f"{path}: {key} has dtype {came.dtype}; expected {kind}; the file is damaged"
                )
        came, whole = arrays[key], not own and key.rpartition(".")[2] in WHOLE
        if came.shape != expected[key]:
            raise KvtwinError(
                f"{path}: {key} has shape {came.shape}; expected {expected[key]}; the file is damaged"
            )
        if kind is None and whole != (came.dtype == np.int32):
            raise KvtwinError(f"{path}: {key} has dtype {came.dtype}; the file is damaged")
    for index, layer in enumerate(spec.layers if codec.together else ()):
        key, first = f"{index}.stream.{ROW}", next(iter(of_groups(tables_layout(codec, layer))))
        rows = arrays[f"{index}.table.{first}"].shape[2]
        most = arrays[key][..., 0].max(where=arrays[f"{index}.positions"] >= 0, initial=-1)
        if most >= rows:
            raise KvtwinError(f"{path}: {key} names group {most} of {rows}; the file is damaged")


def _kind(codec: Codec, layer: Layer, key: str) -> np.dtype | None:
    """The dtype of an array that a codec made; None where the model's precision decides, and for all others."""
    if codec.exact:
        return None
    if stream := key.partition(".stream.")[2]:
        return layout(codec, layer)[stream][1]
    return tables_layout(codec, layer).get(key.partition(".table.")[2], (None, None))[1]


def _layer(arrays: dict[str, np.ndarray], index: int) -> LayerSnapshot:
    def under(kind: str) -> dict[str, np.ndarray]:
        head = f"{index}.{kind}."
        return {key.removeprefix(head): value for key, value in arrays.items() if key.startswith(head)}

    return LayerSnapshot(
        streams=under("stream"),
        positions=arrays[f"{index}.positions"],
        memory=under("memory"),
        heads=under("heads"),
        queries=arrays.get(f"{index}.queries"),
        query_positions=arrays.get(f"{index}.query_positions"),
        tables=under("table"),
    )


def canonical(
    streams: dict[str, np.ndarray],
    positions: np.ndarray,
    memory: dict[str, np.ndarray],
    heads: dict[str, np.ndarray],
    queries: np.ndarray | None = None,
    query_positions: np.ndarray | None = None,
    tables: Mapping[str, np.ndarray] | None = None,
    codec: Codec | None = None,
    seen: Int[np.ndarray, "batch"] | None = None,
) -> LayerSnapshot:
    """Physical arrays of one layer in position order, cut to the largest number of tokens that a head holds.

    Empty places are zero in streams, memory, queries and tables. `tables`, with their codec and what the rows have
    seen, are for layers that have some.
    """
    far = np.where(positions < 0, np.iinfo(np.int32).max, positions)
    width = int((positions >= 0).sum(-1).max(initial=0))
    order = np.argsort(far, axis=-1, kind="stable")[..., :width]
    ranked = np.take_along_axis(positions, order, axis=-1)
    hole = ranked == EMPTY

    def gather(x: np.ndarray) -> np.ndarray:
        if x.ndim == 3:
            return np.where(hole, x.dtype.type(0), np.take_along_axis(x, order, axis=-1))
        gone, index = hole[:, : x.shape[1], :, None], order[:, : x.shape[1], :, None]
        return np.where(gone, x.dtype.type(0), np.take_along_axis(x, index, axis=2))

    if queries is not None and query_positions is not None:
        queries = np.where(query_positions[:, None, None, :, None] < 0, queries.dtype.type(0), queries)
    ordered = {key: gather(value) for key, value in streams.items()}
    made: dict[str, np.ndarray] = {}
    if tables and codec is not None and seen is not None:
        ordered, made = canonical_tables(codec, ordered, ranked, tables, seen)
    return LayerSnapshot(
        ordered,
        ranked.astype(np.int32),
        {key: gather(value) for key, value in memory.items()},
        heads,
        queries,
        query_positions,
        made,
    )
