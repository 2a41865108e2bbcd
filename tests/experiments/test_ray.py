"""A sweep on a Ray of this machine: the same rows, also where workers die. `python -m pytest -m ray`."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.sweep import sweep
from framework.errors import KvtwinError

pytestmark = pytest.mark.ray
PLAIN: dict[str, Any] = {"model": "recall", "backends": "reference", "dtypes": "float64", "seeds": range(3)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(Path(__file__).with_name("fake_question.py"), tmp_path / "fake.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def lasting(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=["seconds", "provenance.time"])


def test_the_rows_are_those_of_one_process(place: Path) -> None:
    many = PLAIN | {"policies": ["full()", "h2o"], "budgets": [0.5, 8]}
    many["questions"] = ["fake.py()", "fake.py(length=8)", "passkey(length=320)"]
    there = sweep(**many, out="ray.sqlite", engine="ray", jobs=2)
    pd.testing.assert_frame_equal(lasting(there), lasting(sweep(**many, out="here.sqlite")))


CLUSTER = """
import ray
print(ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR").address_info["gcs_address"])
input()
"""


def test_a_cluster_that_runs_elsewhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.stdout.readline().strip())
        frame = sweep(
            **PLAIN, questions="fake.py()", policies="full()", out="ray.sqlite", engine="ray", jobs=2
        )
        cluster.communicate("\n", timeout=60)
    assert frame["error"].tolist() == ["", "", ""]
    assert frame["seed"].tolist() == [0, 1, 2]


def test_workers_that_die(place: Path) -> None:
    asks = [f"fake.py(fate='{place}/flag')", "fake.py(fate='die')", "fake.py()", "fake.py(fate='raise')"]
    frame = sweep(**PLAIN, questions=asks, policies="full()", out="ray.sqlite", engine="ray", jobs=2)
    errors = dict(zip(frame["question"], frame["error"], strict=True))
    assert errors[asks[0]] == errors[asks[2]] == ""
    assert errors[asks[1]].startswith("the process that measured it ended twice: ")
    assert errors[asks[3]].startswith("ZeroDivisionError")
    assert len(frame) == 12


def test_a_cluster_that_is_not_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(KvtwinError, match="no Ray at 127.0.0.1:1"):
        sweep(**PLAIN, questions="fake.py()", policies="full()", out="ray.sqlite", engine="ray")
