"""Rows of results as the numbers of a report: cells with intervals, pairs, fronts, agreement. Pure functions of frames.

A row is one cell and seed, as `read` of experiments/sweeps/results.py gives it; a cell is what was run as one batch
(`CELL`). An interval is that of the mean over the seeds, 95%, by the bootstrap; one value has none (NaN).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.interval import interval, paired
from experiments.question import Measure, questions
from framework.errors import KvtwinError

SETUP = ["question", "task", "model", "weights", "codec", "backend", "dtype"]
CELL = ["question", "task", "model", "weights", "policy", "method", "budget", "codec", "backend", "dtype"]
PANEL = ["question", "model", "weights", "dtype", "codec"]
ORDER = ["question", "model", "dtype", "codec", "backend", "policy", "budget", "seed"]
HELD = ["context", "requested", "kept_min", "kept_max", "kept", "payload", "allocated", "full"]
MEASURE = "measure."
KIB = 1024


@dataclass(frozen=True)
class Main:
    """The measure that a question is judged by. `known` False: the question cannot be made any more, so that its first
    measure stands for it, and more is taken to be better."""

    name: str
    better: Literal["higher", "lower"] | None
    unit: str = ""
    known: bool = True

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is, 0 where neither is."""
        return {"higher": 1, "lower": -1, None: 0}[self.better]

    @property
    def label(self) -> str:
        """For an axis: what it is, and its unit."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def told(self) -> str:
        """For a caption: what it is, its unit, and which way is better."""
        return f"{self.label} ({self.better} is better)" if self.better else self.label


def declared(question: str) -> tuple[Measure, ...]:
    """The measures of a question, the main one first; none where it cannot be made any more."""
    try:
        return questions.make(question).measures
    except KvtwinError:
        return ()


def mains(frame: pd.DataFrame) -> dict[str, Main]:
    """The main measure of each question: the first of its own that was measured."""
    return {
        str(question): _main(declared(str(question)), _measured(rows))
        for question, rows in frame.groupby("question", sort=False)
    }


def _main(known: Sequence[Measure], found: Sequence[str]) -> Main:
    for each in known:
        if each.name in found or not found:
            return Main(each.name, each.better, each.unit)
    return Main(found[0] if found else "nothing", "higher", known=False)


def _measured(frame: pd.DataFrame) -> list[str]:
    """Names of the measures that have a value somewhere."""
    names = [column for column in frame.columns if column.startswith(MEASURE)]
    return [name.removeprefix(MEASURE) for name in names if frame[name].notna().any()]


def groups(frame: pd.DataFrame, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The rows that agree in the keys, NaN being equal to NaN, in the order in which they first come."""
    for key, rows in frame.groupby(list(keys), dropna=False, sort=False):
        yield dict(zip(keys, key, strict=True)), rows


def spread(values: Iterable[float]) -> dict[str, float]:
    """`n`, `mean`, `low`, `high` of the values that are numbers."""
    given = np.array([value for value in values if np.isfinite(value)], float)
    mean, low, high = interval(given) if given.size else (np.nan,) * 3
    return {"n": given.size, "mean": mean} | _bounds(given.size, low, high)


def _bounds(count: int, low: float, high: float) -> dict[str, float]:
    return {"low": low, "high": high} if count > 1 else {"low": np.nan, "high": np.nan}


def flags_of(row_flags: Iterable[Any]) -> Counter[str]:
    """How many rows have each flag."""
    return Counter(flag for each in row_flags if isinstance(each, (tuple, list)) for flag in each)


def cells(frame: pd.DataFrame, main: Mapping[str, Main]) -> pd.DataFrame:
    """One row per cell, in the order of the frame.

    `measure`, `better`, `unit`, `n`, `mean`, `low`, `high`: the main measure; `seeds`: rows; `failed`: those of them
    with an error, of which `error` is the first. What was held is the mean over the seeds, but `kept_min` the fewest
    and `kept_max` the most; `share`: kept of the context. `flags`: all that any seed has, and `flagged` with how many.
    """
    found = []
    for key, rows in groups(frame, CELL):
        judged = main[key["question"]]
        column = rows.get(f"{MEASURE}{judged.name}", pd.Series(dtype=float))
        errors = [str(each) for each in rows["error"].fillna("") if each]
        counted = flags_of(rows["flags"])
        found.append(
            key
            | {"measure": judged.name, "better": judged.better or "", "unit": judged.unit}
            | spread(column.to_numpy(float))
            | {"seeds": len(rows), "failed": len(errors), "error": errors[0] if errors else ""}
            | held(rows)
            | {
                "flags": tuple(sorted(counted)),
                "flagged": "; ".join(f"{flag} {n}/{len(rows)}" for flag, n in sorted(counted.items())),
            }
        )
    return pd.DataFrame(found)


