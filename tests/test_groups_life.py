"""Caches under codecs with groups: copies, files, forced sets, bytes, what is refused, and what is compiled."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from backends import backends
from framework.codec import Codec
from framework.compare import TOLERANCE, drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.footprint import footprint
from framework.groups import most_rows
from framework.policy import policies
from tests import runs
from tests.runs import AGAIN, BEFORE, BOTH, CENTRED, LENGTHS, ODD, OFTEN, SPEC, THINK, TWO, UNBIASED, Call
from tests.twins import column, compilations, snapshot_drift, texts

EXACT = TOLERANCE["float64"]
ADAKV = "adakv(budget=30, floor=0.1, policy=h2o())"
slow_on_flax = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)]
)
later = [Call(column(step, LENGTHS)) for step in range(5, 17)]


@pytest.mark.parametrize(
    ("policy", "codec"), [("full()", BEFORE), ("keydiff(budget=8)", BOTH), (ADAKV, OFTEN)], ids=str
)
@pytest.mark.parametrize(
    ("source", "target"),
    [("reference", "torch"), ("torch", "reference"), ("torch", "torch"),
     pytest.param("torch", "flax", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_cache_lives_on_as_another(
    source: str, target: str, policy: str, codec: Codec, tmp_path: Path
) -> None:
    """Copies, picked rows and files go on with the same logits, codes and groups, over the ends of several blocks."""
    runner, other = runs.model(source), runs.model(target)
    _, cache = runs.begun(source, policy, codec, 5)
    cache.save(tmp_path / "cache")
    restored, forked, some = other.restore(tmp_path / "cache"), cache.fork(), cache.rows([2, -3])
    one = cache.rows([1]).fork(rows=2)
    for each in (restored, forked):
        assert snapshot_drift(each, cache) == 0.0
        assert each.groups == cache.groups
    straight = runs.went(runner, cache, later)
    assert runs.apart(runs.went(other, restored, later), straight) <= EXACT
    assert runs.apart(runs.went(runner, forked, later), straight) <= EXACT
    for copy, index in ((some, [2, 0]), (one, [1, 1])):
        logits, copy = runs.went(runner, copy, [replace(each, tokens=each.tokens[index]) for each in later])
        assert max(drift(x, y[index]) for x, y in zip(logits, straight[0], strict=True)) <= EXACT
        assert snapshot_drift(copy, straight[1].rows(index)) <= EXACT


@slow_on_flax
def test_forced_sets_decide_what_a_group_is_made_of(backend: str) -> None:
    """Sets that the policy would not choose, in a call that completes blocks."""
    found, random = [], np.random.default_rng(2)
    forced = [
        np.stack([np.sort(random.permutation(np.arange(low, 9))[:5]) for _ in range(6)]).reshape(3, 2, 5)
        for low in (0, 4)
    ]
    for name in ("reference", backend):
        runner = runs.model(name)
        cache = runner.cache("h2o(budget=5)", TWO, 3)
        logits, cache = runner.step(texts(3)[:, :9], cache, forced=forced)
        for kept, right in zip(cache.kept, forced, strict=True):
            np.testing.assert_array_equal(kept, right)
        more, cache = runs.went(runner, cache, [Call(texts(3)[:, 9 + step][:, None]) for step in range(6)])
        found.append(([logits, *more], cache))
    assert runs.apart(found[1], found[0]) <= EXACT


@slow_on_flax
def test_tokens_are_taken_back_before_any_is_coded(backend: str) -> None:
    runner = runs.model(backend)
    _, cache = runner.step([[5, 6, 7], [8, 9, 10]], runner.cache("full()", ODD, 2))
    straight = cache.fork()
    _, cache = runner.step([[11], [12]], cache)
    _, cache = runner.step([[13], [14]], cache)
    cache = cache.roll_back(2)
    assert snapshot_drift(cache, straight) == 0.0
    calls = [Call(np.array([[20 + step], [40 + step]])) for step in range(5)]
    found, again = (runs.went(runner, each, calls) for each in (cache, straight))
    # Codes are equal; logits add up over buffers of 8 slots and of 4.
    assert runs.apart(found, again) <= EXACT
    with pytest.raises(KvtwinError, match=r"codec kivi\(.*has coded tokens.*less than 6 tokens.*fork\(\)"):
        found[1].roll_back(1)
    assert found[1].seen.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (
            lambda x: x[:, :, :3],
            ["exact"],
            r"table.keys.exact has shape \(3, 2, 3, 8\); expected \(3, 2, 4, 8\)",
        ),
        (lambda x: x[:, :, :1], ["minima"], r"table.keys.(minima|scales) has shape"),
        (
            lambda x: x[:, :, :1],
            ["minima", "scales"],
            r"stream.keys.row names group \d of 1; the file is damaged",
        ),
        (lambda x: x.astype(np.float32), ["scales"], "table.keys.scales has dtype float32; expected float16"),
        (lambda x: x.astype(np.int16), ["again"], "table.keys.again has dtype int16; expected int32"),
    ],
    ids=["exact", "rows", "groups", "scales", "again"],
)
def test_a_file_with_other_tables_is_refused(
    change: Callable[[np.ndarray], np.ndarray], keys: list[str], message: str, tmp_path: Path
) -> None:
    _, cache = runs.begun("torch", "full()", OFTEN, 5)
    held = cache.snapshot()
    tables = {
        f"keys.{key}": np.ascontiguousarray(change(held.layers[1].tables[f"keys.{key}"])) for key in keys
    }
    last = replace(held.layers[1], tables=held.layers[1].tables | tables)
    replace(held, layers=(held.layers[0], last)).save(tmp_path / "cache")
    for backend in ("reference", "torch", "flax"):
        with pytest.raises(KvtwinError, match=message):
            runs.model(backend).restore(tmp_path / "cache")


@slow_on_flax
def test_what_is_coded_stays_as_it_is(backend: str) -> None:
    """Without regrouping, the codes of a key and what its group has are the same bits until it is evicted."""
    runner, seen = runs.model(backend), 0
    known: dict[tuple[int, ...], bytes] = {}
    cache = runner.cache("h2o(budget=9)", TWO, 3)
    for call in runs.text(30):
        _, cache = runs.went(runner, cache, [call])
        now: dict[tuple[int, ...], bytes] = {}
        for index, layer in enumerate(cache.snapshot().layers):
            for row, head, slot in np.argwhere(layer.streams["keys.row"][..., 0] >= 0):
                if (position := int(layer.positions[row, head, slot])) >= 0:
                    group = int(layer.streams["keys.row"][row, head, slot, 0])
                    parts = [layer.streams["keys.codes"][row, head, slot]]
                    parts += [layer.tables[f"keys.{key}"][row, head, group] for key in ("scales", "minima")]
                    now[index, row, head, position] = b"".join(x.tobytes() for x in parts)
        seen += len(known.keys() & now.keys())
        assert all(now[key] == known[key] for key in known.keys() & now.keys())
        known = now
    assert seen > 500


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_regrouping_bounds_the_groups(backend: str) -> None:
    """Keys of a few tokens each would come to lie in a group of their own."""
    runner, most = runs.model(backend), dict[Codec, int]()
    calls = [Call(texts(1)[:, step : step + 1]) for step in range(90)]
    for codec in (OFTEN, replace(OFTEN, regroup=False)):
        cache, most[codec] = runner.cache("key_norm(budget=24)", codec, 1), 0
        for call in calls:
            _, cache = runs.went(runner, cache, [call])
            rows = cache.snapshot().layers[0].streams["keys.row"]
            most[codec] = max(most[codec], int(rows.max()) + 1)
        counts = cache.groups
        assert all(one.places == 4 * one.groups >= one.tokens > 0 for one in counts)
        assert (counts[0].again > 0) == codec.regroup
    plain = most.pop(replace(OFTEN, regroup=False))
    assert most[OFTEN] <= most_rows(OFTEN, 25, True) == 14 < plain


@slow_on_flax
def test_groups_that_an_eviction_leaves_apart_are_kept(backend: str) -> None:
    """Many groups of one token each, and no key is complete in the call that evicts: nothing is coded again yet."""
    found = []
    for name in ("reference", backend):
        cache = runs.model(name).cache("key_norm(budget=8)", OFTEN, 1)
        calls = [
            Call(texts(1)[:, :48], "prefill", evict=False),
            Call(texts(1)[:, 48:50], "prefill"),
            *(Call(texts(1)[:, step : step + 1]) for step in range(50, 60)),
        ]
        logits, cache = runs.went(runs.model(name), cache, calls[:2])
        assert cache.groups[0].groups > most_rows(OFTEN, 9, True)
        more, cache = runs.went(runs.model(name), cache, calls[2:])
        found.append((logits + more, cache))
    assert runs.apart(found[1], found[0]) <= EXACT


@slow_on_flax
def test_blocks_that_are_no_whole_groups(backend: str) -> None:
    """Six tokens in groups of five, again and again."""
    runner, calls = runs.model(backend), [Call(texts(1)[:, step : step + 1]) for step in range(36)]
    found = runs.went(runner, runner.cache("full()", CENTRED, capacity=36), calls)
    reference = runs.model("reference")
    right = runs.went(reference, reference.cache("full()", CENTRED), calls)
    assert runs.apart(found, right) <= EXACT
    assert [found[1].groups[0].groups, found[1].groups[0].tokens] == [2 * 12, 2 * 36]
    assert 12 <= most_rows(CENTRED, 36, evicts=False)


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_newest_queries_of_a_codec_are_not_taken_back(backend: str) -> None:
    runner = runs.model(backend)
    _, cache = runner.step([[5, 6]], runner.cache("full()", THINK))
    with pytest.raises(KvtwinError, match=r"codec think\(.*its newest queries cannot be undone; fork\(\)"):
        cache.roll_back(1)


@slow_on_flax
def test_a_key_that_cannot_be_coded_is_an_error_when_it_is_coded(backend: str) -> None:
    """It is finite, too large for its scales, and exact until its block is complete; what is evicted before is not
    coded."""
    bad = {key: value.copy() for key, value in runs.weights().items()}
    bad["embed.weight"][1:, 0] = 0
    bad["embed.weight"][0, 0] = 1
    bad["layers.0.attention.key.weight"][9, 0] = 1e9
    runner = backends.get(backend).build(SPEC, bad, "float64")
    with np.errstate(over="ignore"):
        _, cache = runner.step([[5, 0], [8, 9]], runner.cache("full()", TWO, 2))
        logits, cache = runner.step([[7], [4]], cache)
        assert np.isfinite(logits).all()
        with pytest.raises(KvtwinError, match=r"codec kivi\(.*cannot code what layer 0, head 1 made"):
            runner.step([[3], [2]], cache)
        _, cache = runner.step([[0, 5], [8, 9]], runner.cache("window(budget=2, sinks=0)", TWO, 2))
        for token in range(1, 5):
            logits, cache = runner.step([[token], [token + 9]], cache)
            assert np.isfinite(logits).all()


@slow_on_flax
def test_a_key_that_is_not_finite_is_an_error_at_once(backend: str) -> None:
    bad = {key: value.copy() for key, value in runs.weights().items()}
    bad["layers.1.attention.key.weight"][9, 0] = np.nan
    runner = backends.get(backend).build(SPEC, bad, "float64")
    with pytest.raises(KvtwinError, match="unbias.*kivi.*cannot code what layer 1, head 1 made"):
        runner.step([[5, 6], [8, 9]], runner.cache("full()", UNBIASED, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["keydiff(budget=BUDGET)", "adakv(budget=BUDGET, floor=0.1, policy=h2o())"]
)
def test_later_blocks_and_other_budgets_compile_nothing(policy: str) -> None:
    """Nor do buffers change; one loop over the ends of several blocks does what single steps do."""
    runner = runs.model("flax", "float32")

    def after(budget: int, steps: int) -> tuple[Any, list[Any]]:
        cache = runner.cache(policy.replace("BUDGET", str(budget)), AGAIN, 3)
        logits, cache = runner.step(runs.text(1)[0].tokens, cache)
        shapes = [[x.shape for x in jax.tree.leaves(cache.state.layers)]]
        for _ in range(2):
            out, last, cache = runner.decode(cache, logits[:, 0], Sampling(), (), steps)
            logits = last[:, None]
            shapes.append([x.shape for x in jax.tree.leaves(cache.state.layers)])
        return (out, last, cache), shapes

    _, shapes = after(25, 40)
    assert shapes[1] == shapes[2]
    with compilations() as seen:
        (out, last, cache), _ = after(27, 30)
    assert not seen
    straight = runner.cache(policy.replace("BUDGET", "27"), AGAIN, 3)
    logits, straight = runner.step(runs.text(1)[0].tokens, straight)
    written = []
    for _ in range(60):
        written.append(logits[:, 0].argmax(-1))
        logits, straight = runner.step(written[-1][:, None], straight)
    np.testing.assert_array_equal(np.stack(written[30:], axis=1), out)
    assert drift(logits[:, 0], last) <= TOLERANCE["float32"]
    assert snapshot_drift(cache, straight) <= TOLERANCE["float32"]


@pytest.mark.parametrize("codec", [TWO, AGAIN, BEFORE], ids=str)
def test_torch_holds_what_the_footprint_says(codec: Codec) -> None:
    """Of one prompt under full(): tables have a row for each group, and no more."""
    runner = runs.model("torch", "float32")
    _, cache = runner.step(texts(1)[:, :45], runner.cache("full()", codec))
    expected = footprint(SPEC, policies.make("full()"), codec, 45, 4)
    held = cache.bytes
    assert (held.payload, held.scales, held.positions) == (
        expected.payload,
        expected.scales,
        expected.positions,
    )
    arrays = [x for layer in cache.layers for x in (*layer.tables.values(), *sum(layer.stored.values(), []))]
    assert held.capacity - held.queries == sum(x.nbytes for x in arrays)
    for index, layer in enumerate(cache.layers):
        assert layer.tables["keys.scales"].shape[2] == cache.groups[index].groups // 2


@pytest.mark.parametrize("codec", [pytest.param(TWO, marks=pytest.mark.slow), AGAIN], ids=str)
def test_flax_has_room_for_the_most_groups(codec: Codec) -> None:
    runner = runs.model("flax", "float32")
    _, cache = runner.step(texts(1)[:, :13], runner.cache("h2o(budget=20)", codec), logits=None)
    held, tables = cache.bytes, 0
    for layer, count in zip(cache.state.layers, cache.groups, strict=True):
        rows = most_rows(codec, layer.slots, evicts=True)
        assert {layer.tables[f"keys.{key}"].shape[2] for key in ("scales", "minima")} == {rows}
        tables += (2 * rows - count.groups) * 2 * 2 * 8
    filled = sum(int((kept >= 0).sum()) for kept in cache.kept)
    slots = sum(layer.positions.size for layer in cache.state.layers)
    each = sum(x.nbytes for layer in cache.state.layers for x in sum(layer.stored.values(), [])) // slots
    newest = sum(int((kept >= 13 - codec.recent).sum()) for kept in cache.kept)
    ring = (2 * 2 * codec.recent - newest) * 2 * 8 * 4
    assert held.padding == tables + (slots - filled) * each + ring


@pytest.mark.slow
def test_both_backends_write_the_same() -> None:
    """Greedy, over the ends of many blocks."""
    options: dict[str, Any] = {"codec": "kivi(group=4, residual=8)", "max_new_tokens": 40, "stop": ()}
    rows = [texts(3)[row, :count].tolist() for row, count in enumerate(LENGTHS)]
    found = [
        runs.model(name).generate(rows, policy="h2o(budget=12)", **options) for name in ("torch", "flax")
    ]
    assert found[0].tokens == found[1].tokens
    assert found[0].bytes.payload == found[1].bytes.payload
    assert found[0].bytes.scales == found[1].bytes.scales
    assert snapshot_drift(found[0].cache, found[1].cache) <= EXACT
