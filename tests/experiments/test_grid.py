"""experiments/sweeps/grid.py: which cells an ask makes, each once, and what is refused before anything runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from backends import backends
from experiments.result import Cell
from experiments.sweeps.asking import with_budget
from experiments.sweeps.grid import Asked, grid
from framework.checkpoint import BUNDLED
from framework.errors import KvtwinError
from framework.policy import name, policies

FAKE = Path(__file__).with_name("fake_question.py")
# The reference backend needs neither torch nor jax.
PLAIN: dict[str, Any] = {
    "questions": ("passkey(length=400)",),
    "models": ("recall",),
    "policies": ("h2o",),
    "budgets": (16,),
    "backends": ("reference",),
    "dtypes": ("float64",),
}


def asked(**other: Any) -> Asked:
    return Asked(**PLAIN | other)


def those(cells: tuple[Cell, ...], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(cell, each) for each in names) for cell in cells]


def test_one_cell_in_the_one_spelling() -> None:
    [cell] = grid(asked(questions=(" passkey( length = 400 )",), codecs=("exl2_q4",)))
    assert cell.question == "passkey(length=400)"
    assert (cell.model, cell.policy, cell.budget, cell.codec) == ("recall", "h2o()", 16.0, "exl2_q4()")
    assert (cell.backend, cell.dtype) == ("reference", "float64")
    assert len(cell.weights) == 32


def test_other_spellings_of_the_same_are_one_cell() -> None:
    folder = BUNDLED / "recall"
    same = asked(
        questions=("passkey(length=400)", "passkey(aware=False, length=400)"),
        models=("recall", str(folder), f"{folder}/../recall"),
        policies=("h2o", "h2o()", "h2o(interval=1)", "h2o(budget=16)", "h2o(budget=None)"),
        budgets=(16, 16.0, 16),
        codecs=("full", "full()", " full( ) "),
        backends=("reference", "reference"),
        dtypes=("float64", "float64"),
    )
    assert len(grid(asked())) == 1
    assert grid(same) == grid(asked())


def test_a_grid_has_every_combination_once() -> None:
    cells = grid(
        asked(
            questions=("passkey(length=400)", "copy(length=300)"),
            policies=("full()", "h2o", "window(sinks=2)"),
            budgets=(0.25, 64),
            codecs=("full()", "int8()"),
        )
    )
    expected = {
        (question, policy, budget, codec)
        for question in ("passkey(length=400)", "copy(length=300)")
        for policy, budgets in (("full()", (None,)), ("h2o()", (0.25, 64)), ("window(sinks=2)", (0.25, 64)))
        for budget in budgets
        for codec in ("full()", "int8()")
    }
    found = those(cells, "question", "policy", "budget", "codec")
    assert len(found) == len(expected)
    assert set(found) == expected
    assert len({cell.key for cell in cells}) == len(cells)


def test_cells_that_share_what_is_compiled_follow_each_other() -> None:
    cells = grid(
        asked(
            questions=("passkey(length=400)", "copy(length=300)", "mqar(length=400)"),
            policies=("h2o", "window"),
            budgets=(0.25, 64),
        )
    )
    kin = [(300 if "copy" in cell.question else 400, cell.policy) for cell in cells]
    changes = sum(one != other for one, other in zip(kin, kin[1:], strict=False))
    assert changes == len(set(kin)) - 1


def test_a_policy_with_a_budget_keeps_it_and_is_run_once() -> None:
    cells = grid(asked(policies=("h2o(budget=40)", "window(fraction=0.5)", "window"), budgets=(0.25, 64)))
    assert those(cells, "policy", "budget") == [
        ("h2o()", 40.0),
        ("window()", 0.5),
        ("window()", 0.25),
        ("window()", 64.0),
    ]


def test_budgets_of_layers_and_heads_stay_in_the_spelling() -> None:
    [cell] = grid(asked(policies=("h2o(budget=(64, (48, 16)))",)))
    assert (cell.policy, cell.budget) == ("h2o(budget=(64, (48, 16)))", None)


@pytest.mark.parametrize(
    ("budget", "spelled"), [(0.25, "h2o(fraction=0.25)"), (64.0, "h2o(budget=64)"), (None, "h2o()")]
)
def test_a_cell_has_its_policy_back(budget: float | None, spelled: str) -> None:
    assert name(with_budget(policies.make("h2o"), budget)) == spelled


def test_a_wrapper_has_the_budget_outside() -> None:
    [cell] = grid(asked(policies=("adakv(policy=snapkv(window=8), budget=64)",)))
    assert (cell.policy, cell.budget) == ("adakv(policy=snapkv(window=8))", 64.0)


def test_a_question_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(FAKE, tmp_path / "fake.py")
    both = asked(questions=("fake.py(length=12)", f"{tmp_path}/fake.py(length=12)"))
    assert those(grid(both), "question") == [("fake.py(length=12)",)]


def test_other_weights_are_another_cell(tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(BUNDLED / "recall", copied)
    [before] = grid(asked(models=(str(copied),)))
    [bundled] = grid(asked())
    assert before.model == str(copied)
    assert before.weights == bundled.weights
    weights = copied / "model.safetensors"
    text = weights.read_bytes()
    weights.write_bytes(text[:-1] + bytes([text[-1] ^ 1]))
    [after] = grid(asked(models=(str(copied),)))
    assert after.weights != before.weights
    assert after.key != before.key


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"questions": ("paskey",)}, "no question is called 'paskey'; near: passkey"),
        ({"questions": ("passkey(lenght=9)",)}, "no field 'lenght'; near: length"),
        ({"policies": ("h20",)}, "no policy is called 'h20'; near: h2o"),
        ({"codecs": ("int9()",)}, "no codec is called 'int9'; near: int8"),
        ({"backends": ("tourch",)}, "no backend 'tourch'; did you mean 'torch'"),
        ({"dtypes": ("float16",)}, "backend reference does not compute in 'float16'"),
        ({"models": ("recal",)}, "no model 'recal'; did you mean recall"),
        ({"questions": ()}, "no questions; expected at least one"),
        ({"policies": ()}, "no policies; expected at least one"),
        ({"models": ()}, "no models; expected at least one"),
        ({"budgets": ()}, r"policy h2o\(\) has no budget; .* --budget 0.25,64"),
        ({"budgets": (0,)}, "budget 0; expected a share of the context between 0 and 1, or a whole"),
        ({"budgets": (-0.5,)}, "budget -0.5; expected"),
        ({"budgets": (1.5,)}, "budget 1.5; expected"),
        ({"budgets": (float("nan"),)}, "budget nan; expected"),
        ({"budgets": (True,)}, "budget True; expected"),
        ({"policies": ("snapkv(window=32)",)}, r"budget 16 in layer 0; expected at least 32"),
        (
            {"policies": ("snapkv(window=32)",), "budgets": (0.05,)},
            r"(?s)at least 32.*0.05 of the most tokens",
        ),
        ({"policies": ("h2o(budget=0)",)}, "budget 0 in layer 0; expected at least 1"),
        (
            {"policies": ("h2o(budget=(8, 8, 8))",)},
            "has 3 budgets; expected one, or one for each of 2 layers",
        ),
        ({"policies": ("h2o(budget=8, fraction=0.5)",)}, "has a budget and a fraction"),
        ({"policies": ("h2o(fraction=1.5)",)}, "fraction is 1.5; expected above 0, at most 1"),
        ({"policies": ("full(budget=8)",)}, "keeps every token; expected no budget"),
        ({"policies": ("merge(policy=h2o())",), "codecs": ("int8()",)}, "blends what it evicts"),
        ({"codecs": ("unbias(codec=int8())",)}, "takes the bias out of the keys"),
        ({"policies": ("q_filter()",)}, "q_filter has no path"),
        ({"policies": ("q_filter(path='nothere')",)}, "nothere"),
    ],
)
def test_what_cannot_be_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        grid(asked(**other))


def test_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = type(backends.get("reference"))
    monkeypatch.setattr(reference, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert grid(asked())
