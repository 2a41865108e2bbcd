"""A cache saved, loaded and continued on every backend, and files that are refused."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from framework import snapshot as snapshots
from framework.cache import Cache
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.snapshot import Snapshot
from tests.ragged import (
    BACKENDS,
    EXACT,
    FEED,
    FIRST,
    H2O,
    POLICIES,
    PROMPT,
    SPEC,
    begun,
    differing,
    fed,
    model,
)


def held_back(backend: str, policy: str) -> Cache:
    """A cache whose last call appended without evicting."""
    made = model(backend)
    _, cache = made.step(PROMPT, made.cache(policy, batch=2), evict=False)
    return cache


STATES: dict[str, Callable[[str, str], Cache]] = {
    "prompt": begun,
    "two steps": functools.partial(begun, steps=2),  # between two evictions where there is an interval
    "held back": held_back,
}


def next_tokens(backend: str, cache: Cache) -> tuple[list[list[int]], list[list]]:
    """The next 50 tokens, and what is held afterwards."""
    tokens, _, cache = model(backend).decode(cache, FIRST, Sampling(), (), 50)
    return tokens.tolist(), [kept.tolist() for kept in cache.kept]


@functools.cache
def saved(backend: str, policy: str, state: str) -> tuple[Snapshot, list, list]:
    """A cache as data, and how its own backend goes on with it."""
    cache = STATES[state](backend, policy)
    return cache.snapshot(), *next_tokens(backend, cache)


ROUTES = [("reference", "torch"), ("torch", "flax"), ("flax", "torch"), ("flax", "reference")]


FAST = {("full()", "two steps"), (H2O, "held back"), *((policy, "two steps") for policy in POLICIES[1:])}
MOMENTS = [
    pytest.param(policy, state, marks=[] if (policy, state) in FAST else [pytest.mark.slow])
    for policy in POLICIES
    for state in STATES
]


@pytest.mark.parametrize(("policy", "state"), MOMENTS)
@pytest.mark.parametrize(("source", "target"), ROUTES, ids=lambda name: name)
def test_save_load_and_go_on_equals_straight(
    source: str, target: str, policy: str, state: str, tmp_path: Path
) -> None:
    shot, tokens, kept = saved(source, policy, state)
    shot.save(tmp_path / "cache.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.safetensors"]
    restored = model(target).restore(tmp_path / "cache.safetensors")
    assert differing(restored.snapshot(), shot) == []
    assert next_tokens(target, restored) == (tokens, kept)


@pytest.mark.parametrize(("source", "target"), [("flax", "torch"), ("torch", "flax")], ids=lambda name: name)
def test_a_restored_cache_takes_a_chunk_and_rolls_back(source: str, target: str, tmp_path: Path) -> None:
    begun(source, steps=2).save(tmp_path / "cache.safetensors")
    _, restored = model(target).step(FEED[:, 2:5], model(target).restore(tmp_path / "cache.safetensors"))
    expected = begun(target, steps=3).snapshot()
    assert differing(restored.roll_back(2).snapshot(), expected, EXACT) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("source", "target"), [("flax", "torch"), ("torch", "flax")], ids=lambda name: name)
def test_other_dtypes_keep_their_bits(source: str, target: str, dtype: str, tmp_path: Path) -> None:
    made = model(source, SPEC, dtype)
    _, cache = made.step(PROMPT, made.cache(H2O, batch=2), logits=None)
    cache.save(tmp_path / "cache.safetensors")
    restored = model(target, SPEC, dtype).restore(tmp_path / "cache.safetensors").snapshot()
    assert restored.dtype == dtype
    assert differing(restored, cache.snapshot()) == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    begun("torch", H2O).save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def _contents(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safe_open(file, framework="numpy") as opened:
        return load_file(file), json.loads(opened.metadata()["kvtwin"])


def _rewritten(file: Path, named: dict[str, np.ndarray], facts: Any) -> None:
    save_file(named, file, metadata={"kvtwin": json.dumps(facts)})


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _without_array(file: Path) -> None:
    named, facts = _contents(file)
    _rewritten(file, {key: value for key, value in named.items() if key != "1.positions"}, facts)


def _without_memory(file: Path) -> None:
    named, facts = _contents(file)
    _rewritten(file, {key: value for key, value in named.items() if key != "1.memory.mass"}, facts)


def _cut(name: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        named, facts = _contents(file)
        _rewritten(file, named | {name: np.ascontiguousarray(named[name][:, :1])}, facts)

    return damage


def _dtype(file: Path) -> None:
    named, facts = _contents(file)
    _rewritten(file, named | {"0.positions": named["0.positions"].astype(np.float64)}, facts)


def _fewer_questions(file: Path) -> None:
    named, facts = _contents(file)
    _rewritten(file, named | {"question": named["question"][:1]}, facts)


def _fact(**changes: Any) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        named, facts = _contents(file)
        _rewritten(file, named, facts | changes)

    return damage


def _without_fact(file: Path) -> None:
    named, facts = _contents(file)
    facts.pop("steps")
    _rewritten(file, named, facts)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (_truncated, "is not a readable cache file"),
    "empty": (lambda file: file.write_bytes(b""), "is not a readable cache file"),
    "other bytes": (lambda file: file.write_bytes(b"kvtwin" * 40), "is not a readable cache file"),
    "missing": (lambda file: file.unlink(), "no cache file at"),
    "a folder": (lambda file: (file.unlink(), file.mkdir()), "no cache file at"),
    "no cache": (lambda file: save_file({"x": np.zeros(3)}, file), "is not a kvtwin cache"),
    "facts that are none": (lambda file: _rewritten(file, {"x": np.zeros(3)}, [1]), "is not a kvtwin cache"),
    "another format": (_fact(format="kvtwin-cache-0"), "is not a kvtwin cache of format"),
    "an array is missing": (_without_array, r"lacks the array '1.positions'"),
    "memory is missing": (_without_memory, r"memory.*mass"),
    "fewer heads": (_cut("0.stream.keys"), r"0.stream.keys has shape \(2, 1, 8, 4\)"),
    "fewer positions": (_cut("1.positions"), r"1.positions has shape \(2, 1, 8\)"),
    "fewer questions": (_fewer_questions, r"question has shape \(1,\); expected \(2,\)"),
    "positions as floats": (_dtype, r"0.positions .*float64"),
    "a fact is missing": (_without_fact, "steps"),
    "a fact too many": (_fact(extra=1), "extra"),
    "an unknown policy": (_fact(policy="h2oo(budget=8)"), "h2oo"),
    "an unknown codec": (_fact(codec="fulll()"), "fulll"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_file_is_refused(backend: str, damage: str, file: Path) -> None:
    spoil, reason = DAMAGES[damage]
    spoil(file)
    with pytest.raises(KvtwinError, match=reason) as caught:
        model(backend).restore(file)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_of_another_model_is_refused(backend: str, file: Path) -> None:
    other = dataclasses.replace(SPEC, vocab=37, norm_eps=1e-6)
    with pytest.raises(KvtwinError, match="a cache of another model: norm_eps, vocab differ"):
        model(backend, other).restore(file)


@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_into_no_folder(backend: str, tmp_path: Path) -> None:
    with pytest.raises(KvtwinError, match="the folder .* does not exist"):
        begun(backend).save(tmp_path / "nowhere" / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_onto_a_folder(backend: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(KvtwinError, match="cannot save the cache to .*taken"):
        begun(backend).save(tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_save_that_breaks_off_leaves_the_old_file(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "cache.safetensors"
    begun(backend).save(target)
    old = target.read_bytes()

    def full_disk(arrays: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "save_file", full_disk)
    with pytest.raises(KvtwinError, match="No space left on device"):
        begun(backend, steps=1).save(target)
    assert target.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("backend", BACKENDS)
def test_saving_does_not_consume(backend: str, tmp_path: Path) -> None:
    cache = begun(backend)
    cache.save(tmp_path / "cache.safetensors")
    assert fed(backend, cache, FEED[:, :1]).seen.tolist() == [9, 12]
