"""kvtwin bench: the order of blocks, engines that fail, runs that are interrupted, rows, and what they say."""

import itertools
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from experiments import bench, installed, run
from experiments.benches import case as bench_case
from experiments.benches import engine as bench_engine
from experiments.benches import model as bench_model
from experiments.benches import report as bench_report
from experiments.benches import run as bench_run
from experiments.benches import target as bench_target
from experiments.benches import worker as bench_worker
from experiments.benches.case import Case, Entry, contest, flatness, title
from experiments.benches.engine import Engine, Failed
from experiments.benches.model import SHAPES, Subject, subject
from experiments.benches.result import Result, Spread, results
from experiments.benches.row import Row, append, fitting, newest, read
from experiments.benches.run import Bench
from experiments.benches.worker import Workers
from experiments.engines import imports
from experiments.engines.huggingface import HuggingFace
from experiments.engines.imports import Imports
from experiments.engines.kvtwin import Kvtwin
from framework.checkpoint import BUNDLED
from framework.errors import KvtwinError

HERE = {"cpu": "a processor", "cores": 2, "memory": 3, "system": "Linux"}
CASE = Case("decode", "bytes", 5, batch=3, steps=2)


def fake(name: str, file: Path, *does: str) -> Engine:
    """tests/experiments/fake_engine.py as an engine."""
    return Engine(name, "tests.experiments.fake_engine", (), (name, str(file), *does))


@pytest.fixture
def made(tmp_path):
    """Makes a Bench of fake engines that writes rows into a folder; `said` are the blocks that engines ran."""

    def make(
        engines: list[Engine], session: str = "first", bandwidth=lambda: 100.0, rounds: int = 3, keep=None
    ) -> Bench:
        rows = tmp_path / "bench.jsonl"
        return Bench(
            {each.name: each for each in engines},
            {each.name: {"python": "1.2"} for each in engines},
            HERE,
            lambda name: subject(name, tmp_path),
            Workers(tmp_path, tmp_path),
            bandwidth,
            keep or (lambda row: append(rows, row)),
            session,
            rounds,
            {row.key: row for row in read(rows)},
        )

    return make


@pytest.fixture
def said(tmp_path):
    """What fake engines have run, and the file that they write it to."""

    class Said:
        file = tmp_path / "said"

        def take(self) -> list[str]:
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            self.file.unlink(missing_ok=True)
            return lines

    return Said()


def rows_of(tmp_path):
    return read(tmp_path / "bench.jsonl")


def test_blocks_come_in_turns_after_a_first_one_that_does_not_count(made, said, tmp_path):
    group = contest(CASE, ("a", "b"), "b")
    made([fake("a", said.file), fake("b", said.file)]).run([group])
    first = ["a loads bytes", "a runs 5", "b loads bytes", "b runs 5"]
    assert said.take() == first + ["a runs 5", "b runs 5"] * 3
    rows = rows_of(tmp_path)
    assert [(row.engine, row.round) for row in rows] == [(e, r) for r in range(3) for e in "ab"]
    assert [row.over for row in rows] == ["b: decode bytes 5 x3", None] * 3
    for row in rows:
        assert row.case == CASE
        assert row.seconds > 0
        assert row.first_seconds > 0
        assert (row.bandwidth, row.moved, row.tries, row.error) == ((100.0, 100.0), False, 1, None)
        assert row.others is None  # too short to tell
        assert row.parts == {"cache_bytes": 40.0, "bytes": 1e6}
        assert (row.machine, row.versions, row.session) == (HERE, {"python": "1.2"}, "first")


def test_two_contexts_of_one_engine_are_timed_in_turns(made, said, tmp_path):
    near, far = replace(CASE, context=7), replace(CASE, context=70)
    made([fake("a", said.file)], rounds=2).run([flatness(near, far, ("a",))])
    assert said.take() == ["a loads bytes", *["a runs 7", "a runs 70"] * 3]
    assert {row.over for row in rows_of(tmp_path)} == {None, "a: decode bytes 7 x3"}
    [_, told] = results(rows_of(tmp_path))
    assert told.memory == 10.0


