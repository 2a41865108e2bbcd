"""Parameters and caches over the devices of a mesh: rows by its axis `batch`, heads by its axis `heads`.

Arrays are placed, and XLA splits the programs that read them (GSPMD). Two things it cannot know are said: a cache comes
out of a call as it went in, so that decode reuses its buffers; and what is done to each head by itself is done where
the head is (`by_head`), since a product over rows and heads as one axis would bring all of them to each device.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from framework.codec import Codec, codecs
from framework.errors import KvtwinError
from framework.spec import ModelSpec

Tree = TypeVar("Tree")

AXES = BATCH, HEADS = "batch", "heads"

# What the first axes of an array are, by the name of the module or field that holds it; those of a cache that are not
# named here begin with rows and heads.
PARAMETERS: dict[str, tuple[str | None, ...]] = {
    "query_key_value.weight": (HEADS,),  # rows by kv head
    "query_key_value.bias": (HEADS,),
    "output.weight": (None, HEADS),
    "gate_up.weight": (HEADS,),  # rows by device
    "gate_up.bias": (HEADS,),
    "down.weight": (None, HEADS),
}
FIELDS: dict[str, tuple[str | None, ...]] = {
    "State.seen": (BATCH,),
    "State.dropped": (BATCH,),
    "State.bad": (),
    "State.unfit": (HEADS,),
    "LayerState.query_positions": (BATCH,),
    "LayerState.fill": (),
    "Given.tables": (),
    "Given.constants": (),
    "Given.budgets": (None, BATCH, HEADS),
    "Given.question": (BATCH,),
    "Given.biases": (HEADS,),
    "Call.positions": (BATCH,),
    "Call.before": (BATCH,),
    "Call.after": (BATCH,),
}


def read_mesh(mesh: Any, spec: ModelSpec) -> Mesh | None:
    """The mesh, with axes that XLA splits by itself; refused where the model does not divide among its devices."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise KvtwinError(
            f"mesh is {type(mesh).__name__}; expected a jax.sharding.Mesh with axes batch and heads, as "
            'jax.make_mesh((2, 4), ("batch", "heads"))'
        )
    if wrong := [name for name in mesh.axis_names if name not in AXES]:
        raise KvtwinError(
            f"mesh has the axes {', '.join(map(str, mesh.axis_names))}; expected batch, heads or both, "
            f"and no {', '.join(map(str, wrong))}"
        )
    if mesh.is_multi_process:
        raise KvtwinError(
            f"mesh spans {len({each.process_index for each in mesh.devices.flat})} processes; expected the devices of "
            "one, as jax.local_devices() gives them"
        )
    heads = size(mesh, HEADS)
    for index, layer in enumerate(spec.layers):
        if layer.kv_heads % heads:
            raise KvtwinError(
                f"layer {index} has {layer.kv_heads} kv heads, which do not divide among the {heads} devices of the "
                f"mesh axis heads; expected a divisor of {layer.kv_heads}, the other devices on the axis batch"
            )
    if spec.ffn % heads:
        raise KvtwinError(
            f"ffn is {spec.ffn}, which does not divide among the {heads} devices of the mesh axis heads; expected a "
            f"divisor of {spec.ffn}, the other devices on the axis batch"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_cache(mesh: Mesh | None, batch: int, codec: Codec, spec: ModelSpec) -> None:
    """Raises unless a cache of so many rows under this codec divides among the devices."""
    if mesh is None:
        return
    rows = size(mesh, BATCH)
    if batch % rows:
        raise KvtwinError(
            f"a batch of {batch} does not divide among the {rows} devices of the mesh axis batch; "
            f"expected a multiple of {rows}, or a mesh with fewer devices on that axis"
        )
    if size(mesh, HEADS) > 1 and any(codec.joint(layer) for layer in spec.layers):
        raise KvtwinError(
            f"codec {codecs.spelling(codec)} codes the heads of a token together, and the mesh axis heads has "
            f"{size(mesh, HEADS)} devices; expected another codec, or a mesh with all devices on the axis batch"
        )


def size(mesh: Mesh, axis: str) -> int:
    """Devices along an axis; 1 where the mesh does not have it."""
    return dict(mesh.shape).get(axis, 1)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """How an array lies whose first axes are these; axes that the mesh lacks are whole on every device."""
    return NamedSharding(mesh, _spec(mesh, axes))


def _spec(mesh: Mesh, axes: Sequence[str | None]) -> PartitionSpec:
    return PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in axes))


