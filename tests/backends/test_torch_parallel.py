"""Heads spread over two processes: the kept sets, logits and tokens of one process, and half of its memory."""

import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.spread import OPTIONS, PROCESSES, answers, examples, model_of, spec_of, spread_memory

ROOT = Path(__file__).parents[2]
SECONDS = 600

# One of each kind: what it reads, what it remembers, and how it looks at other heads or layers.
STEPPED = [
    ("tied", "full()"),
    ("free", "window(budget=8)"),
    ("tied", "h2o(budget=((8, 5, 9, 7), 6))"),  # sums, memory per slot; a budget for each head
    ("free", "snapkv(budget=8, window=4, kernel=3, interval=3)"),  # the newest queries
    ("tied", "key_norm(budget=8)"),  # overwrites by keys
    ("free", "random(budget=8)"),  # a hash of the number of the head
    ("tied", "keep_it_odd(budget=6)"),
    ("tied", "adakv(budget=8, policy=snapkv(window=4))"),  # heads share a budget
    ("free", "chunked(budget=8, policy=key_norm())"),  # one set for all heads
    ("tied", "cake(budget=9, policy=snapkv(window=4))"),  # layers share a budget
    ("free", "expected_attention(budget=9)"),  # stream, memory per head
    ("tied", "critical(budget=8, policy=snapkv(window=4))"),  # the output projection
    ("free", "merge(budget=8, policy=snapkv(window=4))"),  # changes keys and values
    ("tied", "fastgen(budget=9)"),  # token ids
    ("free", "reposition(budget=8, policy=window())"),
]
CODED = [
    ("tied", "h2o(budget=8)", "int8()"),
    ("free", "snapkv(budget=8, window=4)", "turboquant()"),
    ("tied", "key_norm(budget=8)", "unbias(codec=int8())"),
]
GENERATED = [
    ("tied", "kvzip(budget=9)", "plain"),  # reads the prompt again
    ("free", "finch(budget=9)", "question"),
    ("tied", "adakv(budget=8, policy=finch())", "chunks"),  # heads of several lengths while the question is read
]
SAME = [
    *(("stepped", *case) for case in (*STEPPED, *CODED)),
    *(("generated", *case) for case in GENERATED),
    ("lives", "tied"),
]
OWN = [("memory", "tied"), ("memory", "free"), ("refusals", "tied")]


def spread(cases: list[tuple[str, ...]], folder: Path) -> list[dict[tuple[str, ...], Any]]:
    """What the cases gave in each of two processes."""
    (folder / "cases.pickle").write_bytes(pickle.dumps(cases))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.spread"]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [each.communicate(timeout=SECONDS)[1] for each in running]
    finally:
        for each in running:
            each.kill()
    assert [each.returncode for each in running] == [0] * PROCESSES, "\n".join(said)
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, ...], Any]]:
    """What every case gave in both processes, from one launch."""
    return spread(SAME + OWN, tmp_path_factory.mktemp("spread"))


@cache
def fields(kind: str) -> int:
    return spec_of(kind).ffn


def check_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal integers, and numbers within 1e-12 of the largest."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype), key
        if value.dtype.kind == "f":
            largest = np.abs(value).max(initial=0)
            assert np.abs(found[key] - value).max(initial=0) <= 1e-12 * largest, key
        else:
            assert (found[key] == value).all(), key


def check_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal bit for bit."""
    assert one.keys() == other.keys()
    assert [key for key in one if one[key].tobytes() != other[key].tobytes()] == []


@pytest.mark.parametrize("case", SAME, ids=" ".join)
def test_two_processes_do_what_one_does(case: tuple[str, ...], both: Any, tmp_path: Path) -> None:
    expected = answers([case], None, tmp_path)[case]
    check_alike(both[0][case], expected)
    check_equal(both[0][case], both[1][case])
