"""The second tier of `kvtwin check`: a two-layer random model in torch and flax against the reference, in float64.

The second layer has a sliding window. All backends get the same tokens, so that each step's kept sets, memory and
logits can be compared; a swap of tokens counts only where their scores differ by more than rounding.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from experiments.checks.case import least_budget, tiny_spec
from experiments.checks.failure import Failure, broken
from experiments.checks.outcome import TOLERANCE, short
from framework.arrays import FAR
from framework.errors import KvtwinError
from framework.policy import Policy
from framework.shapes import EMPTY, bucket

NATIVE = ("torch", "flax")
DRIFT = 1e-10  # of the largest logit
STEPS = 6
SILENT = 1  # the row that gets no token in one of the steps
INTERVAL = 3  # longer intervals are cut to this one, so that evictions happen within the steps


@dataclass(frozen=True, eq=False)
class Moment:
    """What a cache holds after a call, in canonical order, with the logits of the call."""

    kept: list[np.ndarray]
    memory: list[dict[str, np.ndarray]]
    logits: np.ndarray
    scores: list[
        dict[tuple[int, int, int], float]
    ]  # per layer: (row, head, position) -> score; reference only


@functools.cache
def _models() -> dict[str, Any]:
    """The same random model on the three backends."""
    from backends import backends
    from framework.weights import random_weights

    spec = tiny_spec()
    weights = random_weights(spec, seed=5)
    return {name: backends.get(name).build(spec, weights, "float64") for name in ("reference", *NATIVE)}


def prepared(policy: Policy) -> Policy:
    """The policy as it is run here: intervals that end within the steps."""
    return replace(policy, interval=min(policy.interval, INTERVAL))


def length(policy: Policy) -> int:
    """Prompt length: one less than a bucket, so that T + 1 and most budgets below share one compiled step."""
    return bucket(least_budget(policy) + 4) - 1 if policy.evicts else 7


def swept(policy: Policy) -> list[Policy]:
    """The policy at budgets p, p + 1, T - 1, T and T + 1."""
    if not policy.evicts:
        return [policy]
    least, tokens = least_budget(policy), length(policy)
    asked = sorted({least, least + 1, tokens - 1, tokens, tokens + 1})
    return [replace(prepared(policy), budget=budget) for budget in asked]


def prompts(policy: Policy, left: bool = False) -> np.ndarray:
    """Three random prompts of different length, padded on one side."""
    tokens = length(policy)
    full = np.random.default_rng(7).integers(0, tiny_spec().vocab, (3, tokens), dtype=np.int32)
    for row, count in enumerate((tokens, tokens - 3, 1)):
        if left:
            full[row] = np.roll(full[row], tokens - count)
            full[row, : tokens - count] = EMPTY
        else:
            full[row, count:] = EMPTY
    return full


def play(
    backend: str, policy: Policy, tokens: np.ndarray, rows: tuple[int, ...] = (0, 1, 2)
) -> Iterator[Moment]:
    """A prefill and decode steps; the moments come in the order of the original rows. One has no question."""
    model = _models()[backend]
    back = np.argsort(rows)
    following = np.random.default_rng(8).integers(0, model.spec.vocab, (STEPS, 3), dtype=np.int32)
    following[2, SILENT] = EMPTY
    cache = model.cache(policy=policy, batch=3)
    cache.mark(np.array([tokens.shape[1] // 2, FAR, 0])[list(rows)])
    for call in (tokens, *following[:, :, None]):
        record: list[Any] = []
        options = {"decisions": record} if backend == "reference" else {}
        logits, cache = model.step(call[list(rows)], cache, **options)
        snapshot = cache.snapshot()
        yield Moment(
            [layer.positions[back] for layer in snapshot.layers],
            [{key: value[back] for key, value in layer.memory.items()} for layer in snapshot.layers],
            logits[back],
            _scores(record, len(snapshot.layers)),
        )


def _scores(record: list[Any], layers: int) -> list[dict[tuple[int, int, int], float]]:
    scores: list[dict[tuple[int, int, int], float]] = [{} for _ in range(layers)]
    for one in record:
        for place in np.argwhere(one.positions >= 0):
            row, head, slot = place.tolist()
            scores[one.layer][row, head, int(one.positions[row, head, slot])] = float(
                one.scores[row, head, slot]
            )
    return scores


def differs(ours: Moment, theirs: Moment, budget: Any, step: int, backend: str) -> Failure | None:
    """The first layer and head where a backend holds something else than the reference, or None."""
    for layer, (own, other) in enumerate(zip(ours.kept, theirs.kept, strict=True)):
        for row, head in np.ndindex(own.shape[:2]):
            a, b = ({int(p) for p in x[row, head] if p >= 0} for x in (own, other))
            where = {
                "library": backend,
                "budget": budget,
                "layer": layer,
                "row": row,
                "head": head,
                "step": step,
            }
            if a == b:
                continue
            seen = {p: value for (r, h, p), value in ours.scores[layer].items() if (r, h) == (row, head)}
            margin = TOLERANCE * max((abs(value) for value in seen.values()), default=0.0)
            pairs = zip(sorted(a - b), sorted(b - a), strict=False)
            if len(a) == len(b) and all(
                abs(seen.get(x, 0) - seen.get(y, np.inf)) <= margin for x, y in pairs
            ):
                raise _Tie
            scores = {p: float(f"{value:.4g}") for p, value in sorted(seen.items())}
            return Failure(
                f"{backend} keeps other tokens than the reference",
                where,
                {"scores by position": scores, "expected": sorted(a), "got": sorted(b)},
            )
        for key, value in ours.memory[layer].items():
            got = theirs.memory[layer][key]
            wrong = np.argwhere(np.abs(got - value) > 1e-8 * max(np.abs(value).max(initial=0), 1e-300))
            if len(wrong):
                row, head = wrong[0][:2].tolist()
                where = {
                    "library": backend,
                    "budget": budget,
                    "layer": layer,
                    "row": row,
                    "head": head,
                    "step": step,
                }
                example = {
                    "positions": own[row, head].tolist(),
                    "expected": short(value[row, head]),
                    "got": short(got[row, head]),
                }
                return Failure(f"{backend} has another memory {key!r} than the reference", where, example)
    drift = np.abs(ours.logits - theirs.logits).max() / np.abs(ours.logits).max()
    if not drift <= DRIFT:
        where = {"library": backend, "budget": budget, "step": step}
        return Failure(
            f"{backend}'s logits drift by {drift:.1e} from the reference; expected {DRIFT:.0e}", where
        )
    return None


class _Tie(Exception):
    """Two backends broke a tie within rounding differently; what follows cannot be compared."""


def _follow(
    backend: str, policy: Policy, tokens: np.ndarray, rows: tuple[int, ...] = (0, 1, 2)
) -> Failure | None:
    """The failure of one backend at one budget against the reference with prompts as they are."""
    truth = _truth(policy)
    try:
        for step, moment in enumerate(play(backend, policy, tokens, rows)):
            if failure := differs(truth[step], moment, policy.budget, step, backend):
                return failure
    except _Tie:
        return None
    except KvtwinError as error:
        return broken(policy, error, backend)
    return None


@functools.lru_cache(maxsize=64)
def _truth(policy: Policy) -> list[Moment]:
    return list(play("reference", policy, prompts(policy)))


def check_reference(policy: Policy) -> Failure | None:
    """Runs in the reference at every budget, and holds no more than asked."""
    for one in swept(policy):
        for step, moment in enumerate(_truth(one)):
            for layer, kept in enumerate(moment.kept):
                # A row that is silent when the others evict holds what it gathered until the next eviction.
                most = int((np.delete(kept, SILENT, axis=0) >= 0).sum(-1).max())
                limit = one.most(one.budget, layer, tiny_spec()) if isinstance(one.budget, int) else most
                # A layer may have all that the others leave, and the sum is `allocate`'s own matter.
                limit *= len(moment.kept) if one.allocates else 1
                if most > limit + one.interval - 1:
                    where = {"library": "reference", "layer": layer, "step": step}
                    return Failure(f"{most} tokens are held at budget {one.budget}", where)
    return None


def check_torch(policy: Policy) -> Failure | None:
    """torch holds what the reference holds, at every budget and step."""
    return _each(_follow("torch", one, prompts(policy)) for one in swept(policy))


def check_flax(policy: Policy) -> Failure | None:
    """flax holds what the reference holds, at every budget and step."""
    return _each(_follow("flax", one, prompts(policy)) for one in swept(policy))


def check_padding(policy: Policy) -> Failure | None:
    """Prompts padded on the left give what prompts padded on the right give."""
    left = prompts(policy, left=True)
    return _each(
        _told(_follow(name, swept(policy)[0], left), "prompts padded on the left") for name in NATIVE
    )


def check_batch_order(policy: Policy) -> Failure | None:
    """Rows in another order give the same rows."""
    right, rows = prompts(policy), (2, 0, 1)
    return _each(
        _told(_follow(name, swept(policy)[0], right, rows), "rows in another order") for name in NATIVE
    )


def check_again(policy: Policy) -> Failure | None:
    """A new cache after all of these starts from nothing."""
    first = swept(policy)[0]
    return _each(_told(_follow(name, first, prompts(policy)), "a second sequence") for name in NATIVE)


def check_compiles(policy: Policy) -> Failure | None:
    """In flax neither another step nor another budget of the same bucket compiles anew."""
    import jax

    seen: list[float] = []

    def listen(event: str, seconds: float, **rest: Any) -> None:
        if event.startswith("/jax/core/compile/"):  # tracing anew, though to the same program, is as slow
            seen.append(seconds)

    groups: dict[int, list[Policy]] = {}
    for one in swept(policy):
        groups.setdefault(bucket(one.budget) if isinstance(one.budget, int) else 0, []).append(one)
    same = max(groups.values(), key=len)
    list(play("flax", same[0], prompts(policy)))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for one in same:
            fresh = replace(one)
            list(play("flax", fresh, prompts(policy)))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    if seen:
        asked = [one.budget for one in same]
        return Failure(
            f"{len(seen)} tracings and compilations at budgets {asked} of one bucket; expected 0",
            {"library": "flax"},
        )
    return None


def _each(failures: Iterator[Failure | None]) -> Failure | None:
    return next((failure for failure in failures if failure is not None), None)


def _told(failure: Failure | None, when: str) -> Failure | None:
    return None if failure is None else replace(failure, what=f"{failure.what}, with {when}")


@dataclass(frozen=True)
class Check:
    """A named check of the model tier."""

    name: str
    function: Callable[[Policy], Failure | None] = field(repr=False)
    gate: bool = False


CHECKS = (
    Check("model: reference", check_reference, gate=True),
    Check("model: torch equals reference", check_torch),
    Check("model: flax equals reference", check_flax),
    Check("model: left padding", check_padding),
    Check("model: batch order", check_batch_order),
    Check("model: state reset", check_again),
    Check("model: compiled once", check_compiles),
)


def attempt(check: Check, policy: Policy) -> Failure | None:
    """The check's failure, or None."""
    try:
        return check.function(policy)
    except Exception as error:
        return broken(policy, error)
