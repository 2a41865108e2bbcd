"""What the plots of a report share, interactive and static: a look for each policy, in colours that the colour-blind
tell apart, and the bounds of axes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

# Okabe and Ito without yellow and black, then Tol's muted ones.
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#332288",
    "#882255",
    "#999933",
    "#44aa99",
)
# By what bokeh calls it, what matplotlib does.
MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "inverted_triangle": "v",
    "hex": "h",
    "star": "*",
}
WIDE = 50  # an axis whose values differ by more than this factor is logarithmic
INK, QUIET = "#222222", "#767676"
# Blue is better, orange worse: from ColorBrewer's PuOr and Blues, told apart by the colour-blind.
DIVERGING = (
    "#b35806",
    "#e08214",
    "#fdb863",
    "#fee0b6",
    "#f7f7f7",
    "#d1e5f0",
    "#92c5de",
    "#4393c3",
    "#2166ac",
)
# What a place of the cache map is, by its number.
STATES = {"not come yet": "#ffffff", "evicted": "#e3e3e3", "evicted now": "#d55e00", "held": "#0072b2"}
# One letter for each flag, beside its point.
FLAGS = {"missed_budget": "B", "never_fired": "N", "masked": "M"}
FLAG_NOTE = (
    "Hollow points are flagged: B missed the budget, N never fired (nothing was evicted), "
    "M masked (evicted, and nothing freed)."
)


@dataclass(frozen=True)
class Look:
    """How a policy is drawn."""

    colour: str
    marker: str


def looks(policies: Iterable[str]) -> dict[str, Look]:
    """A look for each spelling: black for `full`, grey for oracles, the others in alphabetical order."""
    found, number = {}, 0
    for policy in sorted(set(policies)):
        if is_full(policy):
            found[policy] = Look(INK, "star")
        elif is_oracle(policy):
            found[policy] = Look(QUIET, "diamond")
        else:
            found[policy] = _look(number)
            number += 1
    return found


def _look(number: int) -> Look:
    markers = [marker for marker in MARKERS if marker != "star"]
    lap = number // len(COLOURS)
    return Look(COLOURS[number % len(COLOURS)], markers[(number + lap) % len(markers)])


def is_full(policy: str) -> bool:
    """Whether the policy keeps everything."""
    return policy.partition("(")[0] == "full"


def is_oracle(policy: str) -> bool:
    """Whether the policy sees the future."""
    return policy.partition("(")[0].startswith("oracle")


def letters(flags: Iterable[str]) -> str:
    """The letters of the flags, `?` for one that has none."""
    return "".join(sorted(FLAGS.get(flag, "?") for flag in flags))


def codec_markers(codecs: Iterable[str]) -> dict[str, str]:
    """A marker for each codec, where colour says the policy."""
    return {codec: list(MARKERS)[number % len(MARKERS)] for number, codec in enumerate(sorted(set(codecs)))}


def bounds(values: Iterable[float]) -> tuple[float, float, Literal["linear", "log"]]:
    """Where an axis of measures begins and ends, and its scale: 0 to 1 for shares, logarithmic for what is positive and
    spread widely."""
    given = np.array([value for value in values if np.isfinite(value)])
    if not given.size:
        return 0.0, 1.0, "linear"
    low, high = float(given.min()), float(given.max())
    if 0 <= low and high <= 1 and (high - low > 0.2 or high > 0.5 or high == 0):
        return -0.03, 1.05, "linear"
    if low > 0 and high / low > WIDE:
        return low / 1.4, high * 1.4, "log"
    pad = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad, "linear"
