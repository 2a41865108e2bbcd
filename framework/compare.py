"""What it means that two runs are the same: drift, taps, kept sets, tokens and distributions, on NumPy arrays.

In every function `found` is the run under test and `expected` the one that is right. Nothing here knows a backend.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from framework.cache import Decision
from framework.errors import KvtwinError

# Relative to max|expected|, element by element; for kept sets the score gap relative to max|score|.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
SWAPS = {"float64": 0.0, "float32": 1e-3}  # share of the decisions that rounding may have swapped

# Half precision is judged by distribution: mean KL divergence in nats, at most, and mean overlap of the most probable
# tokens, at least.
KL = {"bfloat16": 2e-2, "float16": 2e-3}
OVERLAP = {"bfloat16": 0.85, "float16": 0.95}
TOP = 5
TIE = 1e-9  # logits nearer than this, relative to the largest, are equal

JUDGE = 2e-5  # of Hugging Face transformers, which computes norms, softmax and rope angles in float32


def drift(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference relative to the largest absolute expected value; infinite where a number is NaN."""
    if found.shape != expected.shape:
        raise KvtwinError(f"cannot compare shape {found.shape} with the expected {expected.shape}")
    if not expected.size:
        return 0.0
    difference = float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())
    if np.isnan(difference):
        return float("inf")
    return difference / (float(np.abs(expected).max()) or 1.0)


@dataclass(frozen=True)
class TapDrift:
    """A named value inside the model and its drift."""

    name: str
    drift: float


