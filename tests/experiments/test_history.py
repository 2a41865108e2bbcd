"""experiments/history.py: every eviction with its reason, held against a recount; saved, replayed, explained."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from experiments.history import Eviction, History, record, replay
from experiments.run import app
from framework.errors import KvtwinError
from tests.twins import WINDOW, hybrid, texts

POLICIES = ("h2o(budget=6)", "window(budget=5, sinks=2, interval=3)", "keep_it_odd(budget=7)")
PROMPTS = [texts()[0, :19].tolist(), texts()[1, :12].tolist()]
STEPS = 9


@pytest.fixture(scope="module", params=POLICIES)
def history(request: pytest.FixtureRequest) -> History:
    return record(hybrid("reference"), PROMPTS, request.param, STEPS)


def test_what_went_and_what_is_held_make_up_all_that_came(history: History) -> None:
    """Each token goes at most once, and those that never went are those that the cache holds."""
    model = hybrid("reference")
    _, cache = model.step(history.prompt, model.cache(history.policy, batch=2))
    for step in range(STEPS):
        _, cache = model.step(history.fed[:, step : step + 1], cache)
    gone = [(each.layer, each.row, each.head, each.position) for each in history.evictions()]
    assert len(gone) == len(set(gone))
    for layer, kept in enumerate(cache.kept):
        for row, head in np.ndindex(kept.shape[:2]):
            held = set(kept[row, head].tolist()) - {-1}
            left = {position for at, *where, position in gone if (at, *where) == (layer, row, head)}
            assert left | held == set(range(len(PROMPTS[row]) + STEPS))
            assert not left & held


def test_reasons_follow_from_the_scores(history: History) -> None:
    for each in history.evictions():
        (one,) = [taken for taken in history.decisions[each.call] if taken.layer == each.layer]
        where = (each.row, each.head)
        held, scores = one.positions[where].tolist(), one.scores[where].tolist()
        stayed = set(one.kept[where].tolist())
        free = [
            scores[i] for i, p in enumerate(held) if p in stayed and p >= 0 and not one.protected[where][i]
        ]
        assert each.score == scores[held.index(each.position)]
        if each.reason == "score":
            assert each.threshold == min(free)
            assert each.margin is not None
            assert each.margin >= 0
        elif each.reason == "window":
            assert each.layer == 1
            assert max(held) - each.position >= WINDOW - 1
        else:
            assert not free
    assert {each.reason for each in history.evictions()} >= {"score"}


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_a_saved_history_replays_on_another_backend(history: History, backend: str, tmp_path: Path) -> None:
    history.save(tmp_path / "h")
    again = History.load(tmp_path / "h")
    assert list(again.evictions()) == list(history.evictions())
    found = replay(hybrid(backend), again)
    assert found.mismatches == ()
    assert found.equal + found.swapped > 20
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


def test_words() -> None:
    """The h2o run, whose first eviction is known from the decision itself."""
    history = record(hybrid("reference"), PROMPTS, POLICIES[0], STEPS)
    first = next(history.evictions())
    assert history.why(first.position, first.layer, first.head, first.row) == str(first)
    assert "went at the end of the prompt: its score" in str(first)
    last = len(PROMPTS[0]) + STEPS - 1
    assert history.why(last, 0, 1) == f"layer 0, head 1: position {last} stayed to the end"
    assert "after 2 more tokens: no later query sees it" in str(Eviction(2, 1, 0, 0, 3, 0.5, None, "window"))
    assert "protected tokens filled the budget" in str(Eviction(1, 1, 0, 0, 3, 0.5, None, "protected"))
    for arguments, words in (
        ((last + 1, 0, 0), "has no position"),
        ((3, 7, 0), "nothing was decided in layer 7"),
    ):
        with pytest.raises(KvtwinError, match=words):
            history.why(*arguments)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None])
def test_files_that_are_no_history_are_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "h").write_bytes(content)
    with pytest.raises(KvtwinError, match="is not a readable history"):
        History.load(tmp_path / "h")


@pytest.mark.parametrize(
    "facts", [[], {}, {"format": "kvtwin-history-1"}, {"format": "kvtwin-history-1", "layers": 3}]
)
def test_damaged_facts_are_refused(facts: object, tmp_path: Path) -> None:
    save_file({"prompt": np.zeros(2)}, tmp_path / "h", metadata={"kvtwin": json.dumps(facts)})
    with pytest.raises(KvtwinError, match="is not a"):
        History.load(tmp_path / "h")


def test_the_command(tmp_path: Path) -> None:
    asked = [
        "explain",
        "bytes",
        "def main(args): return 1",
        "--policy",
        "h2o(budget=8)",
        "--layer",
        "2",
        "--head",
        "1",
    ]
    every = CliRunner().invoke(app, [*asked, "--steps", "3", "--save", str(tmp_path / "h")])
    assert every.exit_code == 0
    lines = every.output.splitlines()
    assert len(lines) == 24 + 3 - 8
    position = lines[0].split("position ")[1].split()[0]
    one = CliRunner().invoke(app, [*asked, "--steps", "3", "--position", position])
    assert one.output.splitlines() == lines[:1]
    assert History.load(tmp_path / "h").policy == "h2o(budget=8)"