def test_an_interrupted_run_keeps_its_rows_and_goes_on_from_them(made, said, tmp_path):
    engines = [fake("a", said.file), fake("b", said.file)]
    group, count = contest(CASE, ("a", "b"), "b"), itertools.count()

    def keep(row: Row) -> None:
        append(tmp_path / "bench.jsonl", row)
        if next(count) == 2:  # b of round 1 never comes
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(engines, keep=keep).run([group])
    assert [(row.engine, row.round) for row in rows_of(tmp_path)] == [("a", 0), ("b", 0), ("a", 1)]
    said.take()
    made(engines, "second").run([group])
    # The round that was cut is run again whole, so that its ratio is of one run.
    assert said.take()[4:] == ["a runs 5", "b runs 5"] * 2
    sessions = {(row.engine, row.round): row.session for row in rows_of(tmp_path)}
    assert sessions == {(e, r): "second" if r else "first" for e in "ab" for r in range(3)}
    made(engines, "third").run([group])
    assert said.take() == []


def test_rounds_of_different_runs_are_no_pair(made, said, tmp_path):
    group = contest(CASE, ("a", "b"), "b")
    made([fake("a", said.file)], "first", rounds=1).run([group])
    made([fake("b", said.file)], "second", rounds=1).run([group])
    [first, _] = results(rows_of(tmp_path))
    assert (first.engine, first.speed) == ("a", None)
    said.take()
    made([fake("a", said.file), fake("b", said.file)], "third", rounds=1).run([group])
    assert said.take()[-2:] == ["a runs 5", "b runs 5"]
    [first, _] = sorted(results(rows_of(tmp_path)), key=lambda each: each.engine)
    assert first.speed is not None


@pytest.mark.parametrize(
    ("does", "error", "blocks"),
    [
        ("dies", "ended with code 7: out of everything", 2),
        ("refuses", "ValueError: cannot do decode", 0),
    ],
)
def test_a_failed_engine_leaves_the_others_their_rows(made, said, tmp_path, capsys, does, error, blocks):
    group = contest(CASE, ("a", "b", "c"), "c")
    engines = [fake("a", said.file), fake("b", said.file, does), fake("c", said.file)]
    made(engines).run([group, contest(replace(CASE, context=6), ("a", "c"))])
    assert f"b failed, the others go on: {error}" in capsys.readouterr().err
    rows = rows_of(tmp_path)
    assert [row.error for row in rows if row.engine == "b" and row.error] == [error]
    assert sum(row.seconds is not None for row in rows if row.engine == "b") == max(0, blocks - 1)
    good = [(row.case.context, row.engine, row.round) for row in rows if row.seconds and row.engine != "b"]
    assert sorted(good) == [(c, e, r) for c in (5, 6) for e in "ac" for r in range(3)]
    assert sum(line.startswith("b runs") for line in said.take()) == blocks
    # Once more: what failed is tried again, and where it fails at once nothing else runs.
    made(engines, "second").run([group])
    again = said.take()
    assert ("a runs 5" in again) == (does == "dies")
    assert [row.error for row in rows_of(tmp_path) if row.engine == "b" and row.error] == [error]


def test_an_engine_that_does_not_answer_is_ended_and_the_next_group_runs(made, said, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_worker, "PATIENCE", 6.0)
    monkeypatch.setattr(bench_worker, "GRACE", 0.1)
    groups = [contest(replace(CASE, context=context), ("a", "b")) for context in (5, 6)]
    made([fake("a", said.file), fake("b", said.file, "sleeps")], rounds=2).run(groups)
    rows = rows_of(tmp_path)
    assert [(row.case.context, row.round, row.error) for row in rows if row.engine == "b"] == [
        (5, 0, None), (5, 1, "no answer within 6 s"), (6, 0, None), (6, 1, "no answer within 6 s"),
    ]  # fmt: skip
    assert [(row.case.context, row.round) for row in rows if row.engine == "a"] == [
        (5, 0),
        (5, 1),
        (6, 0),
        (6, 1),
    ]


def test_what_was_measured_stays_where_the_engine_fails_later(made, said, tmp_path):
    group = contest(CASE, ("a", "b"), "b")
    made([fake("a", said.file)], "first").run([group])
    made([fake("a", said.file, "refuses"), fake("b", said.file)], "second").run([group])
    rows = {(row.engine, row.round): row for row in rows_of(tmp_path)}
    assert {key: row.error for key, row in rows.items()} == {(e, r): None for e in "ab" for r in range(3)}
    assert {row.session for (engine, _), row in rows.items() if engine == "a"} == {"first"}


