"""experiments/sweep.py: a sweep gives the same rows however often it is killed, and whatever its cells do."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from experiments.question import Setting
from experiments.run import app
from experiments.sweep import sweep
from experiments.sweeps import local_workers, results
from experiments.sweeps.asking import Asker, Job, Remembered, size
from experiments.sweeps.grid import Asked, grid
from experiments.sweeps.provenance import version
from experiments.sweeps.results import read
from framework.errors import KvtwinError

ROOT = Path(__file__).parents[2]
# The reference backend imports neither torch nor jax: a worker starts quickly.
PLAIN: dict[str, Any] = {"model": "recall", "backends": "reference", "dtypes": "float64", "seeds": range(3)}
MANY: dict[str, Any] = PLAIN | {
    "questions": [
        "fake.py(length=8, seconds=0.02, log='log')",
        "fake.py(length=9, seconds=0.03, log='log')",
        "fake.py(length=10, gate='go', log='log')",
    ],
    "policies": ["full()", "h2o", "window"],
    "budgets": [0.5, 8, 16, 24],
}
CELLS = 3 * (1 + 4 + 4)
SCRIPT = "from experiments.sweep import sweep; sweep(**{})"
# The command line; where tests run in the background of a shell, interrupts are ignored, and that is passed on.
HEARING = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from experiments.run import main; main()"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the fake question and an open gate."""
    shutil.copy(Path(__file__).with_name("fake_question.py"), tmp_path / "fake.py")
    (tmp_path / "go").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def closed(place: Path) -> Path:
    """The same with a closed gate: a third of the cells of MANY has no end, so that no sweep is done too early."""
    (place / "go").unlink()
    return place


