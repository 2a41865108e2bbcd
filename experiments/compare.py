"""`kvtwin compare`: does a backend do what the reference does? Taps, kept sets and tokens, and an exit code.

The reference runs in float64 on the weights as cast to the dtype: it reads a ragged batch of two prompts, decodes
greedily and records what it decides. Each backend is then led along the same tokens with the same kept sets forced, its
own decision compared at every step (replay), and runs once freely in its own decode loop.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import ml_dtypes
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from framework.backend import Model
from framework.cache import Decision
from framework.checkpoint import BUNDLED, Checkpoint, open_checkpoint
from framework.compare import (
    JUDGE,
    KL,
    OVERLAP,
    TOLERANCE,
    TOP,
    Distributions,
    KeptAgreement,
    TapDrift,
    TokenAgreement,
    as_record,
    distributions,
    drift,
    kept_agreement,
    layer_drifts,
    tap_drifts,
    token_agreement,
)
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.generate import read_again
from framework.policy import Policy
from framework.shapes import EMPTY
from framework.tokenizer import ByteTokenizer
from framework.weights import Weights

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}
JUDGED = 256  # positions; beyond them the float32 angles of Hugging Face are the larger error


@dataclass
class Trace:
    """What one run over a ragged prompt and then one token a step recorded.

    `fed`: the tokens of the steps [batch, steps]. `logits` [batch, vocab] after the prompt and after each token;
    `decisions` [call][layer]; `taps` of the prompt and of the last step.
    """

    prompt: np.ndarray
    fed: np.ndarray
    logits: list[np.ndarray] = field(default_factory=list)
    prompt_logits: np.ndarray = field(default_factory=lambda: np.zeros(0))
    decisions: list[list[Decision]] = field(default_factory=list)
    taps: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    kept: list[np.ndarray] = field(default_factory=list)


def run(
    model: Model,
    prompt: np.ndarray,
    policy: str | Policy,
    steps: int,
    along: Trace | None = None,
    watch: bool = True,
) -> Trace:
    """Read the prompt and go on `steps` tokens: greedily, or with the tokens and the kept sets of another run.

    `watch=False` leaves the taps out.
    """
    fed = np.full((len(prompt), steps), -1, np.int32) if along is None else along.fed
    trace = Trace(prompt, fed)
    cache = model.cache(policy, batch=len(prompt), length=prompt.shape[1] + steps)
    tokens = prompt
    for call in range(steps + 1):
        watched = watch and call in (0, steps)
        taps: dict[str, np.ndarray] | None = {} if watched else None
        decisions: list[Decision] = []
        forced = None
        if along is not None and along.decisions[call]:
            forced = [decision.kept for decision in along.decisions[call]]
        feed = model.step if call else partial(prompted, model)
        logits, cache = feed(tokens, cache, logits="all", forced=forced, decisions=decisions, taps=taps)
        assert logits is not None
        if taps is not None:
            trace.taps["prompt" if call == 0 else f"step {call}"] = _of_tokens(taps, tokens)
        if call == 0:
            trace.prompt_logits = logits
        last = np.where(tokens >= 0, np.arange(tokens.shape[1]), 0).max(1)
        trace.logits.append(logits[np.arange(len(tokens)), last])
        trace.decisions.append(decisions)
        if call < steps:
            if along is None:
                trace.fed[:, call] = trace.logits[-1].argmax(-1)
            tokens = trace.fed[:, call : call + 1]
    trace.kept = cache.kept
    return trace


def prompted(
    model: Model, prompt: np.ndarray, cache: Any, *, forced: Any = None, decisions: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A prompt, with what the policy reads behind it before it evicts."""
    encode = partial(model.tokenizer.encode, opening=False)
    passes = [cache.policy.passes(row[row >= 0].tolist(), encode) for row in prompt]
    if not any(passes):
        return model.step(prompt, cache, phase="prefill", forced=forced, decisions=decisions, **options)
    logits, cache = model.step(prompt, cache, phase="prefill", evict=False, **options)
    nothing = np.full((len(prompt), 1), EMPTY, np.int32)
    cache = read_again(model, cache, passes)
    _, cache = model.step(nothing, cache, logits=None, phase="prefill", forced=forced, decisions=decisions)
    return logits, cache


