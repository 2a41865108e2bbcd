"""Heads spread over two processes: the kept sets, logits and tokens of one process, and half of its memory."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.spread import PROCESSES, answers, examples, model_of, spec_of

ROOT = Path(__file__).parents[2]
SECONDS = 600

# One of each kind: what it reads, what it remembers, and how it looks at other heads or layers.
FAST = [
    ("stepped", "tied", "full()"),
    ("stepped", "tied", "h2o(budget=((8, 5, 9, 7), 6))"),  # sums, memory per slot; a budget for each head
    ("stepped", "free", "random(budget=8)"),  # a hash of the number of the head
    # The newest queries and the output projection; heads share a budget, so that each counts for all.
    ("stepped", "tied", "adakv(budget=8, policy=critical(policy=snapkv(window=4)))"),
    ("stepped", "free", "chunked(budget=8, policy=key_norm())"),  # one set for all heads
    ("stepped", "tied", "cake(budget=9, policy=snapkv(window=4))"),  # layers share a budget
    ("stepped", "free", "expected_attention(budget=9)"),  # stream, memory per head
    ("stepped", "free", "merge(budget=8, policy=snapkv(window=4))"),  # changes keys and values
    ("stepped", "tied", "key_norm(budget=8)", "int8()"),  # overwrites, by keys that are coded
    # Reads ahead, with heads of several lengths, and other ones in each process.
    ("generated", "tied", "adakv(budget=4, floor=0.25, policy=finch())", "chunks"),
    ("lives", "free"),
    ("rows", "free", "adakv(budget=8, policy=snapkv(window=4))"),
]
SLOW = [
    ("stepped", "free", "snapkv(budget=8, window=4, kernel=3, interval=3)"),
    ("stepped", "tied", "h2o(budget=8)", "int8()"),
    ("stepped", "free", "snapkv(budget=8, window=4)", "turboquant()"),
    ("stepped", "tied", "key_norm(budget=8)", "unbias(codec=int8())"),
    ("stepped", "free", "reposition(budget=8, policy=window())"),
    ("generated", "tied", "kvzip(budget=9)", "plain"),  # reads the prompt again
    ("generated", "free", "finch(budget=9)", "question"),
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
    return spread(FAST + OWN, tmp_path_factory.mktemp("spread"))


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


@pytest.mark.parametrize("case", FAST, ids=" ".join)
def test_two_processes_do_what_one_does(case: tuple[str, ...], both: Any, tmp_path: Path) -> None:
    expected = answers([case], None, tmp_path)[case]
    check_alike(both[0][case], expected)
    check_equal(both[0][case], both[1][case])


@pytest.mark.slow
def test_every_example_of_every_policy(tmp_path: Path) -> None:
    cases = SLOW + examples()
    found = spread(cases, tmp_path)
    for case in cases:
        check_alike(found[0][case], answers([case], None, tmp_path)[case])
        check_equal(found[0][case], found[1][case])
    assert len(cases) > 60


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_each_process_holds_half(kind: str, both: Any, tmp_path: Path) -> None:
    alone, spec = answers([("memory", kind)], None, tmp_path)["memory", kind], spec_of(kind)
    number = 8  # bytes
    padding = (1 if kind == "tied" else 2) * spec.dim * number  # 301 rows in two parts of 151
    sums = len(spec.layers) * 2 * spec.dim * number if spec.output_bias else 0  # biases that are added once
    for found in both:
        own = found["memory", kind]
        assert 2 * own["spread"] - padding - sums + own["others"] == alone["others"]
        assert {key: 2 * value for key, value in own["bytes"].items()} == alone["bytes"]
        assert 2 * own["keys"] == alone["keys"]


@pytest.mark.parametrize("kind", ["tied", "free"])
def test_what_is_spread_is_a_dtensor_of_the_whole(kind: str, both: Any) -> None:
    """Rows of `gate_up` stand by process, and the vocabulary is padded."""
    alone: Any = model_of(kind)
    expected = {name: x.numpy() for name, x in alone.decoder.named_parameters() if "norm" not in name}
    for found in both:
        own = found["memory", kind]
        assert own["names"] == sorted(expected)
        for name, value in own["parameters"].items():
            right = expected[name]
            if "gate_up" in name:
                right = np.stack(np.split(rows(right).reshape(2, 28, -1), 2, axis=1)).reshape(56, -1)
                value = rows(value).reshape(56, -1)
            elif name in ("head.weight", "table.weight"):
                right, value = rows(right), rows(value)[:301]
            assert (value == right).all(), name


def rows(x: np.ndarray) -> np.ndarray:
    """A weight [parts, in, columns] as [out, in]; any other array as it is."""
    return np.swapaxes(x, 1, 2).reshape(-1, x.shape[1]) if x.ndim == 3 else x


REFUSED = {
    "heads": "the 3 kv heads of layer 0 do not divide among 2 processes; expected a mesh of 1",
    "ffn": "the 27 channels of the feed-forward do not divide among 2 processes; expected a mesh of 1",
    "names": "dimensions ('tp',); expected a torch DeviceMesh with one dimension called 'heads'",
    "two": "dimensions ('batch', 'heads'); expected a torch DeviceMesh with one dimension called 'heads'",
    "no mesh": "mesh came with int; expected a torch DeviceMesh",
    "kvgrad": "policy kvgrad(budget=9) asks for gradients",
    "gradients": "a model over a mesh gives no gradients",
    "kivi": "codes some tokens together, which a cache over a mesh does not do",
    "joint": "codes all heads of a token together, which a cache over a mesh does not do",
    "save": "cannot save the cache to",
    "uncodable": "cannot code what layer 0, head 0 made",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_mesh_cannot_do_is_refused_by_all(what: str, both: Any) -> None:
    for found in both:
        assert REFUSED[what] in found["refusals", "tied"][what]


def test_every_refusal_is_checked(both: Any) -> None:
    assert both[0]["refusals", "tied"].keys() == REFUSED.keys()
