"""Rows of `kvtwin bench`: one measurement a line of JSON, on disk as soon as it is known, so that a run can go on."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.benches.case import Case
from experiments.benches.engine import cores
from framework.errors import KvtwinError


@dataclass(frozen=True)
class Row:
    """One round of one entry of a group.

    `over`: the entry that it is compared with. `seconds`: of one unit (a step of all rows, a prompt, a start).
    `first_seconds`: of the first block in its process, compilation included, per block. `bandwidth`: bytes per second
    that the machine read right before and right after; `moved`: these differ too much, and so they did in all `tries`.
    `others`: cores that anything else kept busy meanwhile, on average; None of a block too short to tell.
    `step_bytes`: what a decode step has to read. `parts`: further numbers: `cache_bytes`; of a start the seconds
    `imports`, `load`, `first` and the bytes `resident` after the imports, `peak`, `weights`. `error`: why there is no
    number. `versions`: of what the engine runs on. `session`: when the run began that measured it; ratios are of one.
    """

    group: str
    case: Case
    engine: str
    over: str | None
    round: int
    seconds: float | None = None
    first_seconds: float | None = None
    bandwidth: tuple[float, float] | None = None
    moved: bool = False
    tries: int = 1
    others: float | None = None
    step_bytes: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    session: str = ""

    @property
    def entry(self) -> str:
        """The entry that was measured, as `over` names it."""
        return f"{self.engine}: {self.case}"

    @property
    def key(self) -> tuple[str, str, int]:
        """What a later row of the same replaces."""
        return self.group, self.entry, self.round


def machine() -> dict[str, Any]:
    """What the rows were measured on: the processor, the cores that may be used, memory in whole GiB, the system."""
    info = Path("/proc/cpuinfo")
    models = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    name = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": name, "cores": cores(), "memory": round(memory), "system": platform.system()}


def read(path: Path) -> list[Row]:
    """The rows of a file, of several with one key the last; [] where there is no file.

    A last line that was not written to its end is left out. Raises KvtwinError on any other line that is no row.
    """
    if not path.exists():
        return []
    found: dict[tuple[str, str, int], Row] = {}
    for number, line in enumerate(_lines(path), 1):
        row = _row(line)
        if row is None:
            raise KvtwinError(
                f"line {number} of {path} is no row of this version of kvtwin bench: {line[:60]!r}\n"
                "expected what kvtwin bench writes: name another folder with --out, or move the file away"
            )
        found.pop(row.key, None)
        found[row.key] = row
    return list(found.values())


def _lines(path: Path) -> list[str]:
    """Whole lines: what stands behind the last line feed was cut off."""
    try:
        return path.read_bytes().decode(errors="replace").split("\n")[:-1]
    except OSError as error:
        raise KvtwinError(f"cannot read {path}: {error.strerror or error}") from error


def _row(line: str) -> Row | None:
    try:
        told = json.loads(line)
        case, bandwidth = Case(**told.pop("case")), told.pop("bandwidth")
        return Row(case=case, bandwidth=None if bandwidth is None else tuple(bandwidth), **told)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def append(path: Path, row: Row) -> None:
    """Write a row behind the others, and come back when it is on the disk; a line that was cut off before goes."""
    try:
        with path.open("ab+") as file:
            _cut(file)
            file.write((json.dumps(asdict(row)) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise KvtwinError(f"cannot write {path}: {error.strerror or error}") from error


def _cut(file: Any) -> None:
    """Drop what stands behind the last line feed."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def fitting(
    rows: Sequence[Row], here: Mapping[str, Any], versions: Mapping[str, Mapping[str, str]]
) -> list[Row]:
    """Rows of this machine, and of engines in these versions."""
    return [row for row in rows if row.machine == here and versions.get(row.engine) == row.versions]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Rows of the machine of the last one, and of each engine those in the versions of its last one."""
    here = [row for row in rows if row.machine == rows[-1].machine]
    return fitting(here, rows[-1].machine, {row.engine: row.versions for row in here})
