"""The loop of `kvtwin bench`: groups of entries, timed in turns, each block between two readings of the bandwidth."""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.benches.case import Entry, Group, title
from experiments.benches.engine import Engine, Failed
from experiments.benches.model import Subject
from experiments.benches.row import Row
from experiments.benches.worker import Workers

MOVED = 0.1  # share of the bandwidth that may change during a block
SHORT = 0.2  # seconds of a block in which the system's clock of busy cores ticks too seldom
TRIES = 3  # of a block during which it changed by more

Facts = dict[str, Any]


@dataclass
class Bench:
    """A run of the benchmark.

    `engines`: those that are there, with their `versions`. `subject`: the model of a name. `bandwidth`: bytes that the
    machine reads in a second, measured when called. `keep` is given each row; `rows` are those that there are, and
    `session` names this run.
    """

    engines: Mapping[str, Engine]
    versions: Mapping[str, Mapping[str, str]]
    machine: Mapping[str, Any]
    subject: Callable[[str], Subject]
    workers: Workers
    bandwidth: Callable[[], float]
    keep: Callable[[Row], None]
    session: str
    rounds: int = 5
    rows: dict[tuple[str, str, int], Row] = field(default_factory=dict)
    reading: float | None = None  # the bandwidth now; None where something ran since it was read

    def run(self, groups: Sequence[Group]) -> None:
        """All groups; what was measured before is not measured again."""
        try:
            for number, group in enumerate(groups, 1):
                self._group(
                    [each for each in group if each.engine in self.engines], f"{number}/{len(groups)}"
                )
        finally:
            self.workers.end(list(self.workers.running))

    def _group(self, entries: Group, number: str) -> None:
        if not self._left(entries, entries):
            return
        say(f"{number} {title(entries)}")
        self.workers.keep([each.engine for each in entries])
        lacking = [each for each in entries if self._left([each], entries)]
        others = [each for each in entries if each not in lacking]
        ready = self._prepared(lacking, entries)
        # Where only engines that fail again lack rounds, nothing is left to do.
        if not self._left([*ready, *others], entries):
            return
        ready |= self._prepared(others, entries)
        going = [each for each in entries if each in ready]
        for index in self._left(going, entries):
            self._round(going, entries, ready, index)

    def _left(self, entries: Group, group: Group) -> list[int]:
        """Rounds that not all of these have a number for, of one run. They are run whole: ratios are of one round."""

        def complete(index: int) -> bool:
            rows = [self._row(each, group, index) for each in entries]
            sessions = {None if row is None else row.session for row in rows}
            return len(sessions) < 2 and None not in sessions

        return [index for index in range(self.rounds) if not complete(index)]

    def _row(self, entry: Entry, group: Group, index: int) -> Row | None:
        """The number of a round that there is; None where there is none, or of a case that is another one now."""
        row = self.rows.get((title(group), str(entry), index))
        return row if row is not None and row.error is None and row.case == entry.case else None

    def _prepared(self, entries: Group, group: Group) -> dict[Entry, Facts]:
        """What the first block of each entry told, which does not count; without those that failed."""
        found = {}
        self.reading = None
        for entry in entries:
            begun = time.perf_counter()
            try:
                found[entry] = self._first(entry)
            except Failed as error:
                lacking = [index for index in range(self.rounds) if self._row(entry, group, index) is None]
                self._failed(self._blank(entry, group, min(lacking, default=0)), error)
            else:
                say(f"   {entry}: ready after {time.perf_counter() - begun:.1f} s")
        return found

    def _first(self, entry: Entry) -> Facts:
        if entry.case.kind == "start":
            # Once without counting, so that the model is in memory and what is compiled is kept.
            return {} if entry.case.cold else self._start(entry, None)
        worker = self.workers.get(self.engines[entry.engine], self._folder(entry), entry.case.dtype)
        return worker.ask("prepare", case=asdict(entry.case))

    def _folder(self, entry: Entry) -> str:
        return "" if entry.case.kind == "import" else str(self.subject(entry.case.model).folder)

    def _round(self, going: list[Entry], group: Group, ready: Mapping[Entry, Facts], index: int) -> None:
        """One block of each; those that fail take no further part."""
        told = []
        for entry in list(going):
            blank = self._blank(entry, group, index)
            try:
                row = self._between(blank, entry, ready[entry])
            except Failed as error:
                self._failed(blank, error)
                going.remove(entry)
            else:
                self._keep(row)
                told.append(f"{entry.engine} {1e3 * (row.seconds or 0):.1f} ms")
        say(f"   round {index + 1} of {self.rounds}: {', '.join(told)}")

    def _between(self, blank: Row, entry: Entry, facts: Facts) -> Row:
        """A measured row; again where the bandwidth moved meanwhile. The reading after it is that before the next."""
        for number in range(1, TRIES + 1):
            before = self.bandwidth() if self.reading is None else self.reading
            self.reading = None
            row = (
                self._started(blank, entry)
                if entry.case.kind == "start"
                else self._timed(blank, entry, facts)
            )
            after = self.reading = self.bandwidth()
            row = replace(row, bandwidth=(before, after), moved=moved(before, after), tries=number)
            if not row.moved:
                break
        return row

    def _timed(self, blank: Row, entry: Entry, facts: Facts) -> Row:
        worker, begun = self.workers.running[entry.engine], time.perf_counter()
        before = worker.ticks()
        told = worker.ask("run", case=asdict(entry.case))
        after, seconds = worker.ticks(), time.perf_counter() - begun
        return replace(
            blank,
            others=max(0.0, after[1] - before[1]) / seconds
            if before and after and seconds >= SHORT
            else None,
            seconds=told["seconds"] / entry.case.units,
            first_seconds=facts["seconds"],
            parts=facts["facts"],
        )

    def _started(self, blank: Row, entry: Entry) -> Row:
        if not entry.case.cold:
            return replace(blank, **self._start(entry, None))
        with tempfile.TemporaryDirectory(prefix="kvtwin-bench-") as empty:
            return replace(blank, **self._start(entry, Path(empty)))

    def _start(self, entry: Entry, compile_cache: Path | None) -> Facts:
        """Seconds and parts of a new process until its first token."""
        clock = [time.perf_counter()]
        worker = self.workers.new(self.engines[entry.engine], compile_cache)
        try:
            clock.append(time.perf_counter())
            resident = worker.resident()
            worker.ask("load", folder=self._folder(entry), dtype=entry.case.dtype)
            clock.append(time.perf_counter())
            worker.ask("prepare", case=asdict(entry.case))
            clock.append(time.perf_counter())
            peak = worker.resident(peak=True)
        finally:
            worker.close()
        parts = {key: clock[at + 1] - clock[at] for at, key in enumerate(("imports", "load", "first"))}
        sizes = {"resident": resident, "peak": peak, "weights": self.subject(entry.case.model).weights_bytes}
        parts |= {key: float(value) for key, value in sizes.items() if value is not None}
        return {"seconds": clock[-1] - clock[0], "parts": parts}

    def _blank(self, entry: Entry, group: Group, index: int) -> Row:
        case = entry.case
        return Row(
            title(group),
            case,
            entry.engine,
            None if entry.over is None else str(entry.over),
            index,
            step_bytes=self.subject(case.model).step_bytes(case) if case.kind == "decode" else None,
            machine=dict(self.machine),
            versions=dict(self.versions[entry.engine]),
            session=self.session,
        )

    def _keep(self, row: Row) -> None:
        self.rows[row.key] = row
        self.keep(row)

    def _failed(self, blank: Row, error: Failed) -> None:
        """What an earlier run measured stays."""
        old = self.rows.get(blank.key)
        if old is None or old.error is not None:
            self._keep(replace(blank, error=str(error)))
        say(f"   {blank.engine} failed, the others go on: {error}")


def moved(before: float, after: float) -> bool:
    """Whether two readings of the bandwidth differ too much for what was measured between them."""
    return abs(after - before) > MOVED * min(before, after)


def say(text: str) -> None:
    """One line of progress on standard error."""
    print(f"kvtwin bench: {text}", file=sys.stderr, flush=True)
