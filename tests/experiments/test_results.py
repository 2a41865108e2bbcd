"""The file of results: what is written is read again; nothing is lost by full disks, foreign or damaged files."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.question import Held
from experiments.result import Cell, Result
from experiments.sweeps.results import Results, cells_of, read
from framework.errors import KvtwinError

ROOT = Path(__file__).parents[2]
CELL = Cell("passkey(length=400)", "recall", "ab12", "h2o()", 0.25, "full()", "torch", "float32")
OTHER = replace(CELL, policy="adakv(policy=snapkv())", budget=None, question="my.py(size=3)")
HELD = Held(
    context=390, requested=98.0, kept_min=97, kept_max=98, kept=97.5, payload=1 << 40, allocated=5000, full=9000,
    flags=("masked", "missed_budget"),
)  # fmt: skip


def result(seed: int, cell: Cell = CELL, version: str = "one", error: str = "", score: float = 0.5) -> Result:
    origin = {"version": version, "torch": "2.13.0", "time": "now"}
    if error:
        return Result(cell, seed, error=error, provenance=origin)
    return Result(cell, seed, {"score": score + seed}, HELD, "said ü\n", "wanted", 1.5, "", origin)


def written(path: Path, rows: Sequence[Result], version: str = "one") -> None:
    with Results(path, {row.cell.key: version for row in rows}) as results:
        results.add(rows)


def scores(path: Path) -> list[float]:
    return read(path)["measure.score"].tolist()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.sqlite"
    second = replace(result(7, OTHER), measures={"kl": 0.25, "score": float("inf")}, held=None)
    written(path, [result(3), second])
    frame = read(path)
    assert list(frame.columns) == [
        "question", "task", "model", "weights", "policy", "method", "budget", "codec", "backend", "dtype", "seed",
        "measure.kl", "measure.score", "context", "requested", "kept_min", "kept_max", "kept", "payload", "allocated",
        "full", "flags", "said", "wanted", "seconds", "error", "provenance.version", "provenance.torch",
        "provenance.time",
    ]  # fmt: skip
    other, first = frame.to_dict("records")
    assert cells_of(frame) == [OTHER, CELL]
    assert (other["task"], other["method"], other["measure.kl"]) == ("my.py", "adakv", 0.25)
    assert other["measure.score"] == float("inf")
    assert np.isnan([other["budget"], other["context"], other["payload"], first["measure.kl"]]).all()
    assert (first["task"], first["method"], first["budget"], first["seed"]) == ("passkey", "h2o", 0.25, 3)
    assert (first["measure.score"], first["said"], first["wanted"], first["seconds"]) == (
        3.5,
        "said ü\n",
        "wanted",
        1.5,
    )
    assert {name: first[name] for name in ("context", "requested", "kept_min", "kept_max", "kept")} == {
        "context": 390, "requested": 98, "kept_min": 97, "kept_max": 98, "kept": 97.5,
    }  # fmt: skip
    assert (first["payload"], first["allocated"], first["full"]) == (1 << 40, 5000, 9000)
    assert (first["flags"], other["flags"]) == (("masked", "missed_budget"), ())
    assert (first["error"], first["provenance.torch"]) == ("", "2.13.0")


def test_the_file_can_be_asked_without_kvtwin(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0), result(1)])
    connection = sqlite3.connect(path)
    asked = "SELECT seed, measures ->> 'score', kept, held ->> 'payload', provenance ->> 'torch' FROM results"
    assert connection.execute(asked).fetchall() == [
        (0, 0.5, 97.5, 1 << 40, "2.13.0"),
        (1, 1.5, 97.5, 1 << 40, "2.13.0"),
    ]
    connection.close()
    assert [each.name for each in tmp_path.iterdir()] == ["results.sqlite"]


def test_what_is_done_is_known_by_cell_and_version(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0), result(2), result(5, error="failed")])
    written(path, [result(4, OTHER)])
    with Results(path, {CELL.key: "one", OTHER.key: "two"}) as results:
        assert results.done(CELL) == {0, 2}
        assert results.done(OTHER) == set()


def test_a_row_stays_and_a_failure_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0, score=0.25), result(1, error="failed")])
    written(path, [result(0, score=9), result(1, score=0.75)])
    assert scores(path) == [0.25, 1.75]
    written(path, [result(0, error="failed later"), result(1, error="failed later")])
    frame = read(path)
    assert frame["measure.score"].tolist() == [0.25, 1.75]
    assert frame["error"].tolist() == ["", ""]
    assert len(read(path, every=True)) == 2


def test_versions_stand_beside_each_other_and_the_one_asked_for_last_is_read(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0, score=1), result(1, score=1)])
    written(path, [result(0, version="two", score=5)], "two")
    assert scores(path) == [5, 2]
    assert sorted(read(path, every=True)["measure.score"]) == [1, 2, 5]
    written(path, [], "one")
    assert scores(path) == [5, 2]
    with Results(path, {CELL.key: "one"}):  # as after an edit that was taken back: nothing is measured
        pass
    assert scores(path) == [1, 2]


def test_rows_are_written_all_or_none(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0)])
    bad = replace(result(2), said=object())
    with Results(path, {CELL.key: "one"}) as results, pytest.raises(sqlite3.Error):
        results.add([result(1), bad])
    assert read(path)["seed"].tolist() == [0]


WRITER = """
import sys
from pathlib import Path
from experiments.result import Cell, Result
from experiments.sweeps.results import Results