def test_rows_of_another_case_of_the_same_name_do_not_count(made, said, tmp_path):
    for steps in (2, 4):
        made([fake("a", said.file)], rounds=1).run([contest(replace(CASE, steps=steps), ("a",))])
        assert said.take().count("a runs 5") == 2
    assert [row.case.steps for row in rows_of(tmp_path)] == [4]


def test_paths_are_those_of_the_folder_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").symlink_to(BUNDLED / "bytes")
    assert subject("./bytes", Path("models")).folder == tmp_path / "bytes"
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["stories110m"] | {"num_hidden_layers": 1, "vocab_size": 8})
    folder = subject("tiny", Path("models"), lambda text: None).folder
    assert folder.is_absolute()
    assert (folder / "model.safetensors").exists()
    (tmp_path / "python").symlink_to("/usr/bin/python3")
    assert bench_engine.known("./python")["kvpress"].python == str(tmp_path / "python")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_engine.known("python")["kvpress"].python == str(tmp_path / "python")
    assert not bench_engine.known()["kvpress"].foreign


def test_an_interpreter_that_is_gone_is_a_failed_engine(made, said, tmp_path):
    gone = replace(fake("b", said.file), python="/no/python")
    made([fake("a", said.file), gone], rounds=1).run([contest(CASE, ("b", "a"))])
    assert [row.error for row in rows_of(tmp_path)] == [
        "/no/python does not start: No such file or directory",
        None,
    ]


def test_an_engine_that_does_not_start_is_a_failed_one(made, said, tmp_path):
    broken = Engine("b", "tests.experiments.no_such_program", ())
    made([fake("a", said.file), broken], rounds=1).run([contest(CASE, ("b", "a"))])
    [b, a] = rows_of(tmp_path)
    assert b.error.startswith("ended with code 1: ")
    assert "no_such_program" in b.error
    assert a.seconds > 0


@pytest.mark.parametrize(
    ("readings", "blocks", "pair", "moved"),
    [
        ([100, 109], 1, (100, 109), False),
        ([100, 112, 104], 2, (112, 104), False),
        ([100, 89, 90], 2, (89, 90), False),
        ([100, 200, 400, 800], 3, (400, 800), True),
    ],
)
def test_a_block_is_run_again_where_the_bandwidth_moved(made, said, tmp_path, readings, blocks, pair, moved):
    left = iter(readings)
    made([fake("a", said.file)], bandwidth=lambda: float(next(left)), rounds=1).run([contest(CASE, ("a",))])
    assert list(left) == []
    assert said.take()[2:] == ["a runs 5"] * blocks
    [row] = rows_of(tmp_path)
    assert (row.bandwidth, row.moved, row.tries) == (pair, moved, blocks)


def test_a_start_is_a_new_process_each_time(made, said, tmp_path):
    case = Case("start", "bytes", 5)
    made([fake("a", said.file)], rounds=2).run([contest(case, ("a",))])
    assert said.take() == ["a loads bytes", "a runs 5"] * 3
    for row in rows_of(tmp_path):
        parts = row.parts
        assert row.seconds == pytest.approx(parts["imports"] + parts["load"] + parts["first"])
        assert 0 < parts["resident"] <= parts["peak"]
        stored = load_file(BUNDLED / "bytes" / "model.safetensors")
        assert parts["weights"] == 4 * sum(each.size for each in stored.values())


# Rows


def row(engine: str = "torch", index: int = 0, **more) -> Row:
    base = Row(
        "decode m 9", Case("decode", "m", 9), engine, None, index, 0.5, 0.7, (10.0, 11.0), machine=HERE
    )
    return replace(base, **more)


def test_rows_come_back_as_they_were_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "bench.jsonl"
    every = [row(), row(index=1, error="why"), row("flax", bandwidth=None, seconds=None), row(seconds=0.25)]
    for each in every:
        append(path, each)
    assert len(path.read_text().splitlines()) == 4
    assert read(path) == every[1:]
    assert read(tmp_path / "none") == []


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, cut):
    path = tmp_path / "bench.jsonl"
    append(path, row())
    append(path, row(index=1))
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(path) == [row()]
    append(path, row(index=2))
    assert read(path) == [row(), row(index=2)]


