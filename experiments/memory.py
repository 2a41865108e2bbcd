"""`kvtwin memory`: what keys and values of a model take, by codec, policy and length of the context; nothing is run."""

import json
from typing import Annotated, Any

import typer

from experiments.report import WIDTH
from framework.architecture import ITEMSIZE, Architecture, open_architecture
from framework.codec import Codec, codecs
from framework.errors import KvtwinError
from framework.footprint import Footprint, check, footprint, per_token
from framework.policy import Policy, policies

CONTEXTS = (4096, 32768, 131072)
KIB = 1024


def measured(
    model: Architecture, codec: Codec, policy: Policy, contexts: list[int], dtype: str
) -> dict[str, Any]:
    """What `--json` prints; sizes are bytes of one sequence, but for `kib_per_token`.

    `model`, `source`, `dtype`, `codec`, `policy`: what was counted; `layers` of the model, and of them `layers_without`
    keys and values; `windows`: sliding window -> layers that have it. `kib_per_token`: keys and values of a token that
    every layer keeps. `per_token` has the bytes of it, `per_token_beyond_windows` what a token adds once the sliding
    windows are full. `contexts`: per length `tokens`, the tokens that a kv head keeps on average in the layer with the
    fewest and the most (`kept_least`, `kept_most`), the bytes, and `of_full`: keys and values as a share of those under
    full() and full(). Bytes are `keys_and_values`, of which `codes` and `scales`, and apart from them `positions`.
    `notes`: what a reader should know.
    """
    spec, itemsize = model.spec, ITEMSIZE[dtype]
    check(spec, policy, codec)
    plain, everything = codecs.make("full()"), policies.make("full()")
    token = per_token(spec, codec, itemsize)
    rows = []
    for tokens in contexts:
        one = footprint(spec, policy, codec, tokens, itemsize)
        heads = [count / layer.kv_heads for count, layer in zip(one.slots, spec.layers, strict=True)]
        rows.append(
            {"tokens": tokens, "kept_least": _whole(min(heads)), "kept_most": _whole(max(heads))}
            | _bytes(one)
            | {"of_full": one.kv / footprint(spec, everything, plain, tokens, itemsize).kv}
        )
    windows = [layer.window for layer in spec.layers if layer.window is not None]
    return {
        "model": model.name,
        "source": model.source,
        "dtype": dtype,
        "codec": codecs.spelling(codec),
        "policy": policies.spelling(policy),
        "layers": len(spec.layers) + model.without,
        "layers_without": model.without,
        "windows": {str(width): windows.count(width) for width in sorted(set(windows))},
        "kib_per_token": _whole(token.kv / KIB),
        "per_token": _bytes(token),
        "per_token_beyond_windows": _bytes(per_token(spec, codec, itemsize, windows=False)),
        "contexts": rows,
        "notes": _notes(model, codec, policy),
    }


def _bytes(one: Footprint) -> dict[str, Any]:
    sizes = {"keys_and_values": one.kv, "codes": one.payload, "scales": one.scales}
    return {key: _whole(value) for key, value in sizes.items()} | {"positions": one.positions}


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _notes(model: Architecture, codec: Codec, policy: Policy) -> list[str]:
    layers = model.spec.layers
    latent = any(layer.latent for layer in layers)
    sided = any(
        codec.bits_of(layer.head_dim, "keys", 2) != codec.bits_of(layer.head_dim, "values", 2)
        for layer in layers
    )
    notes = {
        f"{model.without} layers keep no keys and values: their state does not grow and is not counted": model.without,
        "a layer with a sliding window keeps one token less than it: the next one needs the place": any(
            layer.window for layer in layers
        ),
        "one latent stream a layer in the place of keys and values": latent,
        "the codec has other bits for keys than for values, and a latent stream counts their mean": latent
        and sided,
        "who keeps what depends on the text: these are the most tokens that the budget allows": policy.divides,
        "the text divides the budget among the layers: each counts as with its own share": policy.allocates,
        f"between two evictions up to {policy.interval - 1} tokens more are held": policy.evicts
        and policy.interval > 1,
    }
    return [note for note, so in notes.items() if so]


def command(
    name: Annotated[
        str, typer.Argument(help="As in qwen2-7b; or a config.json, its folder, a bundled model.")
    ],
    codec: Annotated[str, typer.Option(help="How keys and values are stored.")] = "full()",
    policy: Annotated[str, typer.Option(help='As in "snapkv(budget=1024)".')] = "full()",
    context: Annotated[
        list[int] | None, typer.Option(help="Tokens of a sequence; may be given several times.", min=1)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"The model's floats: {', '.join(ITEMSIZE)}; else the config's, or bfloat16."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object; sizes in bytes.")] = False,
) -> None:
    """Say what the keys and values of a model take, without running it: per token and per length of context.

    The K/V column holds codes and scales. The positions that kvtwin stores beside them are a column of their own; what
    a policy remembers is not counted.
    """
    model = open_architecture(name)
    floats = dtype or model.dtype or "bfloat16"
    if floats not in ITEMSIZE:
        raise KvtwinError(f"dtype is {dtype!r}; expected one of {', '.join(ITEMSIZE)}")
    found = measured(model, codecs.make(codec), policies.make(policy), context or list(CONTEXTS), floats)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    layers = f"{found['layers']} layers"
    for width, count in found["windows"].items():
        layers += f", {count} with a window of {width}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("tokens", no_wrap=True)
    for column in ("kept", "K/V", "codes", "scales", "of full", "positions"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("1", "", *_cells(found["per_token"], ""))
    if found["windows"]:
        table.add_row("1 more, windows full", "", *_cells(found["per_token_beyond_windows"], ""))
    for row in found["contexts"]:
        least, most = (f"{row[key]:,.10g}" for key in ("kept_least", "kept_most"))
        kept = least if least == most else f"{least}-{most}"
        table.add_row(f"{row['tokens']:,}", kept, *_cells(row, f"{row['of_full']:.3f}"))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    head = f"{found['model']}: {layers}; {found['dtype']}; {found['codec']}, {found['policy']}; KiB of one sequence"
    for line in (head, table, *found["notes"], f"source: {found['source']}"):
        console.print(line, markup=False, soft_wrap=line is not table)


def _cells(row: dict[str, Any], share: str) -> list[str]:
    kv, codes, scales, positions = (
        f"{row[key] / KIB:,.6f}".rstrip("0").rstrip(".")
        for key in ("keys_and_values", "codes", "scales", "positions")
    )
    return [kv, codes, scales, share, positions]