def held(rows: pd.DataFrame) -> dict[str, float]:
    """What the caches of these rows held: means, but the fewest and the most tokens of a head."""
    means = rows[HELD].astype(float).mean()
    share = (rows["kept"].astype(float) / rows["context"].astype(float)).mean()
    return means.to_dict() | {
        "kept_min": rows["kept_min"].astype(float).min(),
        "kept_max": rows["kept_max"].astype(float).max(),
        "share": share,
    }


def every_measure(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell and measure that it has: `measure`, `better`, `unit`, `n`, `mean`, `low`, `high`, `share`,
    `kept`, `allocated`, `payload`, `flags`."""
    found = []
    for question, asked in frame.groupby("question", sort=False):
        known = {each.name: each for each in declared(str(question))}
        for key, rows in groups(asked, CELL):
            shared: dict[str, Any] = held(rows) | {"flags": tuple(sorted(flags_of(rows["flags"])))}
            for name in _measured(rows):
                one = known.get(name)
                found.append(
                    key
                    | {
                        "measure": name,
                        "better": (one and one.better) or "",
                        "unit": one.unit if one else "",
                    }
                    | spread(rows[f"{MEASURE}{name}"].to_numpy(float))
                    | shared
                )
    return pd.DataFrame(found, columns=None if found else [*CELL, "measure", "mean", "low", "high", "n"])


def pairs(frame: pd.DataFrame, main: Mapping[str, Main]) -> pd.DataFrame:
    """Mean differences `a` less `b` of the main measure on the same prompts, each pair in both directions.

    A pair is compared under one setup (`SETUP`) and budget, over the seeds that both have; policies without a budget
    stand in each. `excludes`: the interval does not hold 0. `gain`: the difference with the sign that makes more better
    (0 where the measure has no better side).
    """
    found = []
    for setup, rows in groups(frame, SETUP):
        judged = main[setup["question"]]
        if f"{MEASURE}{judged.name}" not in rows:
            continue
        budgets = sorted(rows["budget"].dropna().unique()) or [np.nan]
        for budget in budgets:
            stand = rows[(rows["budget"] == budget) | rows["budget"].isna()]
            for one in _pairs_of(stand, f"{MEASURE}{judged.name}"):
                for side in (one, _turned(one)):
                    found.append(
                        setup
                        | {"budget": budget, "measure": judged.name}
                        | side
                        | {"gain": judged.sign * side["mean"]}
                    )
    columns = [*SETUP, "budget", "measure", "a", "b", "n", "mean", "low", "high", "excludes", "gain"]
    return pd.DataFrame(found, columns=columns)


def _pairs_of(rows: pd.DataFrame, column: str) -> Iterator[dict[str, Any]]:
    by_policy = {
        policy: each.drop_duplicates("seed", keep="last").set_index("seed")[column].astype(float).dropna()
        for policy, each in rows.groupby("policy", sort=False)
    }
    for a, b in combinations(by_policy, 2):
        seeds = by_policy[a].index.intersection(by_policy[b].index).sort_values()
        if not len(seeds):
            continue
        mean, low, high = paired(by_policy[a][seeds].to_numpy(), by_policy[b][seeds].to_numpy())
        bounds = _bounds(len(seeds), low, high)
        excludes = bool(bounds["low"] > 0 or bounds["high"] < 0)
        yield {"a": a, "b": b, "n": len(seeds), "mean": mean} | bounds | {"excludes": excludes}


def _turned(one: Mapping[str, Any]) -> dict[str, Any]:
    """The same pair from the other side."""
    return {
        **one,
        "a": one["b"],
        "b": one["a"],
        "mean": -one["mean"],
        "low": -one["high"],
        "high": -one["low"],
    }


def pareto(cost: Sequence[float] | np.ndarray, value: Sequence[float] | np.ndarray, sign: int) -> np.ndarray:
    """Which points no other one beats: none costs as little and is as good, and is better in one of both.

    `sign`: 1 where more value is better, -1 where less is, 0 where neither is: nothing is on the front then. NaN is
    never.
    """
    given, worth = np.asarray(cost, float), sign * np.asarray(value, float)
    front = np.zeros(len(given), bool)
    if sign == 0:
        return front
    usable = np.flatnonzero(np.isfinite(given) & np.isfinite(worth))
    best, at = -np.inf, np.inf
    for index in usable[np.lexsort((-worth[usable], given[usable]))]:
        if worth[index] > best or (worth[index] == best and given[index] == at):
            front[index], best, at = True, worth[index], given[index]
    return front


def front(rows: pd.DataFrame, cost: str, sign: int) -> np.ndarray:
    """Which cells are on the Pareto front of the measure against `cost`, a column of bytes.

    Oracles never are, since nobody can build them; nor are masked cells on that of the payload: they did not free it.
    """
    out = rows["method"].str.startswith("oracle").to_numpy()
    if cost == "payload":
        out = out | np.array(["masked" in flags for flags in rows["flags"]], bool)
    return pareto(np.where(out, np.nan, rows[cost].astype(float)), rows["mean"].astype(float), sign)


def agreement(frame: pd.DataFrame, main: Mapping[str, Main]) -> pd.DataFrame:
    """One row per cell and pair of backends that both ran it: over the seeds that both have, the share with the same
    kept counts (`same_kept`) and the same text (`same_said`), and the largest difference of the main measure
    (`largest`)."""
    found = []
    for key, rows in groups(frame, [name for name in CELL if name != "backend"]):
        sides = {
            str(backend): each.drop_duplicates("seed", keep="last").set_index("seed")
            for backend, each in rows[rows["error"].fillna("") == ""].groupby("backend", sort=True)
        }
        for first, second in combinations(sides, 2):
            seeds = sides[first].index.intersection(sides[second].index)
            if len(seeds):
                left, right = sides[first].loc[seeds], sides[second].loc[seeds]
                compared = _compared(left, right, f"{MEASURE}{main[key['question']].name}")
                found.append(key | {"first": first, "second": second, "n": len(seeds)} | compared)
    columns = [*(name for name in CELL if name != "backend"), "first", "second", "n"]
    return pd.DataFrame(found, columns=[*columns, "same_kept", "same_said", "largest"])


def _compared(left: pd.DataFrame, right: pd.DataFrame, column: str) -> dict[str, float]:
    kept = ["kept_min", "kept_max", "kept"]
    counts = [side[kept].astype(float).to_numpy() for side in (left, right)]
    same = (counts[0] == counts[1]) | (np.isnan(counts[0]) & np.isnan(counts[1]))
    said = left["said"].fillna("").to_numpy() == right["said"].fillna("").to_numpy()
    apart = (
        np.abs(left[column].astype(float).to_numpy() - right[column].astype(float).to_numpy())
        if column in left
        else np.array([np.nan])
    )
    return {
        "same_kept": float(same.all(-1).mean()),
        "same_said": float(said.mean()),
        "largest": float(np.nanmax(apart)) if np.isfinite(apart).any() else np.nan,
    }


def flagged(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell and flag: `flag`, `count` of `seeds` rows that have it, and what these rows held."""
    found = []
    for key, rows in groups(frame, CELL):
        for flag in sorted(flags_of(rows["flags"])):
            having = rows[[isinstance(each, (tuple, list)) and flag in each for each in rows["flags"]]]
            found.append(key | {"flag": flag, "count": len(having), "seeds": len(rows)} | held(having))
    return pd.DataFrame(found, columns=[*CELL, "flag", "count", "seeds", *HELD, "share"])


def failures(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell and error: `error`, `count` of `seeds` rows that have it."""
    found = []
    for key, rows in groups(frame, CELL):
        for error, count in Counter(str(each) for each in rows["error"].fillna("") if each).items():
            found.append(key | {"error": error, "count": count, "seeds": len(rows)})
    return pd.DataFrame(found, columns=[*CELL, "error", "count", "seeds"])


def told_apart(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with the weights' hash behind the name of a model that came with several."""
    several = frame.groupby("model")["weights"].transform("nunique") > 1
    names = frame["model"].where(~several, frame["model"] + " " + frame["weights"].astype(str).str[:8])
    return frame.assign(model=names)


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows by what they are of, whatever the order in which they ran, with `told_apart`."""
    return told_apart(frame).sort_values(ORDER, kind="stable", ignore_index=True)


def provenance(frame: pd.DataFrame) -> dict[str, list[str]]:
    """The different values of each provenance column, sorted."""
    return {
        column.removeprefix("provenance."): sorted({str(each) for each in frame[column].dropna()})
        for column in frame.columns
        if column.startswith("provenance.")
    }


def budget_label(budget: float) -> str:
    """A share as a percentage, tokens as a number; nothing where a policy has no budget of the sweep."""
    if not np.isfinite(budget):
        return ""
    return f"{100 * budget:.3g}%" if budget < 1 else f"{budget:.0f} tokens"


def cell_label(key: Mapping[str, Any]) -> str:
    """A cell in one line, for messages."""
    budget = budget_label(key["budget"])
    at = f" at {budget}" if budget else ""
    return f"{key['policy']}{at}, {key['codec']}, {key['backend']} {key['dtype']}, {key['question']}, {key['model']}"


def slug(text: str) -> str:
    """The text as part of a file name: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"