cell, origin, own = Cell(*"abcd", 0.5, *"efg"), {"version": "one"}, int(sys.argv[2])
for seed in range(9):
    for one in (seed, 100 + 2 * seed + own):
        with Results(Path(sys.argv[1]), {cell.key: "one"}) as results:
            results.add([Result(cell, one, {"score": own}, provenance=origin)])
"""


def test_two_processes_write_into_one_new_file(tmp_path: Path) -> None:
    """The nine seeds of both are there once, and all that only one of them has."""
    path = tmp_path / "results.sqlite"
    words = [sys.executable, "-c", WRITER, str(path)]
    both = [subprocess.Popen([*words, own], cwd=ROOT) for own in ("0", "1")]
    assert [each.wait(60) for each in both] == [0, 0]
    assert sorted(read(path, every=True)["seed"]) == [*range(9), *range(100, 118)]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    with Results(path, {CELL.key: "one"}) as results:
        results.add([result(0)])
        [(pages,)] = results.connection.execute("PRAGMA page_count")
        results.connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(KvtwinError, match="(?s)is full.*measured before is in it; make room"):
            results.add([replace(result(seed), said="x" * 3000) for seed in range(1, 20)])
        results.connection.execute("PRAGMA max_page_count = 1000000")
        results.add([result(30)])
    assert read(path)["seed"].tolist() == [0, 30]


def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """Whichever of its pages is damaged: tables of tables, rows, or the index of rows."""
    path = tmp_path / "results.sqlite"
    written(path, [replace(result(seed), said="x" * 400) for seed in range(40)])
    whole = path.read_bytes()
    assert len(whole) > 8 * 4096
    for page in range(0, len(whole), 4096):
        text = whole[:page] + b"\xff" * 100 + whole[page + 100 :]
        path.write_bytes(text)
        for use in (lambda: Results(path, {}), lambda: read(path)):
            with pytest.raises(KvtwinError, match="is damaged, or no file of results"):
                use()
        assert path.read_bytes() == text


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [replace(result(seed), said="x" * 900) for seed in range(40)])
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(KvtwinError, match="is damaged"):
        Results(path, {})


def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    text, other = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text(
        "milk, bread, a longer line than a header of a hundred bytes would ever be in any format" * 3
    )
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE results (id)")
    connection.close()
    for path, message in ((text, "no file of results"), (other, "holds no results of kvtwin")):
        before = path.read_bytes()
        for use in (lambda path=path: Results(path, {}), lambda path=path: read(path)):
            with pytest.raises(KvtwinError, match=message):
                use()
        assert path.read_bytes() == before


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0)])
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    for use in (lambda: Results(path, {}), lambda: read(path)):
        with pytest.raises(KvtwinError, match=r"another version of kvtwin \(format 2, expected 1\)"):
            use()


def test_places_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KvtwinError, match="name another with --out"):
        Results(tmp_path / "file" / "results.sqlite", {})
    with pytest.raises(KvtwinError, match="is a folder; expected a file"):
        Results(tmp_path, {})
    with pytest.raises(KvtwinError, match="no results are at .*nothere.*kvtwin run --out"):
        read(tmp_path / "nothere.sqlite")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(KvtwinError, match="holds no results of kvtwin"):
        read(tmp_path / "empty.sqlite")
    written(tmp_path / "empty.sqlite", [result(0)])
    assert len(read(tmp_path / "empty.sqlite")) == 1


def test_a_file_that_is_only_read_is_refused_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened as SQLite opens a file without the right to write, which a test cannot take from every user."""
    path, connect = tmp_path / "results.sqlite", sqlite3.connect
    written(path, [result(0)])
    monkeypatch.setattr(
        sqlite3, "connect", lambda place, **more: connect(f"file:{place}?mode=ro", uri=True, **more)
    )
    with pytest.raises(KvtwinError, match="readonly"):
        Results(path, {CELL.key: "one"})
    assert scores(path) == [0.5]


def test_provenance_and_held_are_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    written(path, [result(0)])
    connection = sqlite3.connect(path)
    [(held, flags)] = connection.execute("SELECT held, flags FROM results")
    connection.close()
    assert json.loads(held) == {**vars(HELD), "flags": ["masked", "missed_budget"]}
    assert flags == "masked missed_budget"
