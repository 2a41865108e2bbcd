"""What rows of `kvtwin bench` say: medians, and ratios of rounds with their spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.benches.case import Case
from experiments.benches.row import Row


@dataclass(frozen=True)
class Spread:
    """A median between the least and the most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Result:
    """An entry of a group over all its rounds.

    `seconds`: of a unit. `speed`: how many times as fast as the entry `over`, by the ratios of single rounds. `limit`:
    share of the bandwidth of the machine that the bytes of a decode step amount to. `memory`: bytes of the cache over
    those of `over`. `compiled`: seconds of the first block beyond a later one. `parts`: medians. `after_loading`:
    seconds of a start without those of the loading; `peak`: its most memory beyond what the imports take, as a share of
    the weights; both by rounds. `moved`: rounds in which the bandwidth moved; `others`: cores that anything else kept
    busy, the median. `error`: the last one.
    """

    group: str
    case: Case
    engine: str
    over: str | None
    rounds: int
    seconds: Spread | None
    speed: Spread | None
    limit: Spread | None
    memory: float | None
    compiled: float | None
    parts: Mapping[str, float]
    after_loading: Spread | None
    peak: Spread | None
    moved: int
    others: float | None
    error: str | None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all rows together."""
        return self.case.tokens / self.seconds.median if self.seconds and self.case.tokens else None


def results(rows: Sequence[Row]) -> list[Result]:
    """One for each entry of each group, in the order in which they came."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.group, row.entry), []).append(row)
    groups = list(dict.fromkeys(row.group for row in rows))
    return [_result(each, found) for group in groups for key, each in found.items() if key[0] == group]


def _result(rows: list[Row], every: Mapping[tuple[str, str], list[Row]]) -> Result:
    first, good = rows[0], [row for row in rows if row.seconds is not None]
    errors = [row.error for row in rows if row.error is not None]
    base = [] if first.over is None else every.get((first.group, first.over), [])
    seconds = spread([row.seconds for row in good if row.seconds is not None])
    busy = [row.others for row in good if row.others is not None]
    begun = [row.first_seconds for row in good if row.first_seconds is not None]
    return Result(
        group=first.group,
        case=first.case,
        engine=first.engine,
        over=first.over,
        rounds=len(good),
        seconds=seconds,
        speed=spread(ratios(good, base)),
        limit=spread([limit for row in good if (limit := share(row)) is not None]),
        memory=_memory(good, base),
        compiled=max(0.0, begun[-1] - seconds.median * first.case.units) if begun and seconds else None,
        parts={
            key: statistics.median(row.parts[key] for row in good) for key in (good[0].parts if good else {})
        },
        after_loading=spread(
            [row.seconds - row.parts["load"] for row in good if row.seconds and "load" in row.parts]
        ),
        peak=spread([one for row in good if (one := peak(row.parts)) is not None]),
        moved=sum(row.moved for row in good),
        others=statistics.median(busy) if busy else None,
        error=errors[-1] if errors else None,
    )


def ratios(rows: Sequence[Row], base: Sequence[Row]) -> list[float]:
    """How many times as fast as the base, in each round of a run that both have."""
    seconds = {(row.session, row.round): row.seconds for row in base if row.seconds}
    mine = {(row.session, row.round): row.seconds for row in rows if row.seconds}
    return [seconds[key] / each for key, each in mine.items() if key in seconds]


def share(row: Row) -> float | None:
    """Of the bandwidth around a block, what the bytes of its steps amount to."""
    if row.step_bytes is None or row.seconds is None or row.bandwidth is None:
        return None
    return row.step_bytes / row.seconds / statistics.mean(row.bandwidth)


def peak(parts: Mapping[str, float]) -> float | None:
    """The most memory of a start beyond what the imports took, as a share of the weights."""
    if not {"peak", "resident", "weights"} <= set(parts):
        return None
    return (parts["peak"] - parts["resident"]) / parts["weights"]


def spread(values: Sequence[float]) -> Spread | None:
    """Of some values; None where there are none."""
    return Spread(statistics.median(values), min(values), max(values)) if values else None


def _memory(rows: Sequence[Row], base: Sequence[Row]) -> float | None:
    sizes = [each[-1].parts.get("cache_bytes") for each in (rows, base) if each]
    return sizes[0] / sizes[1] if len(sizes) == 2 and sizes[0] and sizes[1] else None
