"""`kvtwin collapse`: which codecs lose the text when keys have outlier channels, beside what was published of Qwen2-7B.

A model is given outliers of rising strength (experiments/outliers.py) and reads stretches of text one token a step, so
that every token but the current one is read from coded storage. What is told is the perplexity of all tokens after the
first of each stretch. All stretches are rows of one batch.

Models compute in float64 here: a number on the border of two codes falls to one side or the other by rounding, and once
a codec has lost the text each such code is felt. In float32 two backends differ in the fourth digit.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from experiments.demo import settled
from experiments.outliers import Sites, key_bias, pair_rescale
from experiments.record import folder, versions, whole
from framework.backend import Model
from framework.checkpoint import BUNDLED, Checkpoint, open_checkpoint
from framework.codec import codecs
from framework.errors import KvtwinError
from framework.tokenizer import Tokenizer

FULL = "full()"
CODECS = (FULL, "exl2_q8()", "exl2_q6()", "exl2_q4()", "kivi(bits=4, residual=32)")
USUAL = {"pair_rescale": CODECS, "key_bias": (*CODECS, "unbias(codec=exl2_q4())")}
REWRITES = {"pair_rescale": pair_rescale, "key_bias": key_bias}
STRENGTHS = {
    "pair_rescale": (1.0, 10.0, 30.0, 100.0, 300.0, 1000.0),
    "key_bias": (0.0, 30.0, 100.0, 300.0, 1000.0),
}
# Wikitext, five stretches of 1024 tokens one a step, in the documentation of ExLlamaV2 0.1.5
PUBLISHED = {FULL: 15.16, "exl2_q8()": 15.18, "exl2_q6()": 15.20, "exl2_q4()": 40.72}
AGREE = 5e-5  # of each other: four digits


@dataclass(frozen=True)
class Cell:
    """One codec at one strength on one backend.

    `perplexity`: None where there is none, and `error` says why; `silent`: numbers ceased to be finite and no error
    came. `ratio`: to the exact cache of this backend at this strength. `bytes_per_token`: codes and scales of keys and
    values, measured.
    """

    model: str
    rewrite: str
    strength: float
    codec: str
    backend: str
    dtype: str
    rows: int
    tokens: int
    perplexity: float | None
    ratio: float | None
    error: str | None
    silent: bool
    bytes_per_token: float | None
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Question:
    """What is measured on `checkpoint`, which is called `model`: each codec at each strength on each backend."""

    model: str
    checkpoint: Checkpoint
    text: np.ndarray
    rewrite: str = "pair_rescale"
    strengths: Sequence[float] = STRENGTHS["pair_rescale"]
    sites: Sites = Sites()
    codecs: Sequence[str] = CODECS
    backends: Sequence[str] = ("torch", "flax")
    dtype: str = "float64"


def stretches(tokens: np.ndarray, count: int, length: int) -> np.ndarray:
    """`count` stretches of `length` tokens, each with the one that follows, spread over a text without overlap."""
    starts = np.arange(0, len(tokens) - length, length)
    if not 0 < count <= len(starts):
        raise KvtwinError(
            f"{count} stretches of {length} tokens were asked for; expected from 1 to {len(starts)}, "
            f"which the text of {len(tokens)} tokens has"
        )
    chosen = starts[np.linspace(0, len(starts) - 1, count).round().astype(int)]
    return np.stack([tokens[start : start + length + 1] for start in chosen]).astype(np.int32)


def perplexity(model: Model, text: np.ndarray, codec: str) -> tuple[float, float]:
    """exp of the mean nats of the tokens after the first of each row, and bytes of keys and values of a token.

    Not finite where a logit is not.
    """
    length = text.shape[1] - 1
    cache = model.cache(codec=codec, batch=len(text), capacity=length, length=length)
    nats = np.zeros((len(text), length))
    for place in range(length):
        logits, cache = model.step(text[:, place : place + 1], cache)
        nats[:, place] = surprise(logits[:, 0], text[:, place + 1])
    held = cache.bytes
    return float(np.exp(nats.mean())), (held.payload + held.scales) / nats.size


def surprise(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Minus the log-probability of each row's token, in float64; NaN where a logit of the row is not finite."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        wide = wide - wide.max(-1, keepdims=True)
    return np.log(np.exp(wide).sum(-1)) - wide[np.arange(len(tokens)), tokens]


def ask(question: Question) -> Iterator[Cell]:
    """The cells, one strength after the other; the exact cache, which ratios refer to, comes first at each."""
    from backends import backends

    spelled = [codecs.spelling(codecs.make(each)) for each in question.codecs]
    ordered = [FULL, *(each for each in dict.fromkeys(spelled) if each != FULL)]
    checkpoint = question.checkpoint
    for strength in question.strengths:
        spec, weights = REWRITES[question.rewrite](
            checkpoint.spec, checkpoint.weights, strength, question.sites
        )
        for backend in question.backends:
            model = backends.get(backend).build(spec, weights, question.dtype, checkpoint.tokenizer)
            for codec in ordered:
                model.cache(codec=codec)  # refuses what does not fit the model, whatever the numbers are
            exact = None
            for codec in ordered:
                cell = _cell(question, model, backend, strength, codec, exact)
                exact = cell.perplexity if codec == FULL else exact
                yield cell


def _cell(
    question: Question, model: Model, backend: str, strength: float, codec: str, exact: float | None
) -> Cell:
    begun = time.perf_counter()
    found = held = error = None
    silent = False
    try:
        found, held = perplexity(model, question.text, codec)
    except KvtwinError as raised:
        error = str(raised)
    if found is not None and not math.isfinite(found):
        found, silent, error = None, True, f"the perplexity is {found}, and no error came"
    exact = found if codec == FULL else exact
    return Cell(
        model=question.model,
        rewrite=question.rewrite,
        strength=strength,
        codec=codec,
        backend=backend,
        dtype=model.dtype,
        rows=len(question.text),
        tokens=question.text.shape[1] - 1,
        perplexity=found,
        ratio=None if found is None or exact is None else found / exact,
        error=error,
        silent=silent,
        bytes_per_token=held,
        seconds=time.perf_counter() - begun,
        versions=versions(),
    )


def agree(cells: Sequence[Cell]) -> bool:
    """True if the backends have the same perplexity to four digits, or all of them an error."""
    found = [cell.perplexity for cell in cells if cell.perplexity is not None]
    return not found or (len(found) == len(cells) and max(found) - min(found) <= AGREE * min(found))


def grouped(cells: Sequence[Cell]) -> dict[tuple[str, float], list[Cell]]:
    """The cells of each codec and strength, one for each backend."""
    found: dict[tuple[str, float], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.codec, cell.strength), []).append(cell)
    return found


def encoded(path: Path | None, tokenizer: Tokenizer) -> np.ndarray:
    """A file of text as tokens; None: the held-out text that comes with kvtwin."""
    path = path or BUNDLED / "text" / "held_out.txt"
    try:
        return np.array(tokenizer.encode(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise KvtwinError(f"cannot read the text {path}: {error}") from error


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")] = "bytes",
    codec: Annotated[
        list[str] | None, typer.Option(help="As in exl2_q4(); may be given several times.")
    ] = None,
    rewrite: Annotated[str, typer.Option(help="pair_rescale or key_bias.")] = "pair_rescale",
    strength: Annotated[
        list[float] | None, typer.Option(help="Factor of the pair, or bias; may be given several times.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="By default the first and the last.")] = None,
    head: Annotated[list[int] | None, typer.Option(help="Of keys and values; by default all.")] = None,
    pair: Annotated[int | None, typer.Option(help="By default the one that turns slowest.")] = None,
    backends: Annotated[str, typer.Option(help="Some of reference, torch, flax.")] = "torch,flax",
    dtype: Annotated[str, typer.Option(help="What the backends compute in.")] = "float64",
    text: Annotated[
        Path | None, typer.Option(help="A file of text; by default the held-out text of bytes.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Stretches of text, read side by side.")] = 24,
    tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Folder for collapse.jsonl and collapse.png.")] = None,
) -> None:
    """Measure the perplexity of codecs under outlier keys; exit code 1 when backends differ or numbers run out."""
    from rich.console import Console

    from experiments import collapse_report

    if rewrite not in REWRITES:
        raise KvtwinError(f"no rewrite {rewrite!r}; expected {' or '.join(REWRITES)}")
    if tokens < 1:
        raise KvtwinError(f"stretches of {tokens} tokens; expected at least 1")
    place = None if out is None else folder(out)
    checkpoint = open_checkpoint(model)
    question = Question(
        model,
        checkpoint,
        stretches(encoded(text, checkpoint.tokenizer), rows, tokens),
        rewrite,
        strength or STRENGTHS[rewrite],
        Sites(layers=layer, heads=head, pair=pair),
        codec or USUAL[rewrite],
        [each.strip() for each in backends.split(",")],
        dtype,
    )
    cells: list[Cell] = []
    with settled(hasty=False):
        for cell in ask(question):
            cells.append(cell)
            shown = cell.error.splitlines()[0] if cell.error else f"{cell.perplexity:.4f}"
            _say(f"{cell.codec} at {cell.strength:g} on {cell.backend}: {shown}")
    if place is not None:
        with whole(place / "collapse.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(asdict(cell)) + "\n" for cell in cells))
        collapse_report.plot(cells, place / "collapse.png")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=collapse_report.WIDTH)
    console.print(collapse_report.title(cells), style="bold", markup=False)
    console.print(collapse_report.table(cells))
    for line in collapse_report.notes(cells):
        console.print(line, markup=False)
    wrong = [f"{codec} at {at:g}" for (codec, at), each in grouped(cells).items() if not agree(each)]
    wrong += [f"{cell.codec} at {cell.strength:g} on {cell.backend}" for cell in cells if cell.silent]
    if wrong:
        print(f"kvtwin: backends differ or numbers ran out: {', '.join(wrong)}", file=sys.stderr)
        raise typer.Exit(1)


def _say(text: Any) -> None:
    """One line of progress on standard error."""
    print(f"kvtwin collapse: {text}", file=sys.stderr, flush=True)
