"""`kvtwin codecs`: every bundled codec in one table, its errors computed when asked. The README's is this one."""

import inspect
import sys
from dataclasses import dataclass, replace
from typing import Annotated

import array_api_compat.numpy as xp
import numpy as np
import typer

from framework.architecture import open_architecture
from framework.codec import Codec, Side, codecs, decoded
from framework.coding import SIDES
from framework.footprint import per_token
from framework.spec import Layer

MODELS = ("Qwen2-7B", "Llama-3-8B", "Llama-2-7B")
HEAD = ("codec", "stores", "bits K, V", "error K, V", *MODELS)
LAYER = Layer(2, 2, 128, 128**-0.5, None)  # of the noise
TOKENS, SEED, ITEMSIZE = 512, 7, 2
UNDER = (
    "Bits of an element with its share of the scales; relative error (root of the mean square) of normal noise with "
    "head_dim 128; KiB of a token's keys and values in three models of 16 bits."
)


@dataclass(frozen=True)
class Entry:
    """One row of the table, as text."""

    name: str
    stores: str
    bits: str
    error: str
    sizes: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of the columns."""
        return (f"`{self.name}`", self.stores, self.bits, self.error, *self.sizes)


def entries() -> list[Entry]:
    """One entry per listed instance of each bundled codec, by name; what they store is said once."""
    found = []
    for each in codecs.names():
        first, *others = (entry(example) for example in codecs.get(each).listed())
        found += [first, *(replace(other, stores="") for other in others)]
    return found


def entry(codec: Codec) -> Entry:
    """What the file of a codec says first, and what the codec does to noise, the same for keys and values."""
    joint = codec.joint(LAYER)
    heads, width = (1, 256) if joint else (2, 128)
    bits = [sum(codec.bits_of(width, side, ITEMSIZE)) / width for side in SIDES]
    bits[0] += codec.group_bits(width, ITEMSIZE) / codec.together / width if codec.together else 0
    noise = np.random.default_rng(SEED).standard_normal((1, heads, TOKENS, width)).astype(np.float32)
    errors = [noise_error(codec, noise, side) for side in SIDES]
    stores = (inspect.getdoc(sys.modules[type(codec).__module__]) or "").splitlines()[0].rstrip(".")
    sizes = tuple(_size(codec, model) for model in MODELS)
    return Entry(codecs.spelling(codec), stores, _pair(bits, ".4g"), _pair(errors, ".3g"), sizes)


def noise_error(codec: Codec, x: np.ndarray, side: Side) -> float:
    """How far what is read lies from what was stored, both as root mean squares."""
    parts = grouped(codec, x) if side == "keys" and codec.together else codec.encode(xp, x, side)
    apart = decoded(codec, xp, parts, side, np.float32).astype(np.float64) - x
    return float(np.sqrt(np.mean(apart**2) / np.mean(x.astype(np.float64) ** 2)))


def grouped(codec: Codec, x: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of keys [batch heads tokens width] that are coded together, as `Codec.read` is given them."""
    found: list[dict[str, np.ndarray]] = []
    for start in range(0, x.shape[2], codec.together):
        own = x[:, :, start : start + codec.together]
        queries = np.ones((*x.shape[:2], codec.queries, x.shape[3]), np.float32) if codec.queries else None
        each, once = codec.encode_group(xp, own, np.ones(own.shape[:3], bool), queries)
        spread = {key: np.repeat(part[:, :, None], own.shape[2], axis=2) for key, part in once.items()}
        found.append(each | spread)
    return {key: np.concatenate([parts[key] for parts in found], axis=2) for key in found[0]}


def _size(codec: Codec, model: str) -> str:
    """KiB of a token; a dash where the codec does not fit the model."""
    spec = open_architecture(model).spec
    if any(codec.unfit(layer) for layer in spec.layers):
        return "-"
    return f"{per_token(spec, codec, ITEMSIZE).kv / 1024:.7g}"


def _pair(values: list[float], style: str) -> str:
    """Of keys and of values; one number where they agree as printed."""
    both = [format(value, style) for value in values]
    return both[0] if both[0] == both[1] else ", ".join(both)


def markdown() -> str:
    """The table in Markdown."""
    rows = [HEAD, ("---",) * len(HEAD), *(each.cells for each in entries())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def command(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print it as the README has it.")] = False,
) -> None:
    """List the bundled codecs: bits of an element, error on white noise, size of a token in three models."""
    if as_markdown:
        typer.echo(markdown())
        return
    from rich.console import Console
    from rich.table import Column, Table

    # What a codec stores would leave no room for the numbers.
    table = Table(Column(HEAD[0], overflow="fold"), *HEAD[2:])
    for each in entries():
        table.add_row(each.name, *each.cells[2:])
    Console(highlight=False).print(table)
    typer.echo(UNDER)