def parameter_sharding(mesh: Mesh | None, name: str, shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a tensor of `framework.fused` lies. The embedding and the head lie by rows of the vocabulary where those
    divide among the devices, and else whole on each, as norms and the biases of outputs do."""
    if mesh is None:
        return None
    axes = PARAMETERS.get(".".join(name.split(".")[-2:]), ())
    if name.split(".")[0] in ("embed", "head") and shape[0] % size(mesh, HEADS) == 0:
        axes = (HEADS,)
    return sharding(mesh, axes)


def placed(mesh: Mesh | None, cache: Tree) -> Tree:
    """A `State`, or a layer of one, with each array where the compiled functions have it."""
    return _each(jax.device_put, mesh, cache)


def replicated(mesh: Mesh | None, tree: Tree) -> Tree:
    """Arrays that every device has whole."""
    return tree if mesh is None else jax.device_put(tree, sharding(mesh, ()))


def kept_in_place(mesh: Mesh | None, cache: Tree) -> Tree:
    """`placed`, inside a compiled function: what it gives back lies as what it was given."""
    return _each(jax.lax.with_sharding_constraint, mesh, cache)


def by_row(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """An array of which a device has all that belongs to its rows, inside a compiled function."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, (BATCH,)))


def by_head(mesh: Mesh | None, f: Callable, *given: Any) -> Any:
    """f(*given), where each device sees its own rows and heads; so the results, whose first axes are rows and heads.

    Python's numbers stay what they are.
    """
    if mesh is None:
        return f(*given)
    leaves, tree = jax.tree.flatten(given)
    arrays = [index for index, leaf in enumerate(leaves) if hasattr(leaf, "ndim")]
    axes = _axes(given)

    def own(*parts: jax.Array) -> Any:
        here = dict(zip(arrays, parts, strict=True))
        return f(*tree.unflatten([here.get(index, leaf) for index, leaf in enumerate(leaves)]))

    split = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=tuple(_spec(mesh, axes[index]) for index in arrays),
        out_specs=_spec(mesh, (BATCH, HEADS)),
        check_vma=False,
    )
    return split(*(leaves[index] for index in arrays))


def own_part(mesh: Mesh | None, spec: ModelSpec) -> ModelSpec:
    """The spec as `by_head` shows it to a device: with the heads that it has."""
    if mesh is None:
        return spec
    share = size(mesh, HEADS)
    layers = (
        replace(layer, heads=layer.heads // share, kv_heads=layer.kv_heads // share) for layer in spec.layers
    )
    return replace(spec, layers=tuple(layers))


def _each(put: Callable, mesh: Mesh | None, cache: Tree) -> Tree:
    if mesh is None:
        return cache
    leaves, tree = jax.tree.flatten(cache)
    return tree.unflatten(map(put, leaves, [sharding(mesh, axes) for axes in _axes(cache)]))


def _axes(given: Any) -> list[tuple[str | None, ...]]:
    """The first axes of each array, in jax's order."""
    return [_axes_at(given, path) for path, _ in jax.tree_util.tree_leaves_with_path(given)]


def _axes_at(given: Any, path: Sequence[Any]) -> tuple[str | None, ...]:
    axes: tuple[str | None, ...] = (BATCH, HEADS)
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            axes = FIELDS.get(f"{type(given).__name__}.{key.name}", axes)
            given = getattr(given, key.name)
        else:
            given = given[key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key]
    return axes if getattr(given, "ndim", 0) else ()
