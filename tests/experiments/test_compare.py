"""`kvtwin compare`: tables or JSON, and an exit code that a fault turns to 1."""

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

import backends.torch.layer
from experiments.compare import command
from experiments.run import main
from framework.errors import KvtwinError
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights, write

LAYER = Layer(heads=6, kv_heads=2, head_dim=4, scale=0.5, rope=Rope(theta=300.0, dim=4))
SPEC = ModelSpec(family="llama", vocab=37, dim=30, ffn=26, layers=(LAYER,) * 3, norm_eps=1e-5, positions=512)

app = typer.Typer()
app.command()(command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write(path, SPEC, random_weights(SPEC, 2, np.float32))
    return path


def compare(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, [str(folder), "--tokens", "14", "--steps", "4", *options])


def fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget off by one, in torch."""

    def survivors(
        right: Any, xp: Any, s: Any, protected: Any, living: Any, budget: Any, capacity: int
    ) -> Any:
        return right(xp, s, protected, living, budget - 1, capacity)

    monkeypatch.setattr(
        backends.torch.layer, "survivors", functools.partial(survivors, backends.torch.layer.survivors)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inside_tolerance_the_exit_code_is_0(folder: Path, dtype: str) -> None:
    result = compare(folder, "--policy", "h2o(budget=6)", "--backends", "reference,torch", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    for words in ("first differing tap", "Drift per layer", "Kept sets", "Greedy tokens", "within tolerance"):
        assert words in result.output
    assert "outside tolerance" not in result.output


def test_outside_tolerance_the_exit_code_is_1(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    result = compare(folder, "--policy", "h2o(budget=6)", "--backends", "torch")
    assert result.exit_code == 1
    assert "outside tolerance" in result.output
    assert (
        "kept sets differ, first at step 0, layer 0, row 0, head 0: it kept 5 tokens, expected 6"
        in result.output
    )


def test_json_is_one_object(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--policy", "window(budget=6, sinks=2)", "--backends", "torch", "--json")
    good = compare(folder, *options)
    assert good.exit_code == 0
    record = json.loads(good.output)
    assert record["within"] is True
    assert record["backends"]["torch"]["first_tap"] is None
    assert record["backends"]["torch"]["kept"]["equal"] == 3 * 2 * 2 * 5  # layers, rows, heads, calls
    assert record["backends"]["torch"]["failures"] == []
    fault(monkeypatch)
    bad = compare(folder, *options)
    assert bad.exit_code == 1
    record = json.loads(bad.output)
    assert record["within"] is False
    assert record["backends"]["torch"]["within"] is False
    assert record["backends"]["torch"]["kept"]["mismatches"]


def test_both_backends_and_the_outside_judge(folder: Path) -> None:
    result = compare(folder, "--backends", "reference,torch,flax,hf", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.output)
    assert list(record["backends"]) == ["torch", "flax", "hf"]
    assert record["backends"]["hf"]["logits"] <= 2e-5
    assert record["backends"]["flax"]["logits"] <= 1e-5


def test_what_hugging_face_refuses_is_said(tmp_path: Path) -> None:
    """It wants the width to be a multiple of the heads, which no number depends on."""
    spec = dataclasses.replace(SPEC, dim=22)
    write(tmp_path / "odd", spec, random_weights(spec, 2, np.float32))
    with pytest.raises(KvtwinError, match="hf cannot load .*odd: .*multiple"):
        command(str(tmp_path / "odd"), backends="hf", tokens=5, steps=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_judged_by_distribution(folder: Path, dtype: str) -> None:
    result = compare(folder, "--policy", "h2o(budget=6)", "--backends", "torch", "--dtype", dtype, "--json")
    record = json.loads(result.output)
    assert result.exit_code == 0, record["backends"]["torch"]["failures"]
    assert record["tolerance"] is None
    assert 0 < record["backends"]["torch"]["distributions"]["kl"] < 2e-2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--dtype", "float8"], "no dtype 'float8'; expected one of"),
        (["--dtype", "float16"], "backend flax does not compute in 'float16'"),
        (["--backends", "torhc"], "no backend 'torhc'; did you mean 'torch'?"),
        (["--backends", "reference"], "name none beside the reference"),
        (["--backends", "hf", "--policy", "h2o(budget=6)"], "hf judges policy full"),
        (["--backends", "hf", "--tokens", "250"], "at positions below 256"),
        (["--policy", "h2oo(budget=6)"], "h2oo"),
        (["--policy", "h2o(budget=0)"], "budget 0"),
        (["--tokens", "1"], "1 tokens and 32 steps; expected at least 2 and 1"),
        (["--steps", "0"], "96 tokens and 0 steps; expected at least 2 and 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_exit_code_2(
    folder: Path,
    options: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvtwin", "compare", str(folder), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert reason in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 3


def test_a_folder_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvtwin", "compare", "recal"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "did you mean recall" in capsys.readouterr().err
