"""The main job, `kvtwin demo`: every policy at two budgets on both backends, on real text and on recall prompts.

Prompts of different lengths go in as one batch and are compressed; then the given tokens that follow are fed one by
one, evicting at each step, and compared with the full cache; then both backends write on greedily by themselves.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from experiments.record import Row, folder, versions, write
from framework.backend import Model
from framework.cache import Bytes, Decision
from framework.compare import TOLERANCE, drift, token_agreement
from framework.models import recall_form
from framework.policy import policies

PAIR = ("torch", "flax")
EVERY = 8  # steps between two comparisons of the kept sets
WARM = 4  # steps left out of the time

Load = Callable[[str, str], Model]


@dataclass(frozen=True)
class Settings:
    """What the demo asks, of the policies in `names`.

    `prompts`: bytes of each text prompt, `steps` those given after it, `greedy` those that the model then writes.
    `recalls` prompts of `recall_lengths` bytes hold `pairs` planted pairs each, and ask for one.
    """

    text: str = "bytes"
    recall: str = "recall"
    names: tuple[str, ...] = ("h2o", "keep_it_odd", "key_norm", "random", "snapkv", "tova", "window")
    budgets: tuple[int, ...] = (48, 128)
    prompts: tuple[int, ...] = (512, 480, 432, 384)
    steps: int = 64
    greedy: int = 32
    recalls: int = 24
    recall_lengths: tuple[int, int] = (160, 256)
    pairs: int = 8
    seed: int = 0

    def spellings(self) -> list[str]:
        """The policies, each at its budgets; the full cache, which all are compared with, first."""
        return ["full()"] + [f"{name}(budget={budget})" for name in self.names for budget in self.budgets]


@dataclass(frozen=True)
class Task:
    """One batch: prompts, the tokens given after them [batch, steps], tokens to write, answers where there are any."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    given: np.ndarray
    greedy: int
    answers: np.ndarray | None = None


@dataclass(frozen=True)
class Run:
    """What one backend did with a task under one policy.

    `logits` [steps, batch, vocab] after each given token; `kept` at several points, the first after the prompt;
    `written` [greedy, batch] with the logits `choices` that they were chosen from.
    """

    logits: np.ndarray
    kept: list[list[np.ndarray]]
    written: np.ndarray
    choices: np.ndarray
    held: list[np.ndarray]
    bytes: Bytes
    seconds: list[float]


@dataclass(frozen=True)
class Verdict:
    """Whether two runs did the same, in words; `drift` of the logits, and kept tokens swapped within rounding."""

    equal: bool
    text: str
    drift: float
    swaps: int = 0


