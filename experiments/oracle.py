"""`kvtwin oracle`: the attention still to come along one text, for the policy oracle_future."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from experiments.regret import attention_of, to_come
from framework.backend import Model
from framework.calibration import Arrays, write_arrays
from framework.errors import KvtwinError

LARGEST = 2**30  # bytes of a recording


def recording_of(model: Model, ids: list[int], prompt: int, steps: int) -> Arrays:
    """What the first `prompt + steps` tokens attend to from position `prompt` on, and their ids."""
    tokens = prompt + steps
    if len(ids) < tokens:
        raise KvtwinError(
            f"the text has {len(ids)} tokens; expected at least {tokens}, {prompt} of the prompt and {steps} steps"
        )
    size = 4 * steps * tokens * sum(layer.kv_heads for layer in model.spec.layers)
    if size > LARGEST:
        raise KvtwinError(
            f"a recording of {steps} queries over {tokens} tokens takes {size / 2**20:.0f} MiB; expected at most "
            f"{LARGEST // 2**20}: take fewer steps, the last of the text, or a shorter text"
        )
    text = np.array(ids[:tokens], np.int32)
    layers = enumerate(attention_of(model, text, prompt))
    return {f"layers.{index}": to_come(one) for index, one in layers} | {"text": text}


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")],
    text: Annotated[Path, typer.Argument(help="A file of text.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.", min=1)] = 256,
    steps: Annotated[int, typer.Option(help="Tokens after it, whose attention is recorded.", min=1)] = 128,
    backend: Annotated[str, typer.Option(help="reference, torch or flax.")] = "torch",
) -> None:
    """Record what a run with the full cache attends to along a text, for the policy oracle_future."""
    from backends import backends

    try:
        read = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KvtwinError(f"cannot read the text {text}: {error}") from error
    loaded = backends.get(backend).load(model)
    made = recording_of(loaded, loaded.tokenizer.encode(read), prompt, steps)
    digest = write_arrays(out, "recordings", made, loaded.spec)
    typer.echo(f"{prompt + steps} tokens, queries from position {prompt} on")
    typer.echo(f'oracle_future(path="{out}", digest="{digest}")')
