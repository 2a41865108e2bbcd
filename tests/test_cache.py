"""The life of a cache on every backend: fork, rows, roll back, save, load on another backend, chunks, and bad input."""

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

from backends import backends
from framework import snapshot as snapshots
from framework.backend import Cache, Model
from framework.compare import drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.snapshot import Snapshot
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights
from tests.twins import unchecked

BACKENDS = ("reference", "torch", "flax")
EXACT = 1e-12

# Every axis has another size: 3 kv heads, group 2, head_dim 4, 20 wide, 2 layers, 31 tokens, 5 queries.
LAYER = Layer(heads=6, kv_heads=3, head_dim=4, scale=0.5, rope=Rope(theta=500.0, dim=4))
SPEC = ModelSpec(
    family="llama", vocab=31, dim=20, ffn=22, layers=(LAYER, LAYER), norm_eps=1e-5, positions=512
)
SLIDING = dataclasses.replace(SPEC, family="mistral", layers=(LAYER, dataclasses.replace(LAYER, window=10)))

PROMPT = np.random.default_rng(3).integers(0, SPEC.vocab, (2, 11), dtype=np.int32)
PROMPT[0, 8:] = -1  # a ragged batch
FEED = np.random.default_rng(4).integers(0, SPEC.vocab, (2, 12), dtype=np.int32)

WINDOW, TAIL = "window(budget=7, sinks=2)", "window(budget=6, sinks=2, interval=4)"
H2O, SNAPKV = "h2o(budget=8)", "snapkv(budget=9, window=5, kernel=3, interval=3)"
REPOSITION = "window(budget=8, sinks=2, reposition=True)"
POLICIES = ("full()", WINDOW, TAIL, H2O, SNAPKV, REPOSITION)


@functools.cache
def model(backend: str, spec: ModelSpec = SPEC, dtype: str = "float64") -> Model:
    return backends.get(backend).build(spec, random_weights(spec, 5), dtype)


def begun(backend: str, policy: str = "full()", steps: int = 0, spec: ModelSpec = SPEC) -> Cache:
    """A cache that has seen the prompt and then `steps` tokens, one a step."""
    made = model(backend, spec)
    _, cache = made.step(PROMPT, made.cache(policy, batch=2), logits=None)
    return fed(backend, cache, FEED[:, :steps], spec)


def fed(backend: str, cache: Cache, tokens: np.ndarray, spec: ModelSpec = SPEC) -> Cache:
    for column in range(tokens.shape[1]):
        _, cache = model(backend, spec).step(tokens[:, column : column + 1], cache)
    return cache


def arrays(shot: Snapshot) -> dict[str, np.ndarray]:
    """Every array of a snapshot by name."""
    named = {"seen": shot.seen, "dropped": shot.dropped}
    for index, layer in enumerate(shot.layers):
        named |= {f"{index}.stream.{key}": value for key, value in layer.streams.items()}
        named |= {f"{index}.memory.{key}": value for key, value in layer.memory.items()}
        named |= {f"{index}.heads.{key}": value for key, value in layer.heads.items()}
        named[f"{index}.positions"] = layer.positions
        if layer.queries is not None and layer.query_positions is not None:
            named |= {f"{index}.queries": layer.queries, f"{index}.query_positions": layer.query_positions}
    return named


def differing(found: Snapshot, expected: Snapshot, tolerance: float = 0.0) -> list[str]:
    """Names of what differs between two snapshots: arrays bit for bit, or floats within a tolerance."""
    ours, theirs = arrays(found), arrays(expected)
    wrong = sorted(ours.keys() ^ theirs.keys())
    for key in ours.keys() & theirs.keys():
        left, right = ours[key], theirs[key]
        if left.shape != right.shape or left.dtype != right.dtype:
            wrong.append(f"{key}: {left.dtype}{left.shape} and {right.dtype}{right.shape}")
        elif left.dtype.kind == "f" and tolerance:
            wrong += [key] if drift(left, right) > tolerance else []
        elif left.tobytes() != right.tobytes():
            wrong.append(key)
    facts = ("policy", "codec", "steps", "pending", "capacity", "length")
    return wrong + [key for key in facts if getattr(found, key) != getattr(expected, key)]