@pytest.mark.parametrize(
    "line", ["no json", "[1]", '{"case": {"kind": "decode"}}', json.dumps({"model": "bytes"})]
)
def test_a_line_that_is_no_row_is_refused(tmp_path, line):
    path = tmp_path / "bench.jsonl"
    append(path, row())
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(KvtwinError, match="line 2 of .* is no row"):
        read(path)


def test_rows_of_others_are_not_mixed_in():
    new, old = {"python": "3.12"}, {"python": "3.11"}
    elsewhere = row(index=4, versions=new, machine=HERE | {"cores": 64})
    rows = [row(versions=old), elsewhere, row("flax", versions=old), row(index=1, versions=new)]
    assert fitting(rows, HERE, {"torch": new, "flax": old}) == [rows[2], rows[3]]
    assert fitting(rows, HERE, {"torch": old}) == [rows[0]]
    assert newest(rows) == [rows[2], rows[3]]


def test_versions_name_what_is_missing():
    with pytest.raises(Failed, match=r"not installed: no-such-thing, for .*python"):
        bench_engine.versions(Engine("a", "p", ("numpy", "no-such-thing")))
    with pytest.raises(Failed, match=r"/no/python does not run"):
        bench_engine.versions(Engine("a", "p", ("numpy",), python="/no/python"))
    found = bench_engine.versions(bench_engine.known()["torch"])
    assert (found["torch"], found["numpy"]) == (torch.__version__, np.__version__)
    assert found["kvtwin"] != bench_engine.versions(bench_engine.known()["imports"])["kvtwin"]


# What rows say


def told(seconds: dict[str, list[float]], **more) -> list[Result]:
    """Results of engines over one case, compared with hf-dynamic."""
    case = Case("decode", "m", 9, batch=2)
    rows = [
        Row(
            "g", case, engine, None if engine == "hf-dynamic" else f"hf-dynamic: {case}", index, each,
            2.0, (90.0, 110.0), step_bytes=30.0, **more,
        )
        for engine, found in seconds.items()
        for index, each in enumerate(found)
    ]  # fmt: skip
    return results(rows)


def test_what_is_left_of_a_start_is_taken_round_by_round():
    case = Case("start", "m", 9)
    rows = [
        Row(
            "g",
            case,
            "torch",
            None,
            index,
            total,
            parts={"load": load, "peak": most, "resident": 1.0, "weights": 2.0},
        )
        for index, (total, load, most) in enumerate([(10.0, 5.0, 4.0), (11.0, 1.0, 3.0), (12.0, 3.0, 6.0)])
    ]
    [result] = results(rows)
    assert result.after_loading == Spread(9.0, 5.0, 10.0)
    assert result.peak == Spread(1.5, 1.0, 2.5)
    assert result.parts["load"] == 3.0


def test_models_are_reported_apart_and_targets_are_of_the_larger_one():
    rows = [
        row(group=f"decode {model} 128", case=Case("decode", model, 128), step_bytes=10.0, seconds=seconds)
        for model, seconds in (("stories110m", 0.5), ("qwen2.5-0.5b", 0.25))
    ]
    rows += [row("imports", group="import none", case=Case("import", "none"))]
    found = results(rows)
    assert {name: [each.engine for each in some] for name, some in bench_report.by_model(found).items()} == {
        "stories110m": ["torch"], "qwen2.5-0.5b": ["torch", "imports"],
    }  # fmt: skip
    assert [each.result.case.model for each in bench_target.findings(found)] == ["qwen2.5-0.5b", "none"]
    page = bench_report.markdown(found, rows, None)
    assert page.startswith("a processor")
    assert page.index("stories110m:") < page.index("| decode 128 |") < page.index("qwen2.5-0.5b:")


def test_ratios_are_of_single_rounds():
    ours, theirs = told({"torch": [0.5, 1.0, 2.0], "hf-dynamic": [1.0, 3.0, 2.0]})
    assert ours.seconds == Spread(1.0, 0.5, 2.0)
    assert ours.speed == Spread(2.0, 1.0, 3.0)  # 2, 3, 1: not the ratio of the medians alone
    assert ours.tokens_per_second == 2.0
    assert ours.limit == Spread(0.3, 0.15, 0.6)  # 30 bytes in a second of 100
    assert theirs.speed is None
    assert (ours.rounds, ours.error, ours.moved) == (3, None, 0)
    assert ours.compiled == 0.0


