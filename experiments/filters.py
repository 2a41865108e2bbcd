"""`kvtwin filters`: the directions that a model's queries share on calibration text, for the policy q_filter."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from framework.backend import Model
from framework.calibration import Arrays, write_arrays
from framework.errors import KvtwinError

TOKENS = 512  # of one piece of text


def filters_of(model: Model, text: str, pieces: int) -> Arrays:
    """The first right singular vector of each kv head's queries, signed so that their mean points along it."""
    ids = model.tokenizer.encode(text)
    cuts = [ids[start : start + TOKENS] for start in range(0, len(ids) - TOKENS + 1, TOKENS)][:pieces]
    if not cuts:
        raise KvtwinError(f"the calibration text has {len(ids)} tokens; expected at least {TOKENS}")
    shapes = [(layer.kv_heads, layer.head_dim) for layer in model.spec.layers]
    squares = [np.zeros((heads, dim, dim)) for heads, dim in shapes]
    sums = [np.zeros(shape) for shape in shapes]
    for cut in cuts:
        taps: dict[str, np.ndarray] = {}
        model.step([cut], logits=None, taps=taps)
        for index, (heads, dim) in enumerate(shapes):
            queries = taps[f"layers.{index}.attention.query_rotated"][0].astype(np.float64)
            queries = queries.reshape(len(cut), heads, -1, dim).transpose(1, 0, 2, 3).reshape(heads, -1, dim)
            squares[index] += queries.transpose(0, 2, 1) @ queries
            sums[index] += queries.sum(1)
    first = [np.linalg.eigh(one)[1][..., -1] for one in squares]
    signs = [np.where((one * total).sum(-1) < 0, -1.0, 1.0) for one, total in zip(first, sums, strict=True)]
    pairs = enumerate(zip(first, signs, strict=True))
    return {f"layers.{index}": (one * sign[:, None]).astype(np.float32) for index, (one, sign) in pairs}


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")],
    text: Annotated[Path, typer.Argument(help="A file of calibration text.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    pieces: Annotated[int, typer.Option(help=f"Pieces of {TOKENS} tokens that are read.", min=1)] = 32,
) -> None:
    """Compute the filters of a model and write them to a file."""
    from backends import backends

    try:
        read = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KvtwinError(f"cannot read the calibration text {text}: {error}") from error
    loaded = backends.get("torch").load(model)
    digest = write_arrays(out, "filters", filters_of(loaded, read, pieces), loaded.spec)
    typer.echo(f'q_filter(path="{out}", digest="{digest}")')