def row_of(shot: Snapshot, row: int) -> list[tuple[np.ndarray, ...]]:
    """What one row holds, head by head, without padding."""
    held = []
    for layer in shot.layers:
        for head in range(layer.positions.shape[1]):
            filled = layer.positions[row, head] >= 0
            slots = [layer.positions, *layer.streams.values(), *layer.memory.values()]
            held.append(tuple(x[row, head][filled] for x in slots))
    return held


def assert_same_row(found: Snapshot, row: int, expected: Snapshot, other: int) -> None:
    assert found.seen[row] == expected.seen[other]
    for left, right in zip(row_of(found, row), row_of(expected, other), strict=True):
        for ours, theirs in zip(left, right, strict=True):
            assert ours.shape == theirs.shape
            assert drift(ours, theirs) <= EXACT


# Fork and rows.


@pytest.mark.parametrize("policy", ["full()", H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_is_deep(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 2)
    before = cache.snapshot()
    copy = cache.fork()
    assert differing(copy.snapshot(), before) == []
    gone_on = fed(backend, copy, FEED[:, 2:5])
    assert differing(cache.snapshot(), before) == []
    original = fed(backend, cache, FEED[::-1, 2:5])
    assert differing(gone_on.snapshot(), begun(backend, policy, 5).snapshot()) == []
    assert differing(original.snapshot(), gone_on.snapshot()) != []


@pytest.mark.parametrize("policy", ["full()", H2O])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fork_one_row_into_three(backend: str, policy: str) -> None:
    made = model(backend)
    _, cache = made.step(PROMPT[1:], made.cache(policy))
    three = cache.fork(rows=3)
    assert three.seen.tolist() == [11, 11, 11]
    tokens = np.array([[4, 9], [9, 4], [17, 0]], np.int32)
    after = fed(backend, three, tokens).snapshot()
    for row in range(3):
        alone = fed(backend, cache.fork(), tokens[row : row + 1]).snapshot()
        assert_same_row(after, row, alone, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_row_forks_into_several(backend: str) -> None:
    cache = begun(backend)
    with pytest.raises(KvtwinError, match=r"fork\(rows=3\) of a cache with batch 2; expected a batch of 1"):
        cache.fork(rows=3)
    assert cache.seen.tolist() == [8, 11]


@pytest.mark.parametrize("rows", [0, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_has_at_least_one_row(backend: str, rows: int) -> None:
    made = model(backend)
    with pytest.raises(KvtwinError, match=rf"rows={rows}"):
        made.cache().fork(rows=rows)


@pytest.mark.parametrize("policy", ["full()", SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_select_and_reorder(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 2)
    before = cache.snapshot()
    picked = cache.rows([1, 0, -1])
    assert differing(cache.snapshot(), before) == []
    assert picked.batch == 3
    tokens = FEED[[1, 0, 1], 2:5]
    after = fed(backend, picked, tokens).snapshot()
    straight = begun(backend, policy, 5).snapshot()
    for row, source in enumerate([1, 0, 1]):
        assert_same_row(after, row, straight, source)


@pytest.mark.parametrize("index", [[2], [0, -3], []])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_there(backend: str, index: list[int]) -> None:
    with pytest.raises(KvtwinError, match=r"of a cache with batch 2; expected indices"):
        begun(backend).rows(index)


# Roll back.


@pytest.mark.parametrize(
    ("policy", "steps", "count", "spec"),
    [
        ("full()", 5, 3, SPEC),
        ("full()", 0, 4, SPEC),  # into the prompt
        ("full()", 2, 0, SPEC),
        ("window(budget=40, sinks=2)", 5, 2, SPEC),  # nothing evicted yet
        (TAIL, 7, 3, SPEC),  # since the last eviction
        ("key_norm(budget=30)", 4, 4, SPEC),
        ("full()", 3, 2, dataclasses.replace(SLIDING, layers=(LAYER, dataclasses.replace(LAYER, window=40)))),
    ],
    ids=["full", "prompt", "nothing", "window", "interval", "key_norm", "sliding"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_leaves_no_trace(
    backend: str, policy: str, steps: int, count: int, spec: ModelSpec
) -> None:
    cache = begun(backend, policy, steps, spec)
    rolled = cache.roll_back(count)
    if steps >= count:
        never = begun(backend, policy, steps - count, spec)
    else:
        shorter = PROMPT.copy()
        shorter[0, 8 - count :] = shorter[1, 11 - count :] = -1
        made = model(backend, spec)
        _, never = made.step(shorter, made.cache(policy, batch=2))
    assert differing(rolled.snapshot(), never.snapshot(), 0.0 if steps >= count else EXACT) == []
    again, straight = (fed(backend, one, FEED[:, 5:9], spec).snapshot() for one in (rolled, never))
    assert differing(again, straight, EXACT) == []
    with pytest.raises(KvtwinError, match="consumed"):
        cache.snapshot()


@pytest.mark.parametrize("policy", ["full()", "window(budget=40)"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_part_of_a_call_of_several_tokens(backend: str, policy: str) -> None:
    made = model(backend)
    _, cache = made.step(FEED[:, :5], begun(backend, policy), logits=None)
    _, never = made.step(FEED[:, :2], begun(backend, policy), logits=None)
    assert differing(cache.roll_back(3).snapshot(), never.snapshot(), EXACT) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_is_refused_where_the_next_eviction_cannot_be_placed(backend: str) -> None:
    """With an interval, how many calls the tokens came in decides when the next eviction is due."""
    _, cache = model(backend).step(FEED[:, :3], begun(backend, "window(budget=40, interval=4)"))
    with pytest.raises(KvtwinError, match=r"cannot roll back 2 tokens under window\(.*interval=4\)"):
        cache.roll_back(2)


@pytest.mark.parametrize(
    ("policy", "steps", "count", "reason"),
    [
        (WINDOW, 2, 1, "tokens were evicted within them"),
        (TAIL, 5, 2, "tokens were evicted within them"),
        ("h2o(budget=40)", 2, 1, "its memory cannot be undone"),
        ("snapkv(budget=40, window=5)", 2, 1, "its newest queries cannot be undone"),
        ("full()", 2, 11, r"the rows have seen \[10, 13\]"),
        ("full()", 2, -1, "cannot roll back -1 tokens"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_is_refused_with_the_reason(
    backend: str, policy: str, steps: int, count: int, reason: str
) -> None:
    cache = begun(backend, policy, steps)
    before = cache.snapshot()
    with pytest.raises(KvtwinError, match=reason):
        cache.roll_back(count)
    assert differing(cache.snapshot(), before) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_roll_back_is_refused_where_a_sliding_window_has_passed(backend: str) -> None:
    cache = begun(backend, "full()", 1, SLIDING)
    with pytest.raises(KvtwinError, match="tokens were evicted within them"):
        cache.roll_back(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_empty_is_zero_in_a_snapshot(backend: str) -> None:
    """So that two caches that hold the same are equal, whatever padding once computed there."""
    made = model(backend)
    _, cache = made.step(PROMPT[:, 8:], made.cache(SNAPKV, batch=2), evict=False)
    for layer in cache.snapshot().layers:
        assert layer.queries is not None
        assert layer.query_positions is not None
        assert layer.query_positions.tolist() == [[-1] * 5, [-1, -1, 0, 1, 2]]
        assert not layer.queries[0].any()
        assert not layer.queries[1, :, :, :2].any()
        assert layer.queries[1, :, :, 2:].all()
        assert not layer.streams["keys"][0].any()
    assert cache.snapshot().seen.tolist() == [0, 3]


# Save, load, go on.


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
FIRST = np.stack([np.eye(SPEC.vocab)[7], np.eye(SPEC.vocab)[12]])


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


# Calls.


@pytest.mark.parametrize("policy", ["full()", H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_chunks_equals_the_whole(backend: str, policy: str) -> None:
    made = model(backend)
    cache = made.cache(policy, batch=2)
    for start in (0, 4, 8):
        logits, cache = made.step(PROMPT[:, start : start + 4], cache, phase="prefill", evict=start == 8)
    whole, straight = made.step(PROMPT, made.cache(policy, batch=2))
    assert differing(cache.snapshot(), straight.snapshot(), EXACT) == []
    assert logits is not None
    assert whole is not None
    assert drift(logits[1], whole[1]) <= EXACT
    assert not logits[0].any()  # the shorter row had no token in the last chunk
    ours, theirs = (fed(backend, one, FEED[:, :2]).snapshot() for one in (cache, straight))
    assert differing(ours, theirs, EXACT) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_without_a_cache_gives_one(backend: str) -> None:
    made = model(backend)
    logits, cache = made.step(PROMPT)
    same, passed = made.step(PROMPT, made.cache(batch=2))
    assert differing(cache.snapshot(), passed.snapshot()) == []
    assert logits is not None
    assert logits.shape == (2, 1, 31)
    np.testing.assert_array_equal(logits, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_and_decode_equal_one_call(backend: str) -> None:
    made = model(backend)
    every, _ = made.step(np.concatenate([PROMPT[1:], FEED[1:, :3]], axis=1), logits="all")
    first, cache = made.step(PROMPT[1:], logits="all")
    parts = [first]
    for column in range(3):
        one, cache = made.step(FEED[1:, column : column + 1], cache)
        parts.append(one)
    assert drift(np.concatenate(parts, axis=1), every) <= EXACT


@pytest.mark.parametrize(
    "use",
    [
        lambda made, cache: made.step(FEED[:, :1], cache),
        lambda made, cache: made.step(FEED[:, :2], cache),
        lambda made, cache: made.decode(cache, FIRST, Sampling(), (), 2),
        lambda made, cache: cache.fork(),
        lambda made, cache: cache.rows([0]),
        lambda made, cache: cache.roll_back(1),
        lambda made, cache: cache.seen,
        lambda made, cache: cache.bytes,
        lambda made, cache: cache.kept,
        lambda made, cache: cache.snapshot(),
    ],
    ids=["step", "chunk", "decode", "fork", "rows", "roll_back", "seen", "bytes", "kept", "snapshot"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_consumed_cache_says_so(backend: str, use: Callable[[Model, Cache], Any]) -> None:
    cache = begun(backend)
    fed(backend, cache, FEED[:, :1])
    assert "consumed" in repr(cache)
    with pytest.raises(
        KvtwinError,
        match=r"this cache was consumed by a step; use the cache that the step returned, or fork\(\) before",
    ):
        use(model(backend), cache)


@pytest.mark.parametrize("policy", ["full()", WINDOW, TAIL, H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_finished_row_stays_as_it_is(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 1)
    before = cache.snapshot()
    tokens = FEED[:, 1:6].copy()
    tokens[1] = -1
    after = fed(backend, cache, tokens).snapshot()
    assert_same_row(after, 1, before, 1)
    assert after.dropped[1] == before.dropped[1]
    assert_same_row(after, 0, begun(backend, policy, 6).snapshot(), 0)


@pytest.mark.parametrize("policy", ["full()", TAIL, H2O])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stopped_row_stays_as_it_is(backend: str, policy: str) -> None:
    made = model(backend)
    going = np.array([True, False])
    before = begun(backend, policy, 1)
    shot = before.snapshot()
    tokens, _, after = made.decode(before, FIRST, Sampling(), (), 5, active=going)
    assert (tokens[1] == -1).all()
    assert (tokens[0] >= 0).all()
    assert_same_row(after.snapshot(), 1, shot, 1)


def _held(cache: Any) -> int:
    """Bytes of every array of the cache but its counters."""
    if hasattr(cache, "content"):
        heads = [head for row in cache.content for layer in row.heads for head in layer]
        lists = [[head.positions, *head.streams.values(), *head.memory.values()] for head in heads]
        lists += [[*row.queries, *row.query_positions] for row in cache.content]
        return sum(x.nbytes for one in lists for x in one)
    layers = cache.layers if hasattr(cache, "layers") else cache.state.layers
    every = []
    for layer in layers:
        every += [*layer.streams.values(), layer.positions, *layer.memory.values()]
        every += [x for x in (layer.queries, layer.query_positions) if x is not None]
    return sum(x.nbytes for x in every)


@pytest.mark.parametrize("policy", ["full()", WINDOW, H2O, SNAPKV])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_add_up(backend: str, policy: str) -> None:
    cache = begun(backend, policy, 2)
    held = cache.bytes
    parts = [getattr(held, part.name) for part in dataclasses.fields(held)]
    assert held.capacity == sum(parts) == _held(cache)
    assert min(parts) >= 0
    tokens = sum(int((kept >= 0).sum()) for kept in cache.kept)
    assert held.payload == tokens * 2 * LAYER.head_dim * 8  # keys and values in float64
    assert held.positions == tokens * 4
    assert held.memory == (tokens * 8 if policy == H2O else 0)
    assert (held.queries > 0) == (policy == SNAPKV)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_back_a_ragged_batch_leaves_room_for_what_follows(backend: str) -> None:
    """Each step takes a slot in every row, so that buffers are fuller than any row has seen tokens."""
    made = model(backend)
    tokens = np.full((2, 20), -1, np.int32)
    tokens[0], tokens[1, :8] = np.arange(20), np.arange(8)
    logits, cache = made.step(tokens, made.cache(batch=2))
    _, _, cache = made.decode(cache, logits[:, 0], Sampling(), (), 10, active=np.array([False, True]))
    cache = cache.roll_back(1)
    for step in range(6):
        _, cache = made.step([[step], [step + 6]], cache)
    assert cache.seen.tolist() == [25, 23]
    assert cache.kept[0][0, 0].tolist() == list(range(25))
    assert cache.kept[0][1, 0].tolist() == [*range(23), -1, -1]


# Bad input.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"phase": "Decode"}, "phase='Decode'"),
        ({"phase": "pass"}, "phase='pass'"),
        ({"logits": "none"}, "logits='none'"),
        ({"forced": []}, "0 forced sets came"),
        ({"forced": [np.zeros((2, 2, 1), np.int32)] * 3}, "3 forced sets came"),
        ({"forced": [np.zeros((2, 2, 7), np.int32)] * 2}, "a forced set has 7 tokens; expected at most"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_options_of_a_step_are_refused_and_leave_the_cache(
    backend: str, options: dict[str, Any], reason: str
) -> None:
    made = model(backend)
    _, cache = made.step(PROMPT, made.cache("h2o(budget=6)", batch=2))
    with unchecked(), pytest.raises(KvtwinError, match=reason):
        made.step(FEED[:, :1], cache, **options)
    assert cache.seen.tolist() == [8, 11]


@pytest.mark.parametrize("sizes", [{"batch": 2.5}, {"batch": True}, {"capacity": "9"}, {"length": 0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_that_are_no_whole_numbers_are_refused(backend: str, sizes: dict[str, Any]) -> None:
    (what,) = sizes
    with unchecked(), pytest.raises(KvtwinError, match=f"{what} is .*; expected an integer of at least 1"):
        model(backend).cache(**sizes)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.array([[1, 31], [0, 2]]), "token 31 at row 0, column 1; expected 0 to 30, or -1 for padding"),
        (np.array([[1, 2], [0, -2]]), "token -2 at row 1, column 1; expected 0 to 30"),
        (np.array([[1, 2]]), "tokens have 1 rows; expected 2, the batch of the cache"),
        (np.zeros((2, 0), np.int32), r"shape \(2, 0\); expected \[batch, tokens\] with at least one token"),
        (np.zeros(2, np.int32), r"shape \(2,\); expected \[batch, tokens\]"),
        ([], "no list of rows"),
        ([[], []], "at least one token"),
        ([1, 2], "no list of rows"),
        (np.array([[0.5], [1.0]]), "tokens have dtype float64; expected integers"),
        (np.array([[np.nan], [1.0]]), "tokens have dtype float64; expected integers"),
        (np.array([["a"], ["b"]]), "expected integers"),
        ([["a"], ["b"]], "expected integers"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tokens_are_refused_and_leave_the_cache(backend: str, tokens: Any, reason: str) -> None:
    cache = begun(backend)
    with unchecked(), pytest.raises(KvtwinError, match=reason):
        model(backend).step(tokens, cache)
    assert cache.seen.tolist() == [8, 11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_the_capacity(backend: str) -> None:
    made = model(backend)
    _, cache = made.step(PROMPT, made.cache(batch=2, capacity=12))
    _, cache = made.step(FEED[:, :1], cache)
    with pytest.raises(KvtwinError, match="13 tokens exceed the capacity 12"):
        made.step(FEED[:, :1], cache)
    with pytest.raises(KvtwinError, match="capacity 12"):
        made.decode(cache, FIRST, Sampling(), (), 1)
    assert cache.seen.tolist() == [9, 12]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_beyond_the_capacity(backend: str) -> None:
    made = model(backend)
    cache = made.cache(batch=2, capacity=10)
    with pytest.raises(KvtwinError, match="11 tokens exceed the capacity 10"):
        made.step(PROMPT, cache)
    assert cache.seen.tolist() == [0, 0]


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("batch", -1), ("capacity", 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_of_nothing_is_refused(backend: str, field: str, value: int) -> None:
    with pytest.raises(KvtwinError, match=f"{field} is {value}; expected an integer of at least 1"):
        model(backend).cache(**{field: value})