def test_what_compilation_took_is_what_the_first_block_had_beyond_another():
    [ours] = told({"torch": [0.01, 0.03, 0.02]})
    assert ours.compiled == pytest.approx(2.0 - 16 * 0.02)


@pytest.mark.parametrize(
    ("name", "parameters"), [("qwen2.5-0.5b", 494_032_768), ("stories110m", 109_529_856)]
)
def test_a_step_reads_weights_and_live_keys_and_values(name, parameters):
    """The numbers of parameters are those of the model cards."""
    spec = bench_model.family(SHAPES[name]).spec(SHAPES[name])
    one = Subject(Path(), spec)
    assert one.weights_bytes == 4 * parameters
    token = {"qwen2.5-0.5b": 24 * 2 * 2 * 64 * 4, "stories110m": 12 * 2 * 12 * 64 * 4}[name]
    case = Case("decode", name, 100, batch=3, steps=10)
    assert one.step_bytes(case) == 4 * parameters + 3 * 105 * token
    assert one.step_bytes(replace(case, policy="window(budget=40)")) == 4 * parameters + 3 * 40 * token
    assert 2 * one.step_bytes(replace(case, dtype="bfloat16")) == one.step_bytes(case)
    untied = Subject(Path(), replace(spec, tied=False))
    assert untied.step_bytes(case) == one.step_bytes(case)
    assert untied.weights_bytes > one.weights_bytes


def test_targets_on_results():
    case = Case("decode", bench_case.REAL, 128)
    base = Result(
        "g", case, "flax", f"hf-dynamic: {case}", 5, Spread(1, 1, 1), Spread(2.5, 2, 3), Spread(0.7, 0.6, 0.8),
        None, None, {}, None, None, 0, None, None,
    )  # fmt: skip
    found = bench_target.findings([base, replace(base, engine="torch"), replace(base, engine="hf-dynamic")])
    assert [(each.target.bound, each.result.engine, each.met) for each in found] == [
        (2.4, "flax", True),
        (2.0, "torch", True),
        (0.8, "flax", False),
        (0.65, "torch", True),
    ]
    start = replace(
        base, case=Case("start", bench_case.REAL, 32), over=None, after_loading=Spread(6.0, 5.0, 7.0),
        peak=Spread(1.5, 1.5, 1.5),
    )  # fmt: skip
    loading, memory = bench_target.findings([start])
    assert (loading.value, loading.met) == (Spread(6.0, 5.0, 7.0), False)
    assert (memory.value.median, memory.met) == (1.5, False)
    slow = replace(base, case=Case("prefill", bench_case.REAL, 512))
    [prefill] = bench_target.findings([slow])
    assert (prefill.value, prefill.met) == (Spread(0.4, pytest.approx(1 / 3), 0.5), True)


def test_every_target_is_about_something_that_the_suite_measures():
    groups = [*bench_case.table("m"), *bench_case.gpu("m")]
    entries = [entry for group in groups for entry in group]
    for target in bench_target.TARGETS:
        cases = [each for each in entries if target.of(each.case) and each.engine in target.engines]
        assert {each.engine for each in cases} == set(target.engines)
        if target.value in bench_target.OVER:
            assert all(each.over in (entry for entry in entries) for each in cases)


@pytest.mark.parametrize("suite", bench_case.SUITES)
def test_the_groups_of_a_suite_have_names_of_their_own_and_known_engines(suite):
    make, model = bench_case.SUITES[suite]
    groups = make(model)
    assert len({title(group) for group in groups}) == len(groups)
    for group in groups:
        assert {entry.engine for entry in group} <= set(bench_engine.known())
        assert len({str(entry) for entry in group}) == len(group)
        assert all(entry.over is None or entry.over in group for entry in group)