def text_task(settings: Settings) -> Task:
    """Pieces of the held-out text, evenly spread."""
    text = (Path(recall_form.__file__).parent / "text" / "held_out.txt").read_bytes()
    count = len(settings.prompts)
    starts = [len(text) * row // count for row in range(count)]
    prompts = tuple(tuple(text[s : s + n]) for s, n in zip(starts, settings.prompts, strict=True))
    ends = [s + n for s, n in zip(starts, settings.prompts, strict=True)]
    given = np.array([list(text[end : end + settings.steps]) for end in ends], np.int32)
    return Task(settings.text, prompts, given, settings.greedy)


def recall_task(settings: Settings) -> Task:
    """Recall prompts without their question, which is the one given token: what to keep is decided before it comes."""
    random = np.random.default_rng(settings.seed)
    low, high = settings.recall_lengths
    made = [
        recall_form.prompt(random, int(random.integers(low, high + 1)), settings.pairs)
        for _ in range(settings.recalls)
    ]
    prompts = tuple(tuple(int(x) for x in one.tokens[:-1]) for one in made)
    given = np.array([one.tokens[-1:] for one in made], np.int32)
    return Task(settings.recall, prompts, given, 0, np.array([one.answer for one in made]))


def run(model: Model, policy: str, task: Task, every: int = EVERY, only: int | None = None) -> Run:
    """Prompts, then the given tokens one a step, then tokens of its own; or `only` so many given tokens.

    The cache has room for the whole task in any case, so that what is compiled stays the same.
    """
    longest, steps = max(map(len, task.prompts)), task.given.shape[1]
    cache = model.cache(policy, batch=len(task.prompts), capacity=longest + steps + task.greedy)
    out, cache = model.step(task.prompts, cache, phase="prefill")
    kept, logits, seconds = [cache.kept], [], []
    for step in range(steps if only is None else only):
        begun = time.perf_counter()
        out, cache = model.step(task.given[:, step : step + 1], cache)
        seconds.append(time.perf_counter() - begun)
        logits.append(out[:, 0])
        if (step + 1) % every == 0 or step + 1 == steps:
            kept.append(cache.kept)
    held, size = kept[-1], cache.bytes
    written, choices = [], []
    for _ in range(task.greedy if only is None else 0):
        choices.append(out[:, 0])
        written.append(out[:, 0].argmax(-1))
        out, cache = model.step(written[-1][:, None], cache)
    nothing = np.zeros((0, len(task.prompts)))
    return Run(
        np.array(logits),
        kept,
        np.array(written) if written else nothing.astype(np.int64),
        np.array(choices) if choices else nothing[..., None],
        held,
        size,
        seconds,
    )


def warm(model: Model, policy: str, task: Task) -> None:
    """Compile what `run` will need."""
    run(model, policy, task, only=1)


def same_sets(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    """True if every head of every layer holds the same positions."""
    return all(x.shape == y.shape and (x == y).all() for x, y in zip(a, b, strict=True))


def judge(models: Sequence[Model], policy: str, task: Task, runs: Sequence[Run]) -> Verdict:
    """Compare two runs: the kept sets first, then the logits, then the text that they wrote.

    Any number of swaps within rounding counts as equal, and is told: the keys of `recall` all have one norm but for
    rounding, so that key_norm decides there between near-ties only.
    """
    first, second = runs
    moved, swaps, reason = drift(second.logits, first.logits), 0, ""
    same = all(same_sets(a, b) for a, b in zip(first.kept, second.kept, strict=True))
    if not same:
        swaps, moved, reason = replay(models, policy, task)
    if not reason and not moved <= TOLERANCE["float32"]:
        reason = f"drift {moved:.0e}"
    if not reason and same:
        reason = other_text(first, second, moved)
    if reason:
        return Verdict(False, reason, moved, swaps)
    return Verdict(True, f"equal, {swaps} ties" if swaps else "equal", moved, swaps)


def other_text(first: Run, second: Run, moved: float) -> str:
    """What is wrong with the texts; empty where they agree up to a choice that rounding may turn."""
    if not first.written.size:
        return ""
    logits = np.swapaxes(first.choices, 0, 1)
    agreement = token_agreement(second.written.T, first.written.T, logits)
    return "" if agreement.within(2 * moved) else f"text differs at token {agreement.step}"


def replay(models: Sequence[Model], policy: str, task: Task) -> tuple[int, float, str]:
    """Lead the first backend along what the second keeps, and compare its own choice at every step.

    Returns the sets that differ by a swap within rounding, the drift of the logits, and what is wrong. Nothing is
    compiled for it: the second backend runs freely once more, the first is eager.
    """
    first, second = models
    evicts = policies.make(policy).evicts
    lead = run(second, policy, replace(task, greedy=0), every=1)
    parts: list[Any] = [task.prompts, *np.split(task.given, task.given.shape[1], axis=1)]
    cache, swaps, logits = first.cache(policy, batch=len(task.prompts)), 0, []
    for step, (tokens, kept) in enumerate(zip(parts, lead.kept, strict=True)):
        own: list[Decision] = []
        forced = [
            positions for positions, at in zip(kept, first.spec.layers, strict=True) if evicts or at.window
        ]
        out, cache = first.step(tokens, cache, forced=forced, decisions=own)
        logits.append(out[:, 0])
        for one in own:
            count, near = swapped(one, kept[one.layer])
            swaps += count
            if not near:
                return swaps, float("inf"), f"keeps others: step {step} layer {one.layer}"
    return swaps, drift(lead.logits, np.array(logits[1:])), ""


def swapped(own: Decision, kept: np.ndarray) -> tuple[int, bool]:
    """How many heads kept other positions, and whether the scores of all that differ are equal up to rounding."""
    count = 0
    for row, head in np.ndindex(kept.shape[:2]):
        mine, theirs = (x[row, head][x[row, head] >= 0] for x in (own.kept, kept))
        differing = np.setxor1d(mine, theirs)
        if len(differing):
            place = np.isin(own.positions[row, head], differing)
            scores = own.scores[row, head]
            exact = (
                scores == np.round(scores)
            ).all()  # whole numbers have no rounding: there the tie rule decides
            near = np.ptp(scores[place]) <= TOLERANCE["float32"] * np.abs(scores).max()
            count += 1
            if exact or not near or own.protected[row, head][place].any() or len(mine) != len(theirs):
                return count, False
    return count, True


def divergence(found: np.ndarray, full: np.ndarray) -> np.ndarray:
    """KL of the next-token distribution from the one under the full cache, in nats."""

    def logs(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    return (np.exp(logs(full)) * (logs(full) - logs(found))).sum(-1)


def row_of(
    model: Model, backend: str, policy: str, task: Task, done: Run, full: Run, verdict: Verdict
) -> Row:
    """What a run amounts to."""
    made = policies.make(policy)
    budget = made.budget if isinstance(made.budget, int) else None
    counts = [(layer >= 0).sum(-1) for layer in done.held]
    seen = [len(prompt) + task.given.shape[1] for prompt in task.prompts]
    item = np.dtype(np.float32).itemsize
    slot = sum(one.heads * one.width * item for layer in model.spec.layers for one in layer.streams.values())
    flags = []
    if budget is not None:
        due = np.minimum(np.array(seen), budget)[:, None]
        if all((count == np.array(seen)[:, None]).all() for count in counts):
            flags.append("never_fired")
        if any((count != due).any() for count in counts):
            flags.append("missed_budget")
    kl = divergence(done.logits, full.logits)
    recalled = predicted = None
    if task.answers is not None:
        came = done.logits[0].argmax(-1)
        recalled = float((came == task.answers).mean())
        whole = [np.array([*prompt, *more]) for prompt, more in zip(task.prompts, task.given, strict=True)]
        kept = [positions[0][positions[0] >= 0] for positions in done.kept[0][1]]
        closed = [recall_form.predict(tokens, each) for tokens, each in zip(whole, kept, strict=True)]
        predicted = float((came == np.array(closed)).mean())
    timed = done.seconds[WARM:]
    return Row(
        model=task.model,
        policy=policy,
        backend=backend,
        codec="full()",
        dtype=model.dtype,
        prompts=tuple(map(len, task.prompts)),
        steps=task.given.shape[1],
        requested_tokens=budget,
        kept_min=int(min(count.min() for count in counts)),
        kept_max=int(max(count.max() for count in counts)),
        kept_layers=tuple((int(count.min()), int(count.max())) for count in counts),
        requested_bytes=None if budget is None else budget * slot * len(task.prompts),
        payload_bytes=done.bytes.payload,
        allocated_bytes=done.bytes.capacity,
        memory_bytes=done.bytes.memory,
        queries_bytes=done.bytes.queries,
        positions_bytes=done.bytes.positions,
        padding_bytes=done.bytes.padding,
        kl=float(kl.mean()),
        kl_first=float(kl[0].mean()),
        top1=float((done.logits.argmax(-1) == full.logits.argmax(-1)).mean()),
        recall=recalled,
        as_predicted=predicted,
        tokens_per_second=len(task.prompts) / float(np.median(timed)) if len(timed) >= WARM else None,
        flags=tuple(flags),
        equal=verdict.equal,
        verdict=verdict.text,
        drift=verdict.drift,
        swaps=verdict.swaps,
        versions=versions(),
    )


def load(backend: str, model: str) -> Model:
    """A bundled model on a backend, by name, in float32."""
    from backends import backends

    return backends.get(backend).load(model)


@contextmanager
def settled(hasty: bool) -> Iterator[None]:
    """torch on one thread: these models are too small to share, and a second thread only waits.

    `hasty`: flax compiles in half the time, into slower programs, for what is run once and not timed.
    """
    import jax
    import torch

    threads, before = torch.get_num_threads(), jax.config.read("jax_disable_most_optimizations")
    torch.set_num_threads(1)
    jax.config.update("jax_disable_most_optimizations", hasty or before)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        jax.config.update("jax_disable_most_optimizations", before)


def ask(task: Task, spellings: Sequence[str], load: Load = load) -> Iterator[list[Row]]:
    """The rows of each policy, one for each backend. The first policy is the one that all are compared with."""
    with settled(hasty=task.given.shape[1] <= WARM):
        yield from _ask(task, spellings, load)


def _ask(task: Task, spellings: Sequence[str], load: Load) -> Iterator[list[Row]]:
    models = [load(backend, task.model) for backend in PAIR]
    # Compiling takes most of the demo's time and one thread leaves a core idle.
    warm(models[1], spellings[0], task)
    with ThreadPoolExecutor(2) as pool:
        for compiled in [pool.submit(warm, models[1], policy, task) for policy in spellings[1:]]:
            compiled.result()
    full: list[Run] = []
    for policy in spellings:
        runs = [run(model, policy, task) for model in models]
        full = full or runs
        verdict = judge(models, policy, task, runs)
        yield [
            row_of(model, backend, policy, task, done, base, verdict)
            for model, backend, done, base in zip(models, PAIR, runs, full, strict=True)
        ]


def command(
    out: Annotated[Path, typer.Option(help="Folder for results.jsonl and quality.png.")] = Path("results"),
) -> None:
    """Run the classic policies at two budgets on both backends and say whether they did the same."""
    from rich.console import Console

    from experiments import report

    begun = time.perf_counter()
    place, settings = folder(out), Settings()
    spellings, rows, console = settings.spellings(), [], Console()
    if not console.is_terminal:
        console = Console(width=report.WIDTH)
    for task in (text_task(settings), recall_task(settings)):
        _say(f"{task.model}: compiling for {len(spellings)} policies")
        for pair in ask(task, spellings):
            rows += pair
            _say(f"{task.model}: {pair[0].policy} {pair[0].verdict}")
    write(rows, place / "results.jsonl")
    report.plot(rows, place / "quality.png")
    for table in report.tables(rows):
        console.print(table)
    differing = sum(not row.equal for row in rows) // len(PAIR)
    count = len(rows) // len(PAIR)
    console.print(
        f"torch == flax in {count - differing} of {count} comparisons; "
        f"{time.perf_counter() - begun:.0f} s; {place / 'results.jsonl'}, {place / 'quality.png'}"
    )
    if differing:
        print(f"kvtwin: {differing} of {count} comparisons are not equal", file=sys.stderr)
        raise typer.Exit(1)


def _say(text: str) -> None:
    """One line of progress on standard error."""
    print(f"kvtwin demo: {text}", file=sys.stderr, flush=True)
