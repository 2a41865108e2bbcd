"""What one process of several holds of a model: some kv heads of every layer, and what belongs to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from framework.codec import Codec, codecs
from framework.errors import KvtwinError
from framework.policy import Policy, name
from framework.spec import ModelSpec

HEADS = "heads"  # the name of the dimension of a mesh along which heads are shared out


@dataclass(frozen=True)
class Share:
    """Part `index` of `count` equal parts of the kv heads of every layer, in the order of the heads.

    Where `count` is 1, what is given comes back as it is. Elsewhere `whole`, `wholes`, `total` and `once` are calls
    that all processes of the group must make, in the same order.
    """

    count: int = 1
    index: int = 0
    group: Any = None

    def whole(self, x: Shaped[torch.Tensor, "*some"], axis: int = 1) -> Shaped[torch.Tensor, "*every"]:
        """The parts of all processes along this axis; every process gives the same shape."""
        return self.wholes({"": x}, axis)[""]

    def wholes(self, given: Mapping[str, torch.Tensor], axis: int = 1) -> dict[str, torch.Tensor]:
        """`whole` of several arrays at once."""
        if self.count == 1 or not given:
            return dict(given)
        # As bytes, since not every transport knows every dtype.
        raw = [x.contiguous().view(-1).view(torch.uint8) for x in given.values()]
        own = torch.cat(raw)
        every = own.new_empty(self.count, len(own))
        distributed.all_gather(list(every), own, group=self.group)
        found = {}
        for (key, x), part in zip(given.items(), every.split([len(x) for x in raw], dim=1), strict=True):
            held = part.clone(memory_format=torch.contiguous_format).view(-1).view(x.dtype)
            along = axis % x.ndim
            found[key] = held.view(self.count, *x.shape).movedim(0, along).flatten(along, along + 1)
        return found

    def own(self, x: Shaped[torch.Tensor, "*every"], axis: int = 1) -> Shaped[torch.Tensor, "*some"]:
        """This process's part along this axis, in memory of its own."""
        if self.count == 1:
            return x
        size = x.shape[axis] // self.count
        return x.narrow(axis, self.index * size, size).clone()

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what all processes give."""
        if self.count > 1:
            x = x.contiguous()
            distributed.all_reduce(x, group=self.group)
        return x

    def once(self, act: Callable[[], None]) -> None:
        """Let one process act for all; all of them raise what it raises."""
        if self.count == 1:
            return act()
        outcome: list[KvtwinError | None] = [None]
        try:
            if self.index == 0:
                act()
        except KvtwinError as error:
            outcome = [error]
        distributed.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[0] is not None:
            raise outcome[0]


ALONE = Share()


def share_of(mesh: Any, spec: ModelSpec) -> Share:
    """This process's share over a mesh; raises where there is none, or where the model does not divide."""
    if not isinstance(mesh, DeviceMesh) or mesh.mesh_dim_names != (HEADS,):
        came = (
            f"dimensions {mesh.mesh_dim_names}" if isinstance(mesh, DeviceMesh) else f"{type(mesh).__name__}"
        )
        raise KvtwinError(
            f"mesh came with {came}; expected a torch DeviceMesh with one dimension called {HEADS!r}, as "
            f'init_device_mesh("cpu", (2,), mesh_dim_names=({HEADS!r},)) makes it\n'
            f"there is none for rows: of a mesh with more dimensions give mesh[{HEADS!r}], and to the processes along "
            "the others rows of their own"
        )
    count = mesh.size()
    sizes = {f"{layer.kv_heads} kv heads of layer {i}": layer.kv_heads for i, layer in enumerate(spec.layers)}
    for what, size in (sizes | {f"{spec.ffn} channels of the feed-forward": spec.ffn}).items():
        if size % count:
            fitting = [
                n for n in range(1, size + 1) if all(each % n == 0 for each in (*sizes.values(), spec.ffn))
            ]
            raise KvtwinError(
                f"the {what} do not divide among {count} processes; "
                f"expected a mesh of {', '.join(map(str, fitting))}"
            )
    return Share(count, mesh.get_local_rank(), mesh.get_group())


def part_of(spec: ModelSpec, share: Share) -> ModelSpec:
    """The spec of what a process holds; the vocabulary is shared out as well, the last part being padded."""
    count = share.count
    layers = tuple(
        replace(layer, heads=layer.heads // count, kv_heads=layer.kv_heads // count) for layer in spec.layers
    )
    return replace(spec, layers=layers, ffn=spec.ffn // count, vocab=-(-spec.vocab // count))


def cut(key: str, x: Shaped[np.ndarray, "..."], share: Share) -> Shaped[np.ndarray, "..."]:
    """What a process holds of a tensor of `framework.fused`."""
    if share.count == 1:
        return x
    _, _, owner = key.rpartition(".")[0].rpartition(".")
    kind = key.rpartition(".")[2]
    if owner in ("output", "down"):  # it has some of the inputs; the bias is added once
        return _chunk(x, 1, share) if kind == "weight" else x if share.index == 0 else np.zeros_like(x)
    if owner == "query_key_value":
        return _chunk(x, 0, share)
    if owner == "gate_up":  # the gates, then the ups
        pairs = x.reshape(2, -1, *x.shape[1:])
        return _chunk(pairs, 1, share).reshape(-1, *x.shape[1:])
    if owner in ("embed", "head", "table"):
        padding = [(0, -len(x) % share.count)] + [(0, 0)] * (x.ndim - 1)
        return _chunk(np.pad(x, padding), 0, share)
    return x


def _chunk(x: np.ndarray, axis: int, share: Share) -> np.ndarray:
    return np.split(x, share.count, axis)[share.index]


def embedded(
    share: Share,
    vocab: int,
    embed: Callable[[torch.Tensor], torch.Tensor],
    tokens: Int[torch.Tensor, "*axes"],
) -> Float[torch.Tensor, "*axes dim"]:
    """The embedding of each token, of which each process holds `vocab`."""
    if share.count == 1:
        return embed(tokens)
    own = tokens - share.index * vocab
    here = (own >= 0) & (own < vocab)
    return share.total(torch.where(here[..., None], embed(torch.where(here, own, 0)), 0))


def check_shared(policy: Policy, codec: Codec, spec: ModelSpec) -> None:
    """Raises where a cache over several processes cannot do what is asked of it."""
    if policy.needs.gradients:
        raise KvtwinError(
            f"policy {name(policy)} asks for gradients, which a model over a mesh does not give; "
            "expected another policy, or a model without a mesh"
        )
    if codec.recent or any(codec.joint(layer) for layer in spec.layers):
        how = "some tokens" if codec.recent else "all heads of a token"
        raise KvtwinError(
            f"codec {codecs.spelling(codec)} codes {how} together, which a cache over a mesh does not do; "
            "expected a codec of single vectors, as int8(), or a model without a mesh"
        )