def test_tables_and_plots(tmp_path):
    rows = []
    for context, engine, index in itertools.product((128, 2048), ("torch", "hf-dynamic"), range(2)):
        case = Case("decode", bench_case.REAL, context)
        over = f"hf-dynamic: {case}" if engine == "torch" else None
        seconds = (index + 1) * (0.01 if engine == "torch" else 0.03)
        rows += [
            Row(
                str(case), case, engine, over, index, seconds, 0.5, (9e9, 9e9), step_bytes=8e7, machine=HERE,
                versions={"torch": "2"},
            )
        ]  # fmt: skip
    rows.append(replace(rows[0], engine="flax", seconds=None, error="RuntimeError: no | memory"))
    found = results(rows)
    text = bench_report.markdown(found, rows, "kvtwin bench")
    assert (
        text.splitlines()[0]
        == "`kvtwin bench`: a processor, 2 cores, 3 GiB, 9.0 GB/s read; float32; torch 2."
    )
    assert "| decode at 128 and 2048, tokens/s over hf-dynamic: 128 | torch | >= 2.00 | 3.00 | met |" in text
    assert (
        "| decode at 128 and 2048, tokens/s over hf-dynamic: 128 | flax | >= 2.40 | failed | **missed** |"
        in text
    )
    assert "| decode 128 | torch | 15.0 ms | 66.7 | 3.00 | 3.00-3.00 | hf-dynamic | 0.67 |  |" in text
    assert "- flax, decode 128: failed: RuntimeError: no | memory" in text
    path = tmp_path / "decode.png"
    assert bench_report.plot(found, path, "decode", "a machine")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not bench_report.plot(found, tmp_path / "prefill.png", "prefill", "a machine")
    assert not (tmp_path / "prefill.png").exists()


# Models and engines


def test_a_shape_is_written_once_and_read_by_both_sides(tmp_path, monkeypatch):
    config = SHAPES["qwen2.5-0.5b"] | {"vocab_size": 61, "hidden_size": 20, "intermediate_size": 28}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 6}
    monkeypatch.setitem(SHAPES, "tiny", config)
    made = subject("tiny", tmp_path)
    before = (made.folder / "model.safetensors").stat().st_mtime_ns
    assert subject("tiny", tmp_path) == made
    assert (made.folder / "model.safetensors").stat().st_mtime_ns == before
    assert [each.name for each in tmp_path.iterdir()] == [made.folder.name]
    case = Case("prefill", "tiny", 9, batch=2)
    ours, theirs = Kvtwin("torch"), HuggingFace("dynamic")
    tokens = []
    for program in (ours, theirs):
        program.load(str(made.folder))
        block = program.prepare(case)
        tokens.append(block.work(block.fresh()))
    assert tokens[0][0].tolist() == tokens[1].tolist()
    monkeypatch.setitem(SHAPES, "tiny", config | {"intermediate_size": 29})
    assert subject("tiny", tmp_path).folder != made.folder
    with pytest.raises(KvtwinError, match=r"(?s)no model 'tyni'.*or one of stories110m, qwen2.5-0.5b"):
        subject("tyni", tmp_path)


@pytest.mark.parametrize("policy", ["full()", "window(budget=8)", "h2o(budget=6)"])
def test_a_block_of_the_torch_engine_goes_on_from_the_same_cache(policy):
    program = Kvtwin("torch")
    program.load(str(BUNDLED / "bytes"))
    block = program.prepare(replace(CASE, context=11, policy=policy))
    for _ in range(2):
        cache = block.fresh()
        assert cache.seen.tolist() == [12] * 3
        after = block.work(cache)
        assert after.seen.tolist() == [14] * 3
        assert after.kept[0].shape[-1] == {"full()": 14, "window(budget=8)": 8, "h2o(budget=6)": 6}[policy]
    assert block.facts["cache_bytes"] > 0


def test_a_model_is_loaded_in_the_dtype_of_the_case(said, made):
    half = replace(CASE, dtype="bfloat16")
    assert (str(half), str(CASE)) == ("decode bytes 5 x3 bfloat16", "decode bytes 5 x3")
    made([fake("a", said.file)], rounds=1).run([contest(CASE, ("a",)), contest(half, ("a",))])
    told = said.take()
    assert told == ["a loads bytes", "a runs 5", "a runs 5", "a loads bytes bfloat16", "a runs 5", "a runs 5"]


def test_both_sides_compute_in_bfloat16():
    for program in (Kvtwin("torch"), HuggingFace("dynamic")):
        program.load(str(BUNDLED / "bytes"), "bfloat16")
        weights = program.model.decoder if isinstance(program, Kvtwin) else program.model
        assert {each.dtype for each in weights.parameters()} == {torch.bfloat16}
        block = program.prepare(replace(CASE, context=7, dtype="bfloat16"))
        assert block.seconds() > 0
        assert block.facts["cache_bytes"] > 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_block_of_hugging_face_goes_on_from_the_same_cache(kind):
    program = HuggingFace(kind)
    program.load(str(BUNDLED / "bytes"))
    block = program.prepare(replace(CASE, context=11))
    assert [int(block.work(block.fresh()).get_seq_length()) for _ in range(2)] == [13, 13]
    with pytest.raises(ValueError, match=r"transformers knows neither window\(budget=8\) nor full\(\)"):
        program.prepare(replace(CASE, policy="window(budget=8)"))