def asked() -> list[str]:
    """What was asked so far: length, policy, codec and seeds of each time."""
    log = Path("log")
    return [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.exists() else []


def plain(
    questions: tuple[str, ...], policies: tuple[str, ...], models: tuple[str, ...] = ("recall",)
) -> Asked:
    return Asked(questions, models, policies, (8,), backends=("reference",), dtypes=("float64",))


def process(**more: Any) -> "subprocess.Popen[bytes]":
    """A sweep in another process, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(MANY | more)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def cells_in(path: Path) -> int:
    """Cells that a file holds with all their seeds; a file that is just being made holds none."""
    connection = sqlite3.connect(path, timeout=20)
    try:
        asked = "SELECT count(*) FROM (SELECT key FROM results GROUP BY key HAVING count(*) = 3)"
        return connection.execute(asked).fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def wait_for(path: Path, cells: int, running: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + 60
    while not path.exists() or cells_in(path) < cells:
        assert running.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(group: int) -> bool:
    """Whether a process of a group runs; of those that nobody has waited for yet, none does."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, its = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its) == group and state != "Z":
                return True
    return False


def gone(group: int) -> bool:
    """Whether no process of a group is left, after a while."""
    until = time.monotonic() + 20
    while alive(group) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(group)


def lasting(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that are the same each time."""
    return frame.drop(columns=["seconds", "provenance.time"])


def killed(path: Path, cells: int) -> tuple[int, list[str]]:
    """Start a sweep with four workers, kill all of it when so many cells are there; the cells that are, and what was
    asked so far."""
    running = process(out=path.name, jobs=4)
    wait_for(path, cells, running)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert gone(running.pid)
    return cells_in(path), asked()


def test_a_sweep_that_was_killed_goes_on_to_the_same_rows(closed: Path) -> None:
    path = closed / "killed.sqlite"
    done, before = killed(path, 5)
    assert 5 <= done <= 2 * CELLS / 3
    assert done <= len(before) <= done + 4  # only what the workers were at is lost
    assert len(read(path)) == 3 * done
    (closed / "go").touch()
    resumed = sweep(**MANY, out=path, jobs=4)
    assert len(asked()) - len(before) == CELLS - done
    assert len(read(path, every=True)) == 3 * CELLS
    undisturbed = sweep(**MANY, out="undisturbed.sqlite")
    assert len(undisturbed) == 3 * CELLS
    pd.testing.assert_frame_equal(lasting(resumed), lasting(undisturbed))


@pytest.mark.slow
def test_a_sweep_that_was_killed_again_and_again(closed: Path) -> None:
    path, done, lost = closed / "killed.sqlite", 0, 0
    while done < 2 * CELLS / 3 - 4:
        now, before = killed(path, done + 3)
        lost += 4
        assert done < now <= len(before) <= now + lost
        done = now
    (closed / "go").touch()
    undisturbed = sweep(**MANY, out="undisturbed.sqlite")
    pd.testing.assert_frame_equal(lasting(sweep(**MANY, out=path)), lasting(undisturbed))


def test_workers_end_when_the_sweep_alone_is_killed(closed: Path) -> None:
    running, path = process(out="killed.sqlite", jobs=2), closed / "killed.sqlite"
    wait_for(path, 2 * CELLS // 3, running)  # the gate holds up both
    running.kill()
    running.communicate()
    assert gone(running.pid)


def test_an_interrupted_sweep_ends_with_what_it_has(closed: Path) -> None:
    options = "--model recall --backend reference --dtype float64 --seeds 3 --budget 0.5,8,16,24 --jobs 2"
    words = ["-c", HEARING, "run", *MANY["questions"], *options.split(), "--out", "one.sqlite"]
    words += [word for policy in MANY["policies"] for word in ("--policy", policy)]
    running = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_for(closed / "one.sqlite", 3, running)
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=60)[1].decode()
    assert running.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("kvtwin run: interrupted; what was measured is in one.sqlite")
    assert gone(running.pid)
    assert 3 <= cells_in(closed / "one.sqlite") < CELLS


def test_two_sweeps_on_one_file_both_finish(place: Path) -> None:
    both = [process(out="both.sqlite") for _ in range(2)]
    ends = [each.communicate(timeout=120)[1].decode() for each in both]
    assert [each.returncode for each in both] == [0, 0], ends
    frame = read("both.sqlite", every=True)
    assert len(frame) == 3 * CELLS
    pd.testing.assert_frame_equal(lasting(sweep(**MANY, out="both.sqlite")), lasting(frame))
    assert len(asked()) <= 2 * CELLS


def test_a_cell_that_fails_does_not_stop_the_others(place: Path) -> None:
    asks = ["fake.py(fate='raise')", "fake.py()", "fake.py(fate='exit')"]
    frame = sweep(**PLAIN, questions=asks, policies="full()", out="one.sqlite")
    errors = dict(zip(frame["question"], frame["error"], strict=True))
    assert errors == {
        "fake.py()": "",
        "fake.py(fate='raise')": "ZeroDivisionError: one\ntwo\nthree",
        "fake.py(fate='exit')": "SystemExit: gone",
    }
    assert frame["seed"].tolist() == [0, 1, 2] * 3
    assert np.isnan(frame["measure.score"]).tolist() == [False] * 3 + [True] * 6


def test_workers_that_die(place: Path) -> None:
    """One dies once, one each time, one ends with words, and the others are not disturbed."""
    once = f"fake.py(fate='{place}/flag')"
    asks = [once, "fake.py(fate='die')", "fake.py(fate='end')", "fake.py()", "fake.py(length=8)"]
    frame = sweep(**PLAIN, questions=asks, policies="full()", out="one.sqlite", jobs=2)
    errors = dict(zip(frame["question"], frame["error"], strict=True))
    twice = "the process that measured it ended twice:"
    assert errors == {
        once: "",
        "fake.py()": "",
        "fake.py(length=8)": "",
        "fake.py(fate='die')": f"{twice} by SIGKILL",
        "fake.py(fate='end')": f"{twice} with code 3: last words",
    }
    assert len(frame) == 15
    alone = sweep(**PLAIN, questions=[asks[0], *asks[3:]], policies="full()", out="alone.sqlite")
    pd.testing.assert_frame_equal(lasting(frame[frame["error"] == ""].reset_index(drop=True)), lasting(alone))


def test_a_failure_is_tried_again_by_the_next_sweep(place: Path) -> None:
    question = "fake.py(fate='raise', log='log')"
    for times in (1, 2):
        frame = sweep(**PLAIN, questions=question, policies="full()", out="one.sqlite")
        assert len(frame) == 3
        assert len(asked()) == times


def test_workers_that_do_not_start(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numpy is broken."""
    (place / "numpy.py").write_text("raise ImportError('broken numpy')")
    monkeypatch.setattr(local_workers, "importable", lambda: f"{place}{os.pathsep}{ROOT}")
    with pytest.raises(KvtwinError, match="does not start: with code 1: ImportError: broken numpy"):
        sweep(**MANY, out="one.sqlite", jobs=2)
    assert len(read("one.sqlite")) == 0


def test_a_full_disk_keeps_what_was_measured(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = results._opened

    def small(path: Path) -> sqlite3.Connection:
        connection = opened(path)
        connection.execute("PRAGMA max_page_count = 12")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(results, "_opened", small)
        with pytest.raises(KvtwinError, match="(?s)database or disk is full.*run the same command again"):
            sweep(**MANY, out="one.sqlite")
    done, before = cells_in(place / "one.sqlite"), len(asked())
    assert 0 < done < CELLS
    assert before == done + 1
    assert len(sweep(**MANY, out="one.sqlite")) == 3 * CELLS
    assert len(asked()) - before == CELLS - done


def test_a_file_that_cannot_be_used_is_told_before_anything_runs(place: Path) -> None:
    (place / "notes.txt").write_text("no database at all\n" * 20)
    with pytest.raises(KvtwinError, match="no file of results"):
        sweep(**MANY, out="notes.txt")
    assert asked() == []


def test_only_what_is_missing_is_asked(place: Path) -> None:
    few = MANY | {"policies": ["window"], "budgets": [8], "questions": "fake.py(log='log')"}
    sweep(**few, out="one.sqlite")
    assert asked() == ["9 window(budget=8) full() [0, 1, 2]"]
    frame = sweep(**few | {"seeds": range(5), "budgets": [8.0, 8]}, out="one.sqlite")
    assert asked()[1:] == ["9 window(budget=8) full() [3, 4]"]
    assert frame["seed"].tolist() == [0, 1, 2, 3, 4]
    fewer = sweep(**few | {"seeds": [1]}, out="one.sqlite")
    assert len(asked()) == 2
    assert fewer["seed"].tolist() == [1]
    other = sweep(**few | {"policies": ["window(sinks=1)"], "seeds": [1]}, out="one.sqlite")
    assert asked()[2:] == ["9 window(budget=8, sinks=1) full() [1]"]
    assert other["policy"].tolist() == ["window(sinks=1)"]
    assert len(read("one.sqlite")) == 6


POLICY = """
from dataclasses import dataclass
from framework.policy import Policy

@dataclass(frozen=True, kw_only=True)
class Mine(Policy):
    def score(self, view):
        return {}
"""


def test_an_edited_file_is_measured_again_and_an_edit_taken_back_is_not(place: Path) -> None:
    def run() -> pd.DataFrame:
        return sweep(
            **PLAIN,
            questions="fake.py(log='log')",
            policies=["mine.py", "full()"],
            budgets=[8],
            out="one.sqlite",
        )

    (place / "mine.py").write_text(POLICY.format("view.positions"))
    first = run()
    assert len(asked()) == 2
    (place / "mine.py").write_text(POLICY.format("-view.positions"))
    second = run()
    assert [line.split()[1] for line in asked()[2:]] == ["mine.py(budget=8)"]
    origins = [frame.groupby("policy")["provenance.version"].unique().map(list) for frame in (first, second)]
    assert origins[0]["full()"] == origins[1]["full()"]
    assert origins[0]["mine.py()"] != origins[1]["mine.py()"]
    (place / "mine.py").write_text(POLICY.format("view.positions"))
    pd.testing.assert_frame_equal(run(), first)
    assert len(asked()) == 3
    assert len(read("one.sqlite", every=True)) == 9
    fake = place / "fake.py"
    fake.write_text(fake.read_text() + "\n# edited\n")
    run()
    assert len(asked()) == 5


def test_a_version_covers_what_the_question_imports(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def versions() -> dict[str, str]:
        names = ("passkey()", "copy()", "niah()", "fake.py()")
        return {cell.question: version(cell) for cell in grid(plain(names, ("full()",)))}

    before, read_bytes = versions(), Path.read_bytes
    assert len(set(before.values())) == 4
    for edited, changed in {
        "experiments/text.py": {"passkey()", "copy()", "niah()"},
        "experiments/questions/niah.py": {"niah()"},
        "experiments/questions/copy.py": {"copy()"},
        "experiments/sweeps/asking.py": set(before),
        "experiments/benches/run.py": set(),
    }.items():
        with monkeypatch.context() as patch:

            def edit(path: Path, edited: str = edited) -> bytes:
                return read_bytes(path) + (b"\n# edited" if path == ROOT / edited else b"")

            patch.setattr(Path, "read_bytes", edit)
            after = versions()
        assert {name for name in before if after[name] != before[name]} == changed, edited


def test_a_model_is_loaded_once_and_goes_when_it_is_no_longer_needed(place: Path) -> None:
    """The models of one name and dtype stay, those of the one before go."""
    asker = Asker()
    cells = grid(plain(("fake.py()",), ("full()", "h2o"), ("recall", "bytes")))
    loaded = []
    for cell in cells:
        asker.ask(Job(cell, (0,), "one"))
        assert list(asker.models) == [(cell.model, "reference", "float64")]
        loaded.append(id(asker.models[cell.model, "reference", "float64"]))
    assert [cell.model for cell in cells] == ["recall", "recall", "bytes", "bytes"]
    assert loaded[0] == loaded[1]
    assert loaded[2] == loaded[3]


def test_what_questions_keep_has_a_bound() -> None:
    kept = Remembered(room=100)
    setting = Setting(None, "full()", "full()", None, kept)
    made = [setting.once(key, lambda: [np.zeros(5), {"a": (np.zeros(2, np.int32),)}]) for key in "ab"]
    assert size(made[0]) == 48
    assert setting.once("a", lambda: pytest.fail("was there")) is made[0]
    setting.once("c", lambda: np.zeros(1))
    assert list(kept) == ["b", "c"]
    assert len(setting.once("large", lambda: np.zeros(99))) == 99
    assert list(kept) == ["large"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seeds": []}, "seeds are .*; expected at least one integer"),
        ({"seeds": [0.5]}, "expected at least one integer"),
        ({"seeds": [-1]}, "none below 0"),
        ({"jobs": 0}, "jobs is 0; expected"),
        ({"engine": "rya"}, "no engine 'rya'; expected one of local, ray"),
        ({"policies": ["window(sinks=20)"], "budgets": [8]}, "expected at least 20"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    other: dict[str, Any], message: str, place: Path
) -> None:
    with pytest.raises(KvtwinError, match=message):
        sweep(**MANY | other, out="one.sqlite")
    assert asked() == []
    assert not (place / "one.sqlite").exists()


def test_a_question_without_seeds_is_asked_once(place: Path) -> None:
    text = (place / "fake.py").read_text()
    (place / "fake.py").write_text(
        text.replace("    length: int = 9", "    seeded = False\n    length: int = 9")
    )
    frame = sweep(**PLAIN, questions="fake.py(log='log')", policies="full()", out="one.sqlite")
    assert asked() == ["9 full() full() [0]"]
    assert frame["seed"].tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"other": other, ', ""), "measured score; expected what its class says: score, other"),
        (("for seed in seeds]", "for seed in seeds[1:]]"), r"answered for seeds \[1, 2\]; expected one"),
        (("requested=4.5", "requested=float('nan')"), "expected finite numbers"),
        (('"score": score', '"score": None'), "TypeError: "),
    ],
)
def test_answers_are_looked_at(change: tuple[str, str], message: str, place: Path) -> None:
    text = (place / "fake.py").read_text()
    assert change[0] in text
    (place / "fake.py").write_text(text.replace(*change))
    frame = sweep(**PLAIN, questions="fake.py()", policies="full()", out="one.sqlite")
    assert frame["error"].str.contains(message, regex=True).all()


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_bundled_model_from_the_command_line(backend: str, place: Path) -> None:
    """What is held is what was asked for; asked again it is read from the file."""
    words = [
        "run",
        "copy(length=96, words=2)",
        "--model",
        "recall",
        "--policy",
        "full()",
        "--policy",
        "window",
    ]
    words += ["--budget", "0.25,16", "--backend", backend, "--seeds", "4", "--out", "one.sqlite"]
    first = CliRunner().invoke(app, words, catch_exceptions=False)
    assert first.exit_code == 0
    frame = read("one.sqlite")
    assert len(frame) == 12
    assert set(frame["error"]) == {""}
    full, half, few = (frame[frame["budget"].fillna(-1) == budget] for budget in (-1, 0.25, 16))
    assert (full["kept_min"] == full["context"]).all()
    assert (few["kept_max"] == 16).all()
    assert (half["requested"] == np.ceil(0.25 * full["context"].max())).all()
    assert (full["measure.score"].to_numpy() >= few["measure.score"].to_numpy()).all()
    again = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "3 of 3 cells are in one.sqlite already" in again.stderr
    assert again.stdout == first.stdout
    assert "window()" in first.stdout
    assert "16 of 16" in first.stdout
    pd.testing.assert_frame_equal(read("one.sqlite"), frame)


def test_the_command_tells_of_failures_and_of_lists_that_are_none(place: Path) -> None:
    words = [
        "run",
        "fake.py(fate='raise')",
        "--model",
        "recall",
        "--backend",
        "reference",
        "--dtype",
        "float64",
    ]
    words += ["--policy", "full()", "--seeds", "2", "--out", "one.sqlite"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 1
    assert "1/1 fake.py(fate='raise') recall full() reference float64: ZeroDivisionError: one" in done.stderr
    assert "failed: ZeroDivisionError: one" in done.stdout
    with pytest.raises(KvtwinError, match="--budget '0.1;5' is no list of numbers"):
        CliRunner().invoke(app, [*words, "--budget", "0.1;5"], catch_exceptions=False)


def test_ray_that_is_not_installed_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KvtwinError, match=r"engine ray needs .* `pip install kvtwin\[ray\]`"):
        sweep(**MANY, out="one.sqlite", engine="ray")
