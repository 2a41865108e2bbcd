"""The demo on few policies and few tokens: its rows, its files, and that a fault turns a verdict."""

import io
import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from backends import backends
from experiments import demo, record, report, run
from framework.cache import Decision
from framework.checkpoint import open_checkpoint
from framework.errors import KvtwinError

SMALL = demo.Settings(
    names=("window",),
    budgets=(12,),
    prompts=(40, 33),
    steps=5,
    greedy=3,
    recalls=3,
    recall_lengths=(30, 40),
    pairs=2,
)


def faulty(backend, model):
    """The model, whose flax twin has one weight in a thousand changed."""
    held = open_checkpoint(model)
    weights = dict(held.weights)
    if backend == "flax":
        name = "layers.0.attention.key.weight"
        weights[name] = weights[name] * 1.001
    return backends.get(backend).build(held.spec, weights)


@pytest.fixture(scope="module")
def rows():
    tasks = (demo.text_task(SMALL), demo.recall_task(SMALL))
    return [row for task in tasks for pair in demo.ask(task, SMALL.spellings()) for row in pair]


def test_every_model_policy_and_backend_has_a_row(rows):
    cases = [(row.model, row.policy, row.backend) for row in rows]
    assert cases == [
        (model, policy, backend)
        for model in ("bytes", "recall")
        for policy in ("full()", "window(budget=12)")
        for backend in ("torch", "flax")
    ]


def test_the_backends_agree(rows):
    assert [row.verdict for row in rows] == ["equal"] * len(rows)
    assert all(row.equal and row.drift <= 1e-5 for row in rows)


def test_full_is_its_own_measure(rows):
    full = [row for row in rows if row.policy == "full()"]
    assert all(row.kl == 0 and row.top1 == 1 and row.requested_tokens is None for row in full)
    assert all(row.flags == () for row in rows)
    assert [row.kept_min for row in full if row.model == "bytes"] == [38, 38]
    assert [row.kept_max for row in full if row.model == "bytes"] == [45, 45]


def test_kept_tokens_and_bytes_are_the_budgets(rows):
    window = [row for row in rows if row.policy != "full()"]
    assert all((row.kept_min, row.kept_max) == (12, 12) for row in window)
    assert all(row.payload_bytes == row.requested_bytes < row.allocated_bytes for row in window)
    assert all(row.kl > 0 for row in window if row.model == "bytes")


def test_recall_is_what_the_closed_form_predicts(rows):
    recall = [row for row in rows if row.model == "recall"]
    assert all(row.as_predicted == 1 for row in recall)
    assert all(row.recall == 1 for row in recall if row.policy == "full()")
    assert all(row.tokens_per_second is None for row in recall)


def test_rows_are_written_as_lines_of_json(rows, tmp_path):
    record.write(rows, tmp_path / "results.jsonl")
    read = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert read == json.loads(json.dumps([asdict(row) for row in rows]))
    assert set(read[0]) == {each.name for each in fields(record.Row)}
    assert set(read[0]["versions"]) == {"kvtwin", "torch", "jax", "numpy"}


def test_the_plot_is_a_png(rows, tmp_path):
    report.plot(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [each.name for each in tmp_path.iterdir()] == ["quality.png"]


def test_the_tables_fit_a_terminal(rows):
    console = Console(width=100, file=io.StringIO())
    for table in report.tables(rows):
        console.print(table)
    text = console.file.getvalue()
    assert all(name in text for name in ("full()", "window(budget=12)", "equal", "torch == flax"))
    assert "…" not in text


def test_a_fault_in_one_backend_is_reported():
    task = replace(demo.text_task(SMALL), greedy=0)
    pairs = list(demo.ask(task, ["full()"], faulty))
    assert [row.equal for row in pairs[0]] == [False, False]
    assert pairs[0][0].verdict.startswith("drift")


def test_the_command_fails_where_a_verdict_is_not_equal(rows, tmp_path, monkeypatch):
    bad = [replace(rows[0], equal=False, verdict="drift 1e-2"), replace(rows[1], equal=False)]
    monkeypatch.setattr(demo, "ask", lambda task, spellings: iter([bad] if task.model == "bytes" else []))
    result = CliRunner().invoke(run.app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "drift 1e-2" in result.output
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("scores", "kept", "near"),
    [
        ([1.5, 1.5 + 1e-7, 2.5], [0, 2], True),
        ([1.5, 1.5 + 1e-3, 2.5], [0, 2], False),
        ([1.0, 1.0, 2.0], [0, 2], False),  # whole numbers: the tie rule decides
        ([1.5, 1.5 + 1e-7, 2.5], [2, -1], False),
    ],
)
def test_a_swap_counts_only_within_rounding(scores, kept, near):
    positions = np.arange(3, dtype=np.int32)[None, None]
    numbers = np.array(scores, np.float64)[None, None]
    own = Decision(
        0, positions, numbers, np.zeros((1, 1, 3), bool), np.array([[[1, 2]]], np.int32), np.array([[2]])
    )
    assert demo.swapped(own, np.array(kept, np.int32)[None, None]) == (1, near)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(demo, "ask", None)
    with pytest.raises(KvtwinError, match="cannot write into the folder"):
        CliRunner().invoke(
            run.app, ["demo", "--out", str(tmp_path / "file" / "deep")], catch_exceptions=False
        )


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("before\n")

    def interrupted():
        with record.whole(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "before\n"
    assert [each.name for each in tmp_path.iterdir()] == ["results.jsonl"]