def test_importing_the_framework_brings_neither_torch_nor_jax(monkeypatch):
    case = Case("import", bench_case.NONE)
    assert Imports().prepare(case).seconds() > 0
    monkeypatch.setattr(imports, "CODE", imports.CODE.replace("import sys, ", "import sys, torch, "))
    with pytest.raises(subprocess.CalledProcessError):
        Imports().prepare(case).seconds()


# The command


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs the command on a suite of two tiny groups, with a meter that answers at once."""

    def tiny(model: str) -> list:
        return [
            contest(Case("decode", model, context, steps=2), ("torch", "kvpress"), "kvpress")
            for context in (5, 9)
        ]

    monkeypatch.setitem(bench_case.SUITES, "quick", (tiny, "bytes"))
    monkeypatch.setattr(bench, "METER", fake("meter", tmp_path / "said"))

    def ask(*words: str):
        words = ("bench", "--out", str(tmp_path / "out"), "--models", str(tmp_path), *words)
        return CliRunner().invoke(run.app, list(words))

    return ask


def test_the_command_measures_the_torch_engine_and_names_the_absent_peer(asked, tmp_path):
    result = asked("--rounds", "1", "--kvpress-python", "/no/python")
    assert result.exit_code == 0, result.exception
    assert "kvpress is left out: /no/python does not run" in result.stderr
    assert "decode 5" in result.stdout
    assert "decode 9" in result.stdout
    rows = read(tmp_path / "out" / "bench.jsonl")
    assert [(row.engine, row.case.context, row.error) for row in rows] == [
        ("torch", 5, None),
        ("torch", 9, None),
    ]
    assert all(row.seconds > 0 and row.versions["torch"] == torch.__version__ for row in rows)
    assert (tmp_path / "out" / "bench-decode.png").exists()
    again = asked("--report", "--markdown")
    assert "| decode 5 | torch |" in again.stdout
    assert read(tmp_path / "out" / "bench.jsonl") == rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--suite", "fast"), "no suite 'fast'; expected one of quick, table, sweep, gpu"),
        (("--engine", "tensorflow"), "no engine tensorflow; expected some of torch, flax, hf-dynamic"),
        (
            ("--only", "prefill"),
            "nothing to measure for --only 'prefill' on these engines; the suite has\ndecode bytes 5",
        ),
        (("--report",), "holds no rows; run kvtwin bench without --report first"),
        (("--model", "no-such-model", "--engine", "torch"), "no model 'no-such-model'"),
    ],
)
def test_bad_input_is_refused(asked, words, message):
    result = asked(*words)
    assert isinstance(result.exception, KvtwinError)
    assert message in str(result.exception)


def test_another_interpreter_sees_the_programs_and_nothing_else(monkeypatch):
    with bench_engine.foreign_place() as place:
        assert [each.name for each in place.iterdir()] == ["experiments"]
        monkeypatch.setenv("PYTHONPATH", "/elsewhere")
        engine = Engine("a", "experiments.engines.kvpress", ())
        assert bench_engine.environment(engine)["PYTHONPATH"] == "/elsewhere"
        env = bench_engine.environment(replace(engine, python="/other/python"))
    assert "PYTHONPATH" not in env
    assert int(env["OMP_NUM_THREADS"]) == bench_engine.cores()


def test_engines_see_a_gpu_only_where_they_are_to(monkeypatch):
    for key, value in {"CUDA_VISIBLE_DEVICES": "3", "JAX_PLATFORMS": "rocm"}.items():
        monkeypatch.setenv(key, value)
    engine = bench_engine.known()["flax"]
    hidden, shown = (bench_engine.environment(engine, gpu=gpu) for gpu in (False, True))
    assert (hidden["CUDA_VISIBLE_DEVICES"], hidden["JAX_PLATFORMS"]) == ("", "cpu")
    assert (shown["CUDA_VISIBLE_DEVICES"], shown["JAX_PLATFORMS"]) == ("3", "rocm")
    assert shown["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in hidden


@pytest.mark.parametrize(
    ("library", "why"),
    [
        ("torch", r"^no GPU: torch \d.* sees no CUDA device$"),
        pytest.param("jax", r"^no GPU: jax \d.* sees only cpu$", marks=pytest.mark.slow),
    ],
)
def test_a_library_that_sees_no_gpu_says_so(monkeypatch, library, why):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    with pytest.raises(Failed, match=why):
        bench_engine.gpu_of(library)


@pytest.fixture
def tiny_gpu(asked, monkeypatch, said):
    """Runs the suite gpu, of one tiny group on fake engines, with libraries that see these GPUs."""
    engines = {
        each.name: replace(each, packages=packages)
        for each, packages in (
            (fake("torch", said.file), ("numpy",)),
            (fake("flax", said.file), ("numpy", "jax")),
        )
    }

    def make(model: str) -> list:
        return [contest(Case("decode", model, 5, steps=2, dtype="bfloat16"), ("torch", "flax"), "torch")]

    monkeypatch.setitem(bench_case.SUITES, "gpu", (make, "bytes"))
    monkeypatch.setattr(bench, "known", lambda *_: engines)

    def ask(**seen: str):
        def gpu_of(library: str) -> str:
            if library not in seen:
                raise Failed(f"no GPU: {library} sees none")
            return seen[library]

        monkeypatch.setattr(bench, "gpu_of", gpu_of)
        return asked("--suite", "gpu", "--rounds", "1")

    return ask


def test_without_a_gpu_nothing_is_measured(tiny_gpu, tmp_path, said):
    result = tiny_gpu(jax="one that torch does not see")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == ["kvtwin bench: nothing is measured: no GPU: torch sees none"]
    assert not (tmp_path / "out" / "bench.jsonl").exists()
    assert said.take() == []


@pytest.mark.parametrize("seen", [{"torch": "a GPU"}, {"torch": "a GPU", "jax": "the same"}])
def test_rows_of_a_gpu_name_it(tiny_gpu, tmp_path, said, seen):
    result = tiny_gpu(**seen)
    assert result.exit_code == 0, result.exception
    assert ("flax is left out: no GPU: jax sees none" in result.stderr) == ("jax" not in seen)
    rows = read(tmp_path / "out" / "bench.jsonl")
    assert [row.engine for row in rows] == ["torch", "flax"][: len(seen)]
    assert {row.machine["gpu"] for row in rows} == {"a GPU"}
    assert {row.case.dtype for row in rows} == {"bfloat16"}
    assert "a GPU; " in result.stdout
    assert "; bfloat16" in result.stdout
    assert "torch loads bytes bfloat16" in said.take()


def test_a_package_that_is_missing_is_named_before_anything_is_imported(monkeypatch):
    there = installed.find_spec
    absent = ("array_api_compat", "typer")
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name in absent else there(name))
    assert installed.missing() == ["array-api-compat", "typer"]
    told = installed.advice(installed.missing())
    assert told.startswith(
        "not installed: array-api-compat, typer; run `pip install array-api-compat typer`, or"
    )
    monkeypatch.setattr(installed, "find_spec", there)
    assert installed.missing() == []


def test_a_meter_that_does_not_run_ends_the_command(asked, monkeypatch):
    monkeypatch.setattr(bench, "METER", Engine("meter", "tests.experiments.no_such_program", ()))
    result = asked("--engine", "torch")
    assert isinstance(result.exception, KvtwinError)
    assert "the read bandwidth of the machine cannot be measured: ended with code 1" in str(result.exception)


def test_a_group_keeps_its_name_when_an_engine_is_absent():
    group = bench_case.beside_full(Case("decode", "m", 9, policy="window(budget=4)"))
    assert title(group) == "decode m 9 window(budget=4)" == title(group[:1])
    near, far = Case("decode", "m", 9), Case("decode", "m", 99)
    assert title(flatness(near, far, ("torch", "flax"))) == "decode m 9 | decode m 99"


def test_an_entry_is_named_by_engine_and_case():
    case = Case("decode", "m", 9, batch=2, policy="window(budget=4)", codec="int8()")
    assert str(Entry(case, "torch")) == "torch: decode m 9 x2 window(budget=4) int8()"
    assert str(Case("start", "m", 32, cold=True)) == "start cold m 32"
    assert bench_run.moved(100, 111)
    assert not bench_run.moved(100, 109)
