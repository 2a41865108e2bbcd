"""flax over four devices: the same kept sets, logits and text as on one, and each device has no more than its share."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.backend import Model
from framework.cache import Cache
from framework.compare import drift
from tests.sharded import CASES, SLOW, SPEC, STEPPED, Case, built, in_its_own_process, listened, lives, run
from tests.twins import unchecked

EXACT = 1e-12
Found = tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]

REFUSED = {
    "kv heads": r"layer 0 has 4 kv heads.*3 devices of the mesh axis heads; expected a divisor of 4",
    "ffn": "ffn is 27.*2 devices of the mesh axis heads; expected a divisor of 27",
    "axes": "mesh has the axes batch, model; expected batch, heads or both, and no model",
    "batch": "a batch of 3 does not divide among the 2 devices of the mesh axis batch; expected a multiple of 2",
    "rows": "a batch of 3 does not divide among the 2 devices",
    "prompts": "a batch of 1 does not divide among the 2 devices",
    "joint": r"codec exl3\(\) codes the heads of a token together.*heads has 2 devices; expected another codec",
    "type": "mesh is list; expected a jax.sharding.Mesh with axes batch and heads",
    "reference": "the reference runs in one process on NumPy",
}


def ran(folder: Path, names: list[str]) -> Found:
    """What the program found on four devices, and its facts."""
    done = in_its_own_process(folder, names)
    assert done.returncode == 0, done.stderr[-4000:]
    arrays = {name: dict(np.load(folder / f"{name}.npz")) for name in names}
    return arrays, json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return ran(tmp_path_factory.mktemp("four"), list(CASES))


@pytest.fixture(scope="module")
def four_slow(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return ran(tmp_path_factory.mktemp("four"), list(SLOW))


@cache
def alone(backend: str) -> Model:
    return built(backend)


@cache
def single(backend: str, case: Case) -> tuple[dict[str, np.ndarray], Cache]:
    """The same run on one device."""
    with unchecked():
        return run(alone(backend), case)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Codes, positions and tokens equal, and numbers within what another order of sums does."""
    for key, right in expected.items():
        assert (found[key].shape, found[key].dtype) == (right.shape, right.dtype), key
        if right.dtype == np.float64:
            assert drift(found[key], right) <= EXACT, key
        else:
            np.testing.assert_array_equal(found[key], right, err_msg=key)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "reference") for name in CASES),
        pytest.param("overwritten", "flax", marks=pytest.mark.slow),
    ],
)
def test_four_devices_do_what_one_does(four: Found, name: str, backend: str) -> None:
    assert_same(four[0][name], single(backend, CASES[name])[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_policies_and_codecs_of_all_kinds_do_what_they_do_on_one(four_slow: Found, name: str) -> None:
    assert_same(four_slow[0][name], single("reference", SLOW[name])[0])


def test_caches_are_copied_rolled_back_and_saved_as_on_one(four: Found, tmp_path: Path) -> None:
    expected = lives(alone("reference"), CASES["all kept"].rows, tmp_path)
    assert_same({key: four[0]["all kept"][f"lives.{key}"] for key in expected}, expected)


@pytest.mark.slow
def test_taps_decisions_and_gradients_are_those_of_one(four_slow: Found) -> None:
    expected = listened(alone("reference"), SLOW["random"].rows)
    assert_same({key: four_slow[0]["random"][f"listened.{key}"] for key in expected}, expected)


def test_some_case_evicted(four: Found) -> None:
    """Otherwise equal sets would say nothing."""
    kept = four[0]["overwritten"]["kept.0"]
    assert kept.shape[-1] == 8
    assert (kept[:, 0] != kept[:, 1]).any()


@pytest.mark.parametrize("name", CASES)
def test_a_device_has_its_rows_and_heads(four: Found, name: str) -> None:
    assert_split(four[1][name]["cache"], CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_device_has_them_under_policies_of_all_kinds(four_slow: Found, name: str) -> None:
    assert_split(four_slow[1][name]["cache"], SLOW[name])


def assert_split(cached: list[tuple[str, list[int], list[int]]], case: Case) -> None:
    """After all kinds of calls each array lies as it lay at first."""
    devices = case.devices
    sizes = {case.rows: "batch", SPEC.layers[0].kv_heads: "heads"}
    assert len(cached) > 2 * 4
    for path, shape, own in cached:
        axes = [sizes[size] for size in shape[:2] if size in sizes]
        assert axes or not shape, path
        expected = [size // devices[axis] for size, axis in zip(shape, axes, strict=False)]
        assert own == expected + shape[len(axes) :], path


@pytest.mark.parametrize("name", CASES)
def test_a_device_has_its_share_of_the_matrices(four: Found, name: str) -> None:
    heads = CASES[name].devices["heads"]
    for path, shape, own in four[1][name]["parameters"]:
        share = int(np.prod(shape)) // int(np.prod(own))
        vocabulary = "embed" in path or "head" in path
        whole = "norm" in path or (vocabulary and SPEC.vocab % heads)
        assert share == (1 if whole else heads), path


@pytest.mark.slow
def test_a_cache_counts_its_bytes_as_on_one(four: Found) -> None:
    assert four[1]["overwritten"]["bytes"] == vars(single("flax", CASES["overwritten"])[1].bytes)


@pytest.mark.parametrize("name", STEPPED)
def test_keys_and_values_stay_where_they_are(four: Found, name: str) -> None:
    """Between devices pass sums of the residual, two a layer and one of the embedding, flags, and the step's logits."""
    case, passes = CASES[name], four[1][name]["step"]["passes"]
    rows, found = case.rows // case.devices["batch"], []
    for kind, shapes in passes:
        for shape in shapes:
            size = int(np.prod([int(each) for each in shape.split(",") if each]))
            if kind == "all-reduce" and size == rows * SPEC.dim:
                found.append(shape)
            elif kind == "all-gather":
                assert size == rows * SPEC.vocab, (kind, shape)
            else:
                assert (kind, size <= max(rows, 4)) == ("all-reduce", True), (kind, shape)
    split = SPEC.vocab % case.devices["heads"] == 0
    assert len(found) == 2 * len(SPEC.layers) + split


@pytest.mark.parametrize("name", STEPPED)
def test_decode_reuses_the_buffers_of_each_device(four: Found, name: str) -> None:
    step = four[1][name]["step"]
    assert step["reused"] >= step["share"] > 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_divide_is_refused(four: Found, name: str) -> None:
    assert re.search(REFUSED[name], four[1]["refusals"][name], re.DOTALL), four[1]["refusals"][name]