def tap_drifts(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[TapDrift]:
    """The drift of every tap, in the order of `expected`, which is that of the computation."""
    if set(found) != set(expected):
        raise KvtwinError(
            f"taps {sorted(set(found) ^ set(expected))} came from one run only; expected the same names"
        )
    return [TapDrift(name, drift(found[name], value)) for name, value in expected.items()]


def first_differing(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float
) -> TapDrift | None:
    """The first tap whose drift is beyond the tolerance; what comes before it is right, so the fault is there."""
    return next((tap for tap in tap_drifts(found, expected) if not tap.drift <= tolerance), None)


def layer_drifts(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[float]:
    """The drift at the output of each layer."""
    layers = sum(
        name.startswith("layers.") and name.count(".") == 2 and name.endswith(".output") for name in expected
    )
    names = [f"layers.{index}.output" for index in range(layers)]
    return [drift(found[name], expected[name]) for name in names]


@dataclass(frozen=True)
class Mismatch:
    """Where a kept set differs from the expected one, and why that is no rounding."""

    step: int
    layer: int
    row: int
    head: int
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}, layer {self.layer}, row {self.row}, head {self.head}: {self.reason}"


@dataclass(frozen=True)
class KeptAgreement:
    """Decisions of two runs, one per layer, row and head.

    `equal`: the same set. `swapped`: other tokens, with scores so near that rounding explains it; `gap` is the largest
    such, relative to max|score|. `mismatches`: anything else. `overlap`: mean share of the expected set that was kept.
    `score_drift`: of the scores of all slots.
    """

    equal: int
    swapped: int
    gap: float
    mismatches: tuple[Mismatch, ...]
    overlap: float
    score_drift: float

    @property
    def decisions(self) -> int:
        """How many sets were compared."""
        return self.equal + self.swapped + len(self.mismatches)

    def within(self, swaps: float) -> bool:
        """True without any mismatch and with at most this share of swaps."""
        return not self.mismatches and self.swapped <= swaps * self.decisions


def kept_agreement(
    found: Sequence[Sequence[Decision]], expected: Sequence[Sequence[Decision]], tolerance: float
) -> KeptAgreement:
    """Compare decisions [step][layer] that were taken over the same tokens, as replay makes sure.

    A swap counts as rounding only where the run under test follows the rule on its own scores, so that a tie broken the
    wrong way is a mismatch, and where the expected scores lie within `tolerance` of each other. Protected slots never
    swap.
    """
    equal = swapped = 0
    gap, apart, overlaps, mismatches = 0.0, 0.0, [], []
    if len(found) != len(expected):
        raise KvtwinError(f"{len(found)} evictions came; expected {len(expected)}")
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if [one.layer for one in ours] != [one.layer for one in theirs]:
            raise KvtwinError(f"step {step}: other layers evicted than expected")
        for one, other in zip(ours, theirs, strict=True):
            for row, head in np.ndindex(other.positions.shape[:2]):
                left, right = _Set.of(one, row, head), _Set.of(other, row, head)
                overlaps.append(len(left.kept & right.kept) / max(len(right.kept), 1))
                reason, near, scores = left.against(right, tolerance)
                apart = max(apart, scores)
                if reason:
                    mismatches.append(Mismatch(step, other.layer, row, head, reason))
                elif left.kept == right.kept:
                    equal += 1
                else:
                    swapped += 1
                    gap = max(gap, near)
    overlap = float(np.mean(overlaps)) if overlaps else 1.0
    return KeptAgreement(equal, swapped, gap, tuple(mismatches), overlap, apart)


@dataclass(frozen=True)
class _Set:
    """What one head decided: score and protection by position, and the positions kept."""

    scores: dict[int, float]
    protected: set[int]
    kept: set[int]

    @classmethod
    def of(cls, decision: Decision, row: int, head: int) -> "_Set":
        positions = decision.positions[row, head]
        filled = np.flatnonzero(positions >= 0)
        scores, marked = decision.scores[row, head], decision.protected[row, head]
        kept = decision.kept[row, head]
        return cls(
            {int(positions[slot]): float(scores[slot]) for slot in filled},
            {int(positions[slot]) for slot in filled if marked[slot]},
            {int(position) for position in kept if position >= 0},
        )

    def against(self, right: "_Set", tolerance: float) -> tuple[str, float, float]:
        """Why this set is no rounding of the right one ("" if it is), the score gap, and the drift of the scores."""
        if self.scores.keys() != right.scores.keys():
            odd = sorted(self.scores.keys() ^ right.scores.keys())
            return f"it saw other tokens: positions {_few(odd)} are in one only", 0.0, 0.0
        if self.protected != right.protected:
            return (
                f"it protects others: {_few(sorted(self.protected ^ right.protected))} are in one only",
                0.0,
                0.0,
            )
        order = list(right.scores)
        ours, theirs = (np.array([one.scores[key] for key in order]) for one in (self, right))
        apart = drift(ours, theirs)
        dropped, taken = sorted(right.kept - self.kept), sorted(self.kept - right.kept)
        if not dropped and not taken:
            return "", 0.0, apart
        if len(dropped) != len(taken):
            return f"it kept {len(self.kept)} tokens, expected {len(right.kept)}", 0.0, apart
        if self.protected & {*dropped, *taken}:
            return f"protected tokens swapped: {_few(dropped)} for {_few(taken)}", 0.0, apart
        worst = min((self.scores[key], key) for key in taken)
        best = max((self.scores[key], key) for key in dropped)
        if worst < best:
            return f"it kept {worst[1]} and not {best[1]}, against the rule on its own scores", 0.0, apart
        largest = float(np.abs(theirs).max()) or 1.0
        near = (max(right.scores[key] for key in dropped) - min(right.scores[key] for key in taken)) / largest
        if not near <= tolerance:
            return (
                f"it kept {_few(taken)} and not {_few(dropped)}, {near:.1e} of the largest score apart",
                near,
                apart,
            )
        return "", near, apart


def _few(items: Sequence[int], most: int = 4) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return shown + (f" and {len(items) - most} more" if len(items) > most else "")


@dataclass(frozen=True)
class TokenAgreement:
    """Tokens of two runs. `row` and `step` say where they part first, -1 where they never do.

    `gap` is what the expected run's two largest logits lie apart there, relative to its largest |logit|.
    """

    tokens: int
    agreeing: int
    row: int
    step: int
    gap: float

    def within(self, tolerance: float) -> bool:
        """True where all agree, or where they part between two logits that are within the tolerance."""
        return self.step < 0 or self.gap <= tolerance


def token_agreement(
    found: Int[np.ndarray, "batch steps"],
    expected: Int[np.ndarray, "batch steps"],
    logits: Float[np.ndarray, "batch steps vocab"],
) -> TokenAgreement:
    """Compare tokens; `logits` are those that the expected tokens were chosen from.

    After it has parted a row goes on with another text, so that only what comes before counts as agreeing. Of several
    rows that part, the one with the largest gap is reported.
    """
    parted = found != expected
    first = np.where(parted.any(1), parted.argmax(1), -1)
    agreeing = int(np.where(first < 0, found.shape[1], first).sum())
    worst = TokenAgreement(found.size, agreeing, -1, -1, 0.0)
    for row in np.flatnonzero(first >= 0):
        step = int(first[row])
        two = np.sort(logits[row, step])[-2:]
        gap = float(two[1] - two[0]) / (float(np.abs(logits[row, step]).max()) or 1.0)
        if worst.step < 0 or gap > worst.gap:
            worst = TokenAgreement(found.size, agreeing, int(row), step, gap)
    return worst


@dataclass(frozen=True)
class Distributions:
    """Next-token distributions of two runs: KL divergence of the found from the expected ones, in nats, and overlap of
    the `TOP` most probable tokens."""

    kl: float
    largest_kl: float
    overlap: float

    def within(self, dtype: str) -> bool:
        """True where a run in this half precision is as near as it can be expected to be."""
        return self.kl <= KL[dtype] and self.overlap >= OVERLAP[dtype]


def distributions(
    found: Float[np.ndarray, "*axes vocab"], expected: Float[np.ndarray, "*axes vocab"], top: int = TOP
) -> Distributions:
    """Compare logits as distributions: means over all axes but the last, and the largest KL."""
    ours, theirs = (_log_softmax(x.astype(np.float64)) for x in (found, expected))
    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    kl = np.where(np.isnan(kl), np.inf, kl)
    top = min(top, found.shape[-1])
    best = np.argsort(-ours, axis=-1, kind="stable")[..., :top]
    least = np.sort(theirs, axis=-1)[..., -top, None]  # what equals the last of them is as good
    shared = (np.take_along_axis(theirs, best, -1) >= least - TIE * np.abs(theirs).max()).mean()
    return Distributions(max(float(kl.mean()), 0.0), max(float(kl.max()), 0.0), float(shared))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def as_record(result: Any) -> dict[str, object]:
    """A result as plain values for JSON; mismatches as text."""
    record: dict[str, object] = {}
    for item in fields(result):
        value = getattr(result, item.name)
        record[item.name] = [str(one) for one in value] if isinstance(value, tuple) else value
    return record
