"""The results of sweeps: one SQLite file, a row for each cell and seed, on the disk as soon as a cell is measured.

The rows of a cell are written in one transaction with SQLite's rollback journal, so that a process that is killed
leaves all of them or none, in one file that may be copied. A row belongs to a version (provenance.py):
another version of what computes adds rows beside the old ones.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from experiments.question import Held
from experiments.result import Cell, Result
from framework.errors import KvtwinError

if TYPE_CHECKING:
    from pandas import DataFrame

OURS = int.from_bytes(b"kvtw")  # SQLite's application_id
SCHEMA = 1
PATIENCE = 60.0  # seconds that a write waits for another sweep's
CELL = tuple(each.name for each in fields(Cell))
NUMBERS = tuple(each.name for each in fields(Held) if each.name != "flags")
TABLE = f"""
CREATE TABLE results (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    key TEXT NOT NULL,
    seed INTEGER NOT NULL,
    version TEXT NOT NULL,
    turn INTEGER NOT NULL,
    {", ".join(f'"{name}" {"REAL" if name == "budget" else "TEXT NOT NULL"}' for name in CELL)},
    {", ".join(f'"{name}" REAL' for name in NUMBERS)},
    flags TEXT,
    measures TEXT NOT NULL,
    held TEXT,
    said TEXT NOT NULL,
    wanted TEXT NOT NULL,
    seconds REAL NOT NULL,
    error TEXT NOT NULL,
    provenance TEXT NOT NULL,
    UNIQUE (key, seed, version)
)
"""
# Of a cell and seed, the row that the last sweep asked for.
NEWEST = """
SELECT * FROM (
    SELECT *, row_number() OVER (PARTITION BY key, seed ORDER BY turn DESC, id DESC) AS place FROM results
) WHERE place = 1
"""
ORDER = f" ORDER BY {', '.join(CELL)}, seed, id"  # a budget of NULL comes first

PLACE = "expected a file in a folder that can be written; name another with --out"
# What to do, by a word in the message of SQLite.
ADVICE = {
    "full": "what was measured before is in it; make room, and run the same command again",
    "locked": "another process holds it; what was measured before is in it: run the same command again later",
}


class Results:
    """A file of results, open for a sweep; made where there is none.

    Raises KvtwinError where it cannot be written, is damaged, or is not one of kvtwin's. `version` says of each cell,
    by its key, which version is asked for.
    """

    def __init__(self, path: Path, version: Mapping[str, str]):
        self.path, self.version = path, version
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.connection = _opened(path)
        try:
            self.turn = self._begun()
        except BaseException:
            self.connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def _begun(self) -> int:
        """The number of this sweep. What an earlier one measured in the version asked for becomes the newest again, as
        after an edit that was taken back."""
        with _told(self.path), self._writing():
            _made_ours(self.connection, self.path)
            [(last,)] = self.connection.execute("SELECT coalesce(max(turn), 0) FROM results")
            self.connection.executemany(
                "UPDATE results SET turn = ? WHERE key = ? AND version = ?",
                [(last + 1, key, one) for key, one in self.version.items()],
            )
        return last + 1

    def done(self, cell: Cell) -> set[int]:
        """The seeds that a cell has a row for, in the version asked for; a failure is none."""
        asked = "SELECT seed FROM results WHERE key = ? AND version = ? AND error = ''"
        with _told(self.path):
            return {seed for (seed,) in self.connection.execute(asked, (cell.key, self.version[cell.key]))}

    def add(self, results: Sequence[Result]) -> None:
        """Write these, all or none; back when they are on the disk. What is there already stays, but for failures."""
        rows = [_row(result, self.turn) for result in results]
        old = [{key: row[key] for key in ("key", "seed", "version")} for row in rows]
        names = ", ".join(f'"{name}"' for name in rows[0]) if rows else ""
        places = ", ".join(f":{name}" for name in rows[0]) if rows else ""
        with _told(self.path), self._writing():
            self.connection.executemany(
                "DELETE FROM results WHERE key = :key AND seed = :seed AND version = :version AND error != ''",
                old,
            )
            if rows:
                self.connection.executemany(
                    f"INSERT OR IGNORE INTO results ({names}) VALUES ({places})", rows
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        finally:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")


def read(path: str | Path, every: bool = False) -> "DataFrame":
    """The newest row of each cell and seed, in the order of their fields; with `every` those of all versions.

    Columns: those of a cell, with `task` and `method`, the names of question and policy before the bracket; seed;
    `measure.NAME`, NaN where a question has none of this name; what `Held` says, `flags` as a tuple; said, wanted,
    seconds, error; `provenance.NAME`.
    """
    place = Path(path)
    if not place.is_file():
        raise KvtwinError(f"no results are at {place}; expected a file that `kvtwin run --out` writes")
    with _told(place):
        connection = _opened(place)
        try:
            if not _is_ours(connection, place):
                raise _foreign(place)
            rows = connection.execute(("SELECT * FROM results" if every else NEWEST) + ORDER)
            names = [name for name, *_ in rows.description]
            found = [dict(zip(names, row, strict=True)) for row in rows]
        finally:
            connection.close()
    return _frame(found)


def cells_of(frame: "DataFrame") -> list[Cell]:
    """The cell of each row of what `read` gives."""
    rows = frame[list(CELL)].itertuples(index=False, name=None)
    cells = [Cell(*row) for row in rows]
    return [replace(cell, budget=None) if cell.budget != cell.budget else cell for cell in cells]


def _frame(rows: Sequence[Mapping[str, Any]]) -> "DataFrame":
    import pandas

    measures, origins = ([json.loads(row[name]) for row in rows] for name in ("measures", "provenance"))
    columns: dict[str, list[Any]] = {}
    for name in CELL:
        columns[name] = [row[name] for row in rows]
        if name in ("question", "policy"):
            before = "task" if name == "question" else "method"
            columns[before] = [row[name].partition("(")[0] for row in rows]
    columns["seed"] = [row["seed"] for row in rows]
    for name in _names(measures):
        columns[f"measure.{name}"] = [each.get(name, float("nan")) for each in measures]
    for name in NUMBERS:
        columns[name] = [row[name] for row in rows]
    columns["flags"] = [tuple((row["flags"] or "").split()) for row in rows]
    for name in ("said", "wanted", "seconds", "error"):
        columns[name] = [row[name] for row in rows]
    for name in _names(origins):
        columns[f"provenance.{name}"] = [each.get(name, "") for each in origins]
    frame = pandas.DataFrame(columns)
    numbers = [
        name for name in frame if name in ("budget", "seconds", *NUMBERS) or name.startswith("measure.")
    ]
    return frame.astype(dict.fromkeys(numbers, "float64"))


def _names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _row(result: Result, turn: int) -> dict[str, Any]:
    held = result.held
    return {
        "key": result.cell.key,
        "seed": result.seed,
        "version": result.provenance["version"],
        "turn": turn,
        **dict(zip(CELL, astuple(result.cell), strict=True)),
        **{name: None if held is None else getattr(held, name) for name in NUMBERS},
        "flags": None if held is None else " ".join(held.flags),
        "measures": json.dumps(result.measures),
        "held": None if held is None else json.dumps(asdict(held)),
        "said": result.said,
        "wanted": result.wanted,
        "seconds": result.seconds,
        "error": result.error,
        "provenance": json.dumps(result.provenance),
    }


def _opened(path: Path) -> sqlite3.Connection:
    if path.is_dir():
        raise KvtwinError(f"{path} is a folder; expected a file for results, as results.sqlite")
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        checked = [row for (row,) in connection.execute("PRAGMA quick_check(1)")]
        if checked != ["ok"]:
            raise sqlite3.DatabaseError(f"malformed: {' '.join(checked[0].split())}")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether a file has our table; False where it is empty. Raises where it has something else."""
    [(app,)], [(schema,)] = (
        connection.execute(f"PRAGMA {name}") for name in ("application_id", "user_version")
    )
    if app != OURS:
        [(tables,)] = connection.execute("SELECT count(*) FROM sqlite_schema")
        if tables or app:
            raise _foreign(path)
        return False
    if schema != SCHEMA:
        raise KvtwinError(
            f"{path} was written by another version of kvtwin (format {schema}, expected {SCHEMA})\n"
            "name another file with --out; nothing was changed"
        )
    return True


def _made_ours(connection: sqlite3.Connection, path: Path) -> None:
    if not _is_ours(connection, path):
        connection.execute(TABLE)
        connection.execute(f"PRAGMA application_id = {OURS}")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _foreign(path: Path) -> KvtwinError:
    return KvtwinError(
        f"{path} holds no results of kvtwin\n"
        "expected a file that `kvtwin run --out` writes, or for a sweep a new name; nothing was changed"
    )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of SQLite and of the system become KvtwinError, with what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        advice = [text for word, text in ADVICE.items() if word in str(error)]
        raise KvtwinError(f"cannot use {path}: {error}\n{(advice or [PLACE])[0]}") from error
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:
            raise  # a mistake of ours
        raise KvtwinError(
            f"{path} is damaged, or no file of results: {error}\n"
            "nothing was changed; `sqlite3 FILE .recover` saves what can be read, and --out names another file"
        ) from error
    except OSError as error:
        raise KvtwinError(f"cannot use {path}: {error.strerror or error}\n{PLACE}") from error