def _of_tokens(taps: Mapping[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The values with 0 at padding, where a backend may leave anything."""
    real = tokens >= 0
    return {
        key: np.where(real.reshape(*real.shape, *(1,) * (value.ndim - 2)), value, 0)
        for key, value in taps.items()
    }


@dataclass(frozen=True)
class Verdict:
    """How one backend compares with the reference. `failures`: what is outside tolerance, one sentence each.

    `free_kept`: of the heads at the end of the free run, how many hold the same tokens, and how many there are.
    """

    backend: str
    first_tap: TapDrift | None
    layers: list[float]
    logits: float
    kept: KeptAgreement | None
    tokens: TokenAgreement
    free_kept: tuple[int, int] | None
    distributions: Distributions
    failures: list[str]


def examine(name: str, model: Model, expected: Trace, policy: str | Policy, dtype: str) -> Verdict:
    """Compare one backend with what the reference recorded: one replay and one free run."""
    steps = expected.fed.shape[1]
    found = run(model, expected.prompt, policy, steps, along=expected)
    tolerance = TOLERANCE.get(dtype)
    taps = [
        replace(tap, name=f"{call}: {tap.name}")
        for call in expected.taps
        for tap in tap_drifts(found.taps[call], expected.taps[call])
    ]
    layers = np.max([layer_drifts(found.taps[call], expected.taps[call]) for call in expected.taps], axis=0)
    kept = None
    if any(expected.decisions):
        kept = kept_agreement(found.decisions, expected.decisions, tolerance or 0.0)
    free, free_logits, free_kept = free_run(model, expected.prompt, policy, steps)
    chosen_from = np.stack(expected.logits[:-1], axis=1)
    tokens = token_agreement(free, expected.fed, chosen_from)
    far = max(drift(ours, theirs) for ours, theirs in zip(found.logits, expected.logits, strict=True))
    verdict = Verdict(
        name,
        None if tolerance is None else next((tap for tap in taps if not tap.drift <= tolerance), None),
        [float(x) for x in layers],
        far,
        kept,
        tokens,
        same_sets(free_kept, expected.kept) if kept is not None else None,
        distributions(np.stack(found.logits), np.stack(expected.logits)),
        [],
    )
    last = drift(free_logits, expected.logits[-1]) if tokens.step < 0 else 0.0
    return replace(verdict, failures=_failures(verdict, dtype, last))


def free_run(
    model: Model, prompt: np.ndarray, policy: str | Policy, steps: int
) -> tuple[np.ndarray, np.ndarray, list]:
    """Tokens, last logits and kept positions of the backend's own greedy loop."""
    cache = model.cache(policy, batch=len(prompt), length=prompt.shape[1] + steps)
    logits, cache = prompted(model, prompt, cache)
    assert logits is not None
    tokens, last, cache = model.decode(cache, logits[:, 0], Sampling(), (), steps)
    return tokens, last, cache.kept


def same_sets(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[int, int]:
    """Of the heads of all layers and rows: how many hold the same tokens, and how many there are."""
    same = [
        set(ours[where].tolist()) - {-1} == set(theirs[where].tolist()) - {-1}
        for ours, theirs in zip(found, expected, strict=True)
        for where in np.ndindex(theirs.shape[:2])
    ]
    return sum(same), len(same)


def _failures(verdict: Verdict, dtype: str, last: float) -> list[str]:
    if dtype not in TOLERANCE:
        near = verdict.distributions
        if near.within(dtype):
            return []
        return [
            f"KL {near.kl:.1e} and top-k overlap {near.overlap:.3f}; "
            f"expected at most {KL[dtype]} and at least {OVERLAP[dtype]}"
        ]
    tolerance, failures = TOLERANCE[dtype], []
    if verdict.first_tap is not None:
        failures.append(f"tap {verdict.first_tap.name} drifts by {verdict.first_tap.drift:.1e}")
    if not verdict.logits <= tolerance:
        failures.append(f"logits drift by {verdict.logits:.1e}")
    swapped = False
    if verdict.kept is not None:
        swapped = verdict.kept.swapped > 0
        if verdict.kept.mismatches:
            wrong = verdict.kept.mismatches
            failures.append(f"{len(wrong)} kept sets differ, first at {wrong[0]}")
        if not verdict.kept.score_drift <= tolerance:
            failures.append(f"scores drift by {verdict.kept.score_drift:.1e}")
    tokens = verdict.tokens
    if not tokens.within(tolerance):
        failures.append(
            f"free tokens part at step {tokens.step} of row {tokens.row}, logit gap {tokens.gap:.1e}"
        )
    elif tokens.step < 0 and not swapped:
        if verdict.free_kept is not None and verdict.free_kept[0] < verdict.free_kept[1]:
            failures.append("kept sets at the end of the free run: {} of {} equal".format(*verdict.free_kept))
        if not last <= tolerance:
            failures.append(f"logits at the end of the free run drift by {last:.1e}")
    return failures


def judge(checkpoint: Checkpoint, expected: Trace, dtype: str) -> Verdict:
    """Hugging Face transformers on the same folder, in float64, led along the reference's tokens."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, dtype=torch.float64, attn_implementation="eager", local_files_only=True
        ).eval()
    except Exception as error:  # whatever it wants of a config, in its own classes of errors
        reason = " ".join(str(error).split())[:300]
        raise KvtwinError(
            f"hf cannot load {checkpoint.folder}: {reason}\nleave hf out of --backends"
        ) from error
    kind = getattr(torch, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind).to(torch.float64)
    worst, ours, theirs = 0.0, [], []
    for row, prompt in enumerate(expected.prompt):
        real = prompt[prompt >= 0]
        text = np.concatenate([real, expected.fed[row]])
        with torch.no_grad():
            logits = model(torch.from_numpy(text.astype(np.int64))[None], use_cache=False).logits[0].numpy()
        right = np.concatenate(
            [expected.prompt_logits[row, : len(real) - 1], [x[row] for x in expected.logits]]
        )
        worst = max(worst, drift(logits, right))
        ours.append(logits[len(real) - 1 :])
        theirs.append(right[len(real) - 1 :])
    found = np.stack(ours)
    tokens = token_agreement(
        found[:, :-1].argmax(-1).astype(np.int32), expected.fed, np.stack(theirs)[:, :-1]
    )
    failures = [] if worst <= JUDGE else [f"logits drift by {worst:.1e}; expected at most {JUDGE}"]
    if not tokens.within(JUDGE):
        failures.append(f"tokens part at step {tokens.step} of row {tokens.row}, logit gap {tokens.gap:.1e}")
    return Verdict(
        "hf", None, [], worst, None, tokens, None, distributions(found, np.stack(theirs)), failures
    )


def prompts(checkpoint: Checkpoint, tokens: int, rows: int = 2) -> np.ndarray:
    """Rows of held-out text for byte models, else random tokens; each row a quarter shorter than the one before."""
    spec = checkpoint.spec
    if isinstance(checkpoint.tokenizer, ByteTokenizer) and spec.vocab >= 256:
        text = np.frombuffer((BUNDLED / "text" / "held_out.txt").read_bytes(), np.uint8)
        content = np.resize(text, (rows, tokens)).astype(np.int32)
    else:
        content = np.random.default_rng(0).integers(0, spec.vocab, (rows, tokens), dtype=np.int32)
    for row in range(rows):
        content[row, max(1, tokens - row * (tokens // 4)) :] = -1
    return content


def cast(weights: Mapping[str, np.ndarray], dtype: str) -> Weights:
    """The weights in float64, after the rounding to `dtype`."""
    return {key: value.astype(DTYPES[dtype]).astype(np.float64) for key, value in weights.items()}


def command(
    model: Annotated[str, typer.Argument(help="A bundled name, a folder on disk, or org/name.")],
    policy: Annotated[str, typer.Option(help='As in "h2o(budget=64)".')] = "full()",
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16, or float16 on torch.")] = "float32",
    backends: Annotated[
        str, typer.Option(help="Some of reference, torch, flax, hf; the reference always runs.")
    ] = "reference,torch,flax",
    tokens: Annotated[int, typer.Option(help="Tokens in the longer of the two prompts.")] = 96,
    steps: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Compare backends with the reference; exit code 1 when one is outside tolerance."""
    from backends import backends as known

    names = [name.strip() for name in backends.split(",")]
    if dtype not in DTYPES:
        raise KvtwinError(f"no dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if tokens < 2 or steps < 1:
        raise KvtwinError(f"{tokens} tokens and {steps} steps; expected at least 2 and 1")
    makers = {name: known.get(name) for name in names if name not in ("hf", "reference")}
    if not {*makers, *({"hf"} & {*names})}:
        raise KvtwinError(f"backends {backends!r} name none beside the reference; expected torch, flax or hf")
    for maker in makers.values():
        maker.check_dtype(dtype)
    checkpoint = open_checkpoint(model)
    reference = known.get("reference").build(
        checkpoint.spec, cast(checkpoint.weights, dtype), dtype="float64"
    )
    start = reference.cache(policy)
    if "hf" in names and (start.policy.evicts or tokens + steps > JUDGED or dtype not in TOLERANCE):
        raise KvtwinError(
            f"hf judges policy full in {' or '.join(TOLERANCE)} at positions below {JUDGED}; "
            f"got {policy} in {dtype} with {tokens} + {steps} tokens: leave it out of --backends, or change those"
        )
    expected = run(reference, prompts(checkpoint, tokens), start.policy, steps)
    verdicts = []
    for name in names:
        if name == "hf":
            verdicts.append(judge(checkpoint, expected, dtype))
        elif name != "reference":
            built = makers[name].build(checkpoint.spec, checkpoint.weights, dtype)
            verdicts.append(examine(name, built, expected, start.policy, dtype))
    title = f"{model}, {policy}, {dtype}, {tokens} + {steps} tokens, against the reference in float64"
    if as_json:
        typer.echo(json.dumps(_record(model, policy, dtype, tokens, steps, verdicts)))
    else:
        _show(title, dtype, verdicts)
    if any(verdict.failures for verdict in verdicts):
        raise typer.Exit(1)


def _record(
    model: str, policy: str, dtype: str, tokens: int, steps: int, verdicts: list[Verdict]
) -> dict[str, Any]:
    def plain(verdict: Verdict) -> dict[str, Any]:
        record = dict(verdict.__dict__)
        for key in ("first_tap", "kept", "tokens", "distributions"):
            record[key] = None if record[key] is None else as_record(record[key])
        return record | {"within": not verdict.failures}

    return {
        "model": model,
        "policy": policy,
        "dtype": dtype,
        "tokens": tokens,
        "steps": steps,
        "tolerance": TOLERANCE.get(dtype),
        "within": not any(verdict.failures for verdict in verdicts),
        "backends": {verdict.backend: plain(verdict) for verdict in verdicts},
    }


def _show(title: str, dtype: str, verdicts: list[Verdict]) -> None:
    console = Console()
    wide = console if console.is_terminal else Console(width=140)
    table = Table(title=title, title_justify="left")
    for column in ("backend", "first differing tap", "logits drift", "KL", f"top-{TOP} overlap", "verdict"):
        table.add_column(column)
    for one in verdicts:
        judged = dtype in TOLERANCE
        tap = "none" if one.first_tap is None else f"{one.first_tap.name} ({one.first_tap.drift:.1e})"
        table.add_row(
            one.backend,
            tap if judged and one.backend != "hf" else "not judged",
            f"{one.logits:.1e}",
            f"{one.distributions.kl:.1e}",
            f"{one.distributions.overlap:.3f}",
            "[red]outside tolerance" if one.failures else "[green]within tolerance",
        )
    wide.print(table)
    layered = [one for one in verdicts if one.layers]
    if layered:
        table = Table(title="Drift per layer", title_justify="left")
        table.add_column("layer", justify="right")
        for one in layered:
            table.add_column(one.backend)
        for index in range(len(layered[0].layers)):
            table.add_row(str(index), *(f"{one.layers[index]:.1e}" for one in layered))
        wide.print(table)
    kept = [one for one in verdicts if one.kept is not None]
    if kept:
        table = Table(title="Kept sets, the reference's forced at every step", title_justify="left")
        for column in (
            "backend", "decisions", "equal", "swapped by rounding", "largest gap", "mismatches", "overlap",
            "score drift", "equal after the free run",
        ):  # fmt: skip
            table.add_column(column)
        for one in kept:
            assert one.kept is not None
            assert one.free_kept is not None
            table.add_row(
                one.backend, str(one.kept.decisions), str(one.kept.equal), str(one.kept.swapped),
                f"{one.kept.gap:.1e}", str(len(one.kept.mismatches)), f"{one.kept.overlap:.4f}",
                f"{one.kept.score_drift:.1e}", "{} of {}".format(*one.free_kept),
            )  # fmt: skip
        wide.print(table)
    table = Table(title="Greedy tokens, running freely", title_justify="left")
    for column in ("backend", "tokens", "agreeing", "first divergence", "logit gap there"):
        table.add_column(column)
    for one in verdicts:
        where = "none" if one.tokens.step < 0 else f"row {one.tokens.row}, step {one.tokens.step}"
        gap = "" if one.tokens.step < 0 else f"{one.tokens.gap:.1e}"
        table.add_row(one.backend, str(one.tokens.tokens), str(one.tokens.agreeing), where, gap)
    wide.print(table)
    for one in verdicts:
        for failure in one.failures:
            wide.print(f"{one.backend}: {failure}", style="red", markup=False)
