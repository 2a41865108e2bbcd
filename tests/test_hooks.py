"""Every hook of the contract on the three implementations: toy policies whose values are counted again by loops."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.arrays import device, take_slots
from framework.backend import Cache, Decision, Model
from framework.compare import TOLERANCE, drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.generate import prefill
from framework.policies.prefill_decode import PrefillDecode
from framework.policy import BLOCK, Block, Needs, Policy, View
from framework.spec import Layer, ModelSpec
from framework.wrapper import Wrapper
from tests.twins import WINDOW, column, hybrid, hybrid_weights, prompts, snapshot_drift, texts

BACKENDS = ("reference", "torch", "flax")
EXACT = TOLERANCE["float64"]
LENGTHS = (13, 16, 9)  # one compiled shape: flax lays prompts out in steps of 16 tokens
KV_HEADS, GROUP, DIM = 2, 3, 20
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# Where what is compiled shows nothing new, it waits for make test-slow.
flax_later = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)]
)

Calls = Sequence[tuple[np.ndarray, dict[str, Any]]]


def run(model: Model, cache: Cache, calls: Calls) -> tuple[Cache, list[list[Decision]]]:
    """The cache after these calls, and the decisions of each."""
    decisions: list[list[Decision]] = []
    for tokens, options in calls:
        decisions.append([])
        _, cache = model.step(tokens, cache, logits=None, **(options | {"decisions": decisions[-1]}))
    return cache, decisions


def begun(
    backend: str, policy: str | Policy, steps: int = 0, lengths: Sequence[int] = LENGTHS, **options: Any
) -> Cache:
    """A cache that has seen the prompts, and then a token a step."""
    model = hybrid(backend)
    cache = model.cache(policy, batch=len(lengths))
    _, cache = model.step(prompts(lengths), cache, logits=None, **options)
    return fed(backend, cache, range(steps), lengths)


def fed(
    backend: str, cache: Cache, steps: Sequence[int], lengths: Sequence[int] = LENGTHS, silent: Any = ()
) -> Cache:
    """The cache after these decode steps; `silent` rows get no token."""
    for step in steps:
        tokens = column(step, lengths)
        tokens[list(silent)] = -1
        _, cache = hybrid(backend).step(tokens, cache, logits=None)
    return cache


def assert_same(found: Cache, expected: Cache, tolerance: float = EXACT) -> None:
    """The caches hold the same: tokens, streams, queries, memory per slot and per head, budgets, counters."""
    assert snapshot_drift(found, expected) <= tolerance
    ours, theirs = found.snapshot(), expected.snapshot()
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert one.memory.keys() == other.memory.keys()
        assert one.heads.keys() == other.heads.keys()
        for key in other.heads:
            assert drift(one.heads[key], other.heads[key]) <= tolerance, key
    for mine, right in zip(ours.budgets, theirs.budgets, strict=True):
        assert (mine is None and right is None) or np.array_equal(mine, right)
    assert (ours.steps, ours.pending) == (theirs.steps, theirs.pending)


def held(kept: np.ndarray) -> list[int]:
    """The positions of one head without the empty places."""
    return [int(position) for position in kept if position >= 0]


# Token ids.


def worth(token: int) -> int:
    """A number per token id that has nothing to do with its position."""
    return token * 37 % 101


@dataclass(frozen=True, kw_only=True)
class ByToken(Policy):
    """Scores by token id alone."""

    free: bool = True

    @property
    def order_free(self) -> bool:
        return self.free

    @property
    def needs(self) -> Needs:
        return Needs(tokens=True)

    def score(self, view: View) -> Any:
        assert view.tokens.dtype == view.xp.int32
        return view.tokens * 37 % 101


def best_by(
    worths: Callable[[int, int], float], budget: int, steps: int, window: int | None, interval: int = 1
) -> list[list[int]]:
    """What each row keeps of a score that never changes, one token at a time after the prompts."""
    result = []
    for row, length in enumerate(LENGTHS):
        own = list(range(length))
        for step in range(steps + 1):
            if step:
                own.append(length + step - 1)
            if step % interval == 0:
                living = [p for p in own if window is None or p > length + step - window]
                living.sort(key=lambda p: (worths(row, p), p))
                own = sorted(living[-budget:])
        result.append(own)
    return result


@every_backend
@pytest.mark.parametrize(
    "policy",
    [ByToken(budget=6), ByToken(budget=6, free=False, interval=3)],
    ids=["overwriting", "compacting"],
)
def test_token_ids_follow_their_slots(backend: str, policy: ByToken) -> None:
    rows = texts(len(LENGTHS))
    cache = begun(backend, policy)
    for steps in (0, 1, 8):
        cache = fed(backend, cache, range(cache.seen[0] - LENGTHS[0], steps))
        for layer, window in zip(cache.snapshot().layers, (None, WINDOW), strict=True):
            expected = best_by(lambda r, p: worth(int(rows[r, p])), 6, steps, window, policy.interval)
            for row, head in np.ndindex(len(LENGTHS), KV_HEADS):
                assert held(layer.positions[row, head]) == expected[row]
                count = len(expected[row])
                assert layer.memory["tokens"][row, head, :count].tolist() == rows[row, expected[row]].tolist()


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_token_ids_are_saved_and_the_reference_agrees(backend: str, tmp_path: Any) -> None:
    policy = ByToken(budget=6)
    cache = begun(backend, policy, 3)
    assert_same(cache, begun("reference", policy, 3))
    cache.save(tmp_path / "cache")
    again = hybrid(backend).restore(tmp_path / "cache")
    assert_same(again, cache, 0)
    assert_same(fed(backend, again, (3, 4)), begun("reference", policy, 5))
    # Several tokens at once are compacted, from slots that overwriting has left in no order.
    more = np.concatenate([column(step, LENGTHS) for step in (3, 4, 5)], axis=1)
    found, expected = (
        hybrid(one).step(more, held_so_far, logits=None)[1]
        for one, held_so_far in ((backend, cache), ("reference", begun("reference", policy, 3)))
    )
    assert_same(found, expected)


# The stream of tokens, memory per head and memory per slot.


@dataclass(frozen=True, kw_only=True)
class Summing(Policy):
    """Sums un-rotated queries and inputs of the layer per head, counts tokens, and notes attention per slot."""

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, sums=True, stream=True)

    @property
    def memory(self) -> Mapping[str, float]:
        return {"mass": 0.5}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"count": (), "queries": (layer.group, layer.head_dim), "hidden": (DIM,)}

    def stream(self, view: View, block: Block) -> Mapping[str, Any]:
        xp, old = view.xp, view.memory
        real = block.positions >= 0
        count = xp.astype(xp.sum(xp.astype(real, xp.int32), axis=1), old["count"].dtype)[:, None]
        queries = xp.sum(xp.where(real[:, None, None, :, None], block.queries, 0.0), axis=3)
        hidden = xp.sum(xp.where(real[..., None], block.hidden, 0.0), axis=1)[:, None, :]
        return {
            "mass": old["mass"],
            "count": old["count"] + count,
            "queries": old["queries"] + queries,
            "hidden": old["hidden"] + hidden,
        }

    def note(self, view: View) -> Mapping[str, Any]:
        return {**view.memory, "mass": view.memory["mass"] + view.sums}

    def score(self, view: View) -> Any:
        xp, memory = view.xp, view.memory
        queries = xp.sum(memory["queries"], axis=2)[:, :, None, :] / memory["count"][..., None, None]
        pull = xp.sum(memory["hidden"], axis=-1)[..., None]
        return xp.sum(view.keys * queries, axis=-1) + memory["mass"] * pull


def tapped(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The named values of one prefill of these tokens on the reference."""
    taps: dict[str, np.ndarray] = {}
    hybrid("reference").step(tokens, logits=None, taps=taps)
    return taps


def assert_summed(cache: Cache, taps: Mapping[str, np.ndarray], tokens: np.ndarray) -> None:
    """The head memory of `Summing` is what the taps of the same tokens add up to."""
    for index, layer in enumerate(cache.snapshot().layers):
        queries, hidden = taps[f"layers.{index}.attention.query"], taps[f"layers.{index}.attention_norm"]
        for row, head in np.ndindex(len(tokens), KV_HEADS):
            columns = [column for column in range(tokens.shape[1]) if tokens[row, column] >= 0]
            assert layer.heads["count"][row, head] == len(columns)
            total = sum(hidden[row, column] for column in columns)
            assert drift(layer.heads["hidden"][row, head], total) <= EXACT
            for member in range(GROUP):
                total = sum(queries[row, column, head * GROUP + member] for column in columns)
                assert drift(layer.heads["queries"][row, head, member], total) <= EXACT


def moved(tokens: np.ndarray) -> np.ndarray:
    """The same rows padded on the left."""
    return np.stack([np.roll(row, int((row < 0).sum())) for row in tokens])


@every_backend
def test_the_stream_is_every_token_once(backend: str) -> None:
    """Un-rotated queries and inputs, right and left padding, and a chunked prompt with a chunk that a row lacks."""
    tokens, policy, model = prompts(LENGTHS), Summing(budget=7), hybrid(backend)
    taps = tapped(tokens)
    straight = begun(backend, policy)
    assert_summed(straight, taps, tokens)
    assert_same(straight, begun("reference", policy))
    _, left = model.step(moved(tokens), model.cache(policy, batch=3))
    assert_same(left, straight)
    chunks = [(tokens[:, :10], {"phase": "prefill", "evict": False}), (tokens[:, 10:], {"phase": "prefill"})]
    assert (tokens[2, 10:] < 0).all()
    chunked, _ = run(model, model.cache(policy, batch=3), chunks)
    assert_same(chunked, straight, 1e-11)


@every_backend
def test_a_long_prompt_streams_in_blocks(backend: str) -> None:
    lengths = (BLOCK + 34, 5, BLOCK + 21)
    tokens, policy = prompts(lengths), Summing(budget=7)
    cache = begun(backend, policy, 0, lengths)
    assert_summed(cache, tapped(tokens), tokens)
    assert_same(cache, begun("reference", policy, 0, lengths))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_head_remembers_lives_as_long_as_its_row(backend: str, tmp_path: Any) -> None:
    """Decode, fork, rows, save and restore; a silent row keeps its own bit for bit."""
    policy = Summing(budget=7)
    cache = begun(backend, policy)
    copy, three, picked = cache.fork(), cache.rows([1]).fork(rows=3), cache.rows([2, 0, 2])
    before = cache.snapshot()
    cache.save(tmp_path / "cache")
    cache = fed(backend, cache, range(4), silent=[1])
    expected = fed("reference", begun("reference", policy), range(4), silent=[1])
    assert_same(cache, expected)
    after = cache.snapshot()
    for old, new in zip(before.layers, after.layers, strict=True):
        for key in old.heads:
            assert (old.heads[key][1] == new.heads[key][1]).all()
            assert (old.heads[key][0] != new.heads[key][0]).any()
    for again in (copy, hybrid(backend).restore(tmp_path / "cache")):
        assert_same(fed(backend, again, range(4), silent=[1]), cache, 0 if again is copy else EXACT)
    for row in range(3):
        assert_same(three.rows([row]), begun("reference", policy).rows([1]))
    assert_same(picked, begun("reference", policy).rows([2, 0, 2]))


@every_backend
def test_head_memory_in_the_decode_loop(backend: str) -> None:
    """`Model.decode` ends in the memory that the same tokens give one by one; an inactive row keeps its own."""
    policy, model = Summing(budget=7), hybrid(backend)
    logits, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3))
    active = np.array([True, True, False])
    new, _, cache = model.decode(cache, logits[:, 0], Sampling(), [], 5, active=active)
    expected = begun("reference", policy)
    for step in range(5):
        _, expected = hybrid("reference").step(new[:, step : step + 1], expected)
    assert (new[2] == -1).all()
    assert_same(cache, expected)


@dataclass(frozen=True, kw_only=True)
class Counting(Policy):
    """Counts in whole numbers, which memory is not."""

    @property
    def needs(self) -> Needs:
        return Needs(stream=True)

    @property
    def memory(self) -> Mapping[str, float]:
        return {"age": 0.0}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"count": ()}

    def stream(self, view: View, block: Block) -> Mapping[str, Any]:
        xp = view.xp
        count = xp.sum(xp.astype(block.positions >= 0, xp.int32), axis=1, dtype=xp.int32)[:, None]
        return {**view.memory, "count": xp.astype(view.memory["count"], xp.int32) + count}

    def note(self, view: View) -> Mapping[str, Any]:
        return {**view.memory, "age": view.seen[:, None, None] - view.positions}

    def score(self, view: View) -> Any:
        return -view.memory["age"]


@every_backend
def test_memory_is_of_one_precision(backend: str) -> None:
    """Whole numbers that a policy returns become what memory is, in one block as in several."""
    lengths = (BLOCK + 34, 5, BLOCK + 21)
    cache = begun(backend, Counting(budget=4), 0, lengths)
    for layer in cache.snapshot().layers:
        assert layer.heads["count"].dtype == layer.memory["age"].dtype == np.float64
        assert layer.heads["count"].tolist() == [[length] * KV_HEADS for length in lengths]
        assert layer.memory["age"][:, 0].tolist() == [[4.0, 3.0, 2.0, 1.0]] * 3


# Budgets per head.


@dataclass(frozen=True, kw_only=True)
class Dividing(Policy):
    """The head with the larger summed score gets 3 tokens more, the other 3 fewer."""

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, values=True)

    @property
    def divides(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.xp.sum(view.keys * view.values, axis=-1)

    def budgets(self, view: View, scores: Any) -> Any:
        xp = view.xp
        total = xp.sum(xp.where(view.filled, scores, 0.0), axis=-1)
        richest = total == xp.max(total, axis=-1, keepdims=True)
        return view.budget + xp.astype(xp.where(richest, 3, -3), xp.int32)

    def most(self, budget: int, layer: int, spec: ModelSpec) -> int:
        return budget + 3


def chosen(decision: Decision, seen: Sequence[int], row: int, head: int, budget: int) -> list[int]:
    """The positions that the scores of a decision keep, by the rule, one head at a time."""
    window = (None, WINDOW)[decision.layer]
    positions, scores = decision.positions[row, head], decision.scores[row, head]
    living = [
        (scores[slot], position)
        for slot, position in enumerate(positions)
        if position >= 0 and (window is None or position > seen[row] - window)
    ]
    return sorted(int(position) for _, position in sorted(living)[-budget:])


def stepped(steps: int, lengths: Sequence[int] = LENGTHS) -> Calls:
    """The prompts and then single tokens."""
    return [(prompts(lengths), {})] + [(column(step, lengths), {}) for step in range(steps)]


@every_backend
def test_heads_keep_what_budgets_divides(backend: str) -> None:
    policy, model = Dividing(budget=6), hybrid(backend)
    cache, decisions = run(model, model.cache(policy, batch=3), stepped(3))
    given = set()
    for step, taken in enumerate(decisions):
        seen = [length + step for length in LENGTHS]
        for decision in taken:
            for row in range(3):
                total = [0.0, 0.0]
                for head, slot in np.ndindex(KV_HEADS, decision.positions.shape[-1]):
                    if decision.positions[row, head, slot] >= 0:
                        total[head] += decision.scores[row, head, slot]
                expected = [9, 3] if total[0] > total[1] else [3, 9]
                assert decision.budget[row].tolist() == expected
                given.add(tuple(expected))
                for head in range(KV_HEADS):
                    kept = chosen(decision, seen, row, head, expected[head])
                    assert held(decision.kept[row, head]) == kept
    assert given == {(9, 3), (3, 9)}
    assert [held(one) for one in cache.kept[0][0]] == [held(one) for one in decisions[-1][0].kept[0]]
    free = begun(backend, policy, 3)  # without decisions: the compiled step
    assert_same(free, begun("reference", policy, 3))
    assert_same(free, cache)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_forced_sets_of_other_sizes_per_head(backend: str) -> None:
    """What replay forces is kept, whatever the policy's own division, which is recorded."""
    policy = Dividing(budget=6)
    expected, right = run(hybrid("reference"), hybrid("reference").cache(policy, batch=3), stepped(3))
    calls = [
        (tokens, {"forced": [one.kept for one in taken]})
        for (tokens, _), taken in zip(stepped(3), right, strict=True)
    ]
    found, own = run(hybrid(backend), hybrid(backend).cache(policy, batch=3), calls)
    assert_same(found, expected)
    for ours, theirs in zip(own, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one.budget == other.budget).all()
    # The other head's sets are forced: the cache takes them, and the decision says what the policy itself chose.
    swapped = [one.kept[:, ::-1] for one in right[0]]
    model, taken = hybrid(backend), []
    _, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3), forced=swapped, decisions=taken)
    for kept, wanted, own_choice, decision in zip(cache.kept, swapped, taken, right[0], strict=True):
        for row, head in np.ndindex(3, KV_HEADS):
            assert held(kept[row, head]) == held(wanted[row, head])
            assert held(own_choice.kept[row, head]) == held(decision.kept[row, head])


@every_backend
def test_static_budgets_differ_by_head(backend: str, tmp_path: Any) -> None:
    policy = "h2o(budget=((3, 6), (5, 4)))"
    cache = begun(backend, policy, 3)
    for kept, budgets in zip(cache.kept, ((3, 6), (5, 4)), strict=True):
        assert ((kept >= 0).sum(-1) == np.array(budgets)).all()
    assert_same(cache, begun("reference", policy, 3))
    cache.save(tmp_path / "cache")
    again = hybrid(backend).restore(tmp_path / "cache")
    assert [one[0].tolist() for one in again.budgets] == [[3, 6], [5, 4]]
    assert_same(fed(backend, again.rows([2, 1, 0]).rows([2, 1, 0]), (3, 4)), begun("reference", policy, 5))
    with pytest.raises(
        KvtwinError, match="h2o.* has 3 budgets in layer 1; expected one, or one for each of 2"
    ):
        hybrid(backend).cache("h2o(budget=((3, 6), (5, 4, 4)))")


@dataclass(frozen=True, kw_only=True)
class Wrong(Policy):
    """`budgets` gives what this names."""

    gives: str = "float"

    @property
    def divides(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.positions

    def budgets(self, view: View, scores: Any) -> Any:
        xp = view.xp
        return {
            "float": lambda: xp.astype(view.budget, xp.float32),
            "number": lambda: 5,
            "raises": lambda: view.keys[0],
        }[self.gives]()


@every_backend
@pytest.mark.parametrize("gives", ["float", "number", "raises"])
def test_budgets_of_another_kind_are_refused(backend: str, gives: str) -> None:
    shape = r"\(1, 2\)" if backend == "reference" else r"\(3, 2\)"
    words = (
        "failed in budgets on"
        if gives == "raises"
        else f"budgets returned .*; expected int32 of shape {shape}"
    )
    with pytest.raises(KvtwinError, match=words):
        begun(backend, Wrong(budget=5, gives=gives))


# Budgets shared among layers.


@dataclass(frozen=True, kw_only=True)
class Allocating(Policy):
    """Layers share the budget by the mean length of their values, each at least 2; scores by position alone."""

    sinks: int = 1

    @property
    def allocates(self) -> bool:
        return True

    @property
    def order_free(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(values=True)

    def score(self, view: View) -> Any:
        return view.positions * 7 % 11

    def protected(self, view: View) -> Any:
        return view.filled & (view.positions < self.sinks)

    def protects(self, budget: int) -> int:
        return self.sinks

    def statistic(self, view: View) -> Any:
        xp = view.xp
        length = xp.sum(view.values * view.values, axis=-1)
        count = xp.sum(xp.astype(view.filled, length.dtype), axis=(1, 2))
        return xp.sum(xp.where(view.filled, length, 0.0), axis=(1, 2)) / count * (1 + view.layer)

    def allocate(self, statistics: np.ndarray, budgets: np.ndarray, seen: np.ndarray) -> np.ndarray:
        assert statistics.dtype == np.float64
        assert statistics.shape == budgets.shape == (2, len(seen))
        first = np.floor(budgets.sum(0) * statistics[0] / statistics.sum(0)).astype(np.int64)
        first = np.clip(first + seen % 3, 2, budgets.sum(0) - 2)
        return np.stack([first, budgets.sum(0) - first])


def shares(tokens: np.ndarray, budget: int) -> list[list[int]]:
    """The budgets of the two layers for each row, from the taps of one prefill."""
    taps, result = tapped(tokens), []
    for row in range(len(tokens)):
        columns = [column for column in range(tokens.shape[1]) if tokens[row, column] >= 0]
        means = []
        for layer in range(2):
            values = taps[f"layers.{layer}.attention.value"][row]
            lengths = [
                float(values[column, head] @ values[column, head]) for column in columns for head in range(2)
            ]
            means.append(sum(lengths) / len(lengths) * (1 + layer))
        first = int(2 * budget * means[0] / (means[0] + means[1])) + len(columns) % 3
        first = min(max(first, 2), 2 * budget - 2)
        result.append([first, 2 * budget - first])
    return result


@every_backend
def test_layers_get_what_allocate_gives_them(backend: str, tmp_path: Any) -> None:
    """Rows differ and equal each alone; decode, save and restore go on under the same budgets."""
    policy, model = Allocating(budget=5), hybrid(backend)
    expected = shares(prompts(LENGTHS), 5)
    assert len({tuple(row) for row in expected}) > 1
    cache = begun(backend, policy)
    assert_same(cache, begun("reference", policy))
    for step in (0, 1, 2, 4):
        cache = fed(backend, cache, range(int(cache.seen[0]) - LENGTHS[0], step))
        for index, kept in enumerate(cache.kept):
            assert cache.budgets[index].tolist() == [[row[index]] * KV_HEADS for row in expected]
            for row, length in enumerate(LENGTHS):
                most = min(expected[row][index], length + step, (10**6, WINDOW - 1)[index])
                assert [len(held(one)) for one in kept[row]] == [most] * KV_HEADS
        if step == 1:
            cache.save(tmp_path / "cache")
    assert_same(cache, begun("reference", policy, 4))
    assert_same(fed(backend, model.restore(tmp_path / "cache"), (1, 2, 3)), cache)
    for row in range(3):
        _, alone = model.step(prompts(LENGTHS)[row : row + 1], model.cache(policy), logits=None)
        assert_same(alone, begun(backend, policy).rows([row]))


@dataclass(frozen=True, kw_only=True)
class Plain(Policy):
    """The newest; promises what `flags` name and says nothing of how."""

    flags: tuple[str, ...] = ()

    allocates = property(lambda self: "allocates" in self.flags)
    merges = property(lambda self: "merges" in self.flags)
    needs = Needs(keys=True, values=True)

    def score(self, view: View) -> Any:
        return view.positions


@every_backend
def test_what_a_policy_leaves_out_changes_nothing(backend: str) -> None:
    """By default layers are alike and keep their own budget, and what stays is not blended with anything."""
    plain = Plain(budget=(5, 9), interval=2)
    for flag in ("allocates", "merges"):
        assert_same(
            begun(backend, Plain(budget=plain.budget, interval=2, flags=(flag,)), 3), begun(backend, plain, 3)
        )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_forced_sets_may_be_as_large_as_what_is_allocated(backend: str) -> None:
    """Which is more than the policy's own budget; nothing above it."""
    policy, model, tokens = Allocating(budget=5), hybrid(backend), prompts(LENGTHS)
    largest = max(max(row) for row in shares(tokens, 5))
    newest = np.array([[range(length - largest, length)] * KV_HEADS for length in LENGTHS], np.int32)
    share = np.array(shares(tokens, 5))
    forced = [
        np.where(np.arange(largest) >= largest - share[:, index, None, None], newest, -1) for index in (0, 1)
    ]
    forced[1] = np.where(newest >= np.array(LENGTHS)[:, None, None] - WINDOW + 1, forced[1], -1)
    _, cache = model.step(tokens, model.cache(policy, batch=3), logits=None, forced=forced)
    for kept, wanted in zip(cache.kept, forced, strict=True):
        for ours, right in zip(kept.reshape(-1, kept.shape[-1]), wanted.reshape(-1, largest), strict=True):
            assert held(ours) == held(right)
    assert largest > 5
    forced[0] = np.array([[range(13)] * KV_HEADS] * 3, np.int32)
    with pytest.raises(KvtwinError, match=f"13 tokens; expected at most {share[:, 0].max()}"):
        model.step(tokens, model.cache(policy, batch=3), logits=None, forced=forced)


@every_backend
def test_a_chunked_prompt_is_allocated_at_its_end(backend: str) -> None:
    """Also where the decode loop, or a decode step, ends the prompt; and again where a second prompt follows."""
    policy, model, tokens = Allocating(budget=5), hybrid(backend), prompts(LENGTHS)
    waiting = begun(backend, policy, evict=False)
    assert waiting.pending
    assert all((budget == 5).all() for budget in waiting.budgets)
    right = begun("reference", policy)
    new, _, looped = model.decode(waiting.fork(), np.zeros((3, 701)), Sampling(), [], 2)
    for step in range(2):
        _, right = hybrid("reference").step(new[:, step : step + 1], right)
    assert_same(looped, right)
    more = np.concatenate([column(step, LENGTHS) for step in range(3)], axis=1)
    _, found = model.step(more, waiting.fork(), logits=None)
    _, right = hybrid("reference").step(more, begun("reference", policy, evict=False), logits=None)
    assert_same(found, right)
    both = np.concatenate([tokens, more], axis=1)
    assert [one[:, 0].tolist() for one in found.budgets] == np.transpose(shares(both, 5)).tolist()


@flax_later
def test_a_second_prompt_is_allocated_from_the_policys_own_budget(backend: str) -> None:
    model, policy = hybrid(backend), Growing(budget=5)
    cache = begun(backend, policy)
    for _ in range(2):
        assert [one.tolist() for one in cache.budgets] == [[[6, 6]] * 3, [[4, 4]] * 3]
        _, cache = model.step(column(0, LENGTHS), cache, logits=None, phase="prefill")


@dataclass(frozen=True, kw_only=True)
class Growing(Policy):
    """Moves one token from the second layer to the first, at each prompt."""

    @property
    def allocates(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        return view.positions

    def statistic(self, view: View) -> Any:
        return view.xp.astype(view.seen, view.xp.float32)

    def allocate(self, statistics: np.ndarray, budgets: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return budgets + np.array([[1], [-1]])


@dataclass(frozen=True, kw_only=True)
class Misallocating(Growing):
    """`allocate` or `statistic` gives what this names."""

    gives: str = "float"

    def protects(self, budget: int) -> int:
        return 3

    def statistic(self, view: View) -> Any:
        if self.gives == "statistic":
            return view.positions
        return view.seen

    def allocate(self, statistics: np.ndarray, budgets: np.ndarray, seen: np.ndarray) -> Any:
        return {
            "float": lambda: budgets * 1.0,
            "rows": lambda: budgets[:, :1],
            "list": lambda: [4, 4],
            "zero": lambda: budgets * 0,
            "few": lambda: np.full_like(budgets, 2),
            "raises": lambda: budgets[7],
        }[self.gives]()


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        ("float", r"allocate returned float64 of shape \(2, 3\).*expected integers of shape \(2, 3\)"),
        ("rows", r"allocate returned int\d+ of shape \(2, 1\).*expected integers of shape \(2, 3\)"),
        ("list", r"allocate returned int\d+ of shape \(2,\).*expected integers of shape \(2, 3\)"),
        ("zero", r"allocate gave a head of layer 0 0 tokens; expected at least 3"),
        ("few", r"allocate gave a head of layer 0 2 tokens; expected at least 3: what it protects"),
        ("raises", r"failed in allocate.*IndexError"),
        ("statistic", r"statistic returned .*expected shape \(\d,\): one number per row"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_allocate_may_not_give_is_refused(backend: str, gives: str, words: str) -> None:
    with pytest.raises(KvtwinError, match=rf"policy tests\.test_hooks:Misallocating\(.*{words}"):
        begun(backend, Misallocating(budget=5, gives=gives))


@pytest.mark.parametrize(
    ("gives", "words"), [("statistic", "statistic returned .*one number per row"), ("zero", "allocate gave")]
)
def test_the_same_where_it_is_compiled(gives: str, words: str) -> None:
    with pytest.raises(KvtwinError, match=words):
        begun("flax", Misallocating(budget=5, gives=gives))


# Merging.


@dataclass(frozen=True, kw_only=True)
class Merging(Policy):
    """The oldest token that stays takes in the values of all that go; the keys of all that stay grow a little.

    Each head remembers how many went, of earlier ones half.
    """

    @property
    def merges(self) -> bool:
        return True

    @property
    def order_free(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, values=True)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"gone": (2,), "calls": ()}

    def note(self, view: View) -> Mapping[str, Any]:
        return {**view.memory, "calls": view.memory["calls"] + 1.0}

    def score(self, view: View) -> Any:
        return view.positions * 7 % 11

    def merge(self, view: View, index: Any) -> tuple[Any, Any, Any]:
        xp = view.xp
        slots = xp.arange(view.positions.shape[-1], dtype=index.dtype, device=device(index))
        stays = xp.any(index[..., None] == slots, axis=2)
        gone = view.filled & ~stays
        total = xp.sum(xp.where(gone[..., None], view.values, 0.0), axis=2, keepdims=True)
        first = xp.arange(index.shape[-1], dtype=index.dtype, device=device(index)) == 0
        keys, values = (take_slots(xp, x, index) for x in (view.keys, view.values))
        count = xp.sum(xp.astype(gone, values.dtype), axis=2)
        count = xp.stack([count, view.memory["calls"]], axis=-1)
        went = 0.5 * view.memory["gone"] + count
        return keys * 1.0625, xp.where(first[:, None], values + total, values), {"gone": went}


def evicting(backend: str, cache: Cache, step: int) -> tuple[Any, Cache, Any]:
    """Each layer after a decode step that held its eviction back, the cache after the same step, and its decisions."""
    model, decisions = hybrid(backend), []
    _, before = model.step(column(step, LENGTHS), cache.fork(), evict=False)
    _, after = model.step(column(step, LENGTHS), cache, decisions=decisions)
    return before.snapshot().layers, after, decisions


def test_the_reference_merges_what_goes() -> None:
    policy, model = Merging(budget=5), hybrid("reference")
    cache = model.cache(policy, batch=3)
    _, held_back = model.step(prompts(LENGTHS), cache.fork(), evict=False)
    layers = held_back.snapshot().layers
    _, cache = model.step(prompts(LENGTHS), cache)
    went: dict[Any, Any] = {}
    for step in range(4):
        for layer, (old, new) in enumerate(zip(layers, cache.snapshot().layers, strict=True)):
            for row, head in np.ndindex(3, KV_HEADS):
                place = layer, row, head
                was, now = held(old.positions[row, head]), held(new.positions[row, head])
                keys, values = (old.streams[key][row, head] for key in ("keys", "values"))
                going = sum((values[slot] for slot, at in enumerate(was) if at not in now), np.zeros(8))
                assert len(was) > len(now)
                went[place] = [
                    one / 2 + two
                    for one, two in zip(went.get(place, (0, 0)), (len(was) - len(now), step + 1), strict=True)
                ]
                assert new.heads["gone"][row, head].tolist() == went[place]
                for slot, position in enumerate(now):
                    source = was.index(position)
                    assert drift(new.streams["keys"][row, head, slot], keys[source] * 1.0625) <= EXACT
                    expected = values[source] + (going if slot == 0 else 0)
                    assert drift(new.streams["values"][row, head, slot], expected) <= EXACT
        layers, cache, _ = evicting("reference", cache, step)


@pytest.mark.parametrize(
    ("backend", "interval"),
    [("torch", 1), ("torch", 2), pytest.param("flax", 1, marks=pytest.mark.slow), ("flax", 2)],
)
def test_merging_is_that_of_the_reference(backend: str, interval: int) -> None:
    """A row without a token stays bit for bit, though merging would change it; then the decode loop goes on."""
    policy = Merging(budget=5, interval=interval)
    found, expected = begun(backend, policy), begun("reference", policy)
    assert_same(found, expected)
    before = found.rows([1])
    found, expected = (
        fed(one, cache, range(4), silent=[1]) for one, cache in ((backend, found), ("reference", expected))
    )
    for one, other in zip(found.rows([1]).snapshot().layers, before.snapshot().layers, strict=True):
        for key in other.streams:
            assert one.streams[key].tobytes() == other.streams[key].tobytes()
        for key in other.heads:
            assert one.heads[key].tobytes() == other.heads[key].tobytes()
    assert_same(found, expected)
    if interval == 1:
        return
    active = np.array([True, False, True])
    logits = np.random.default_rng(2).standard_normal((3, 701))
    new, _, found = hybrid(backend).decode(found, logits, Sampling(), [], 5, active=active)
    same, _, expected = hybrid("reference").decode(expected, logits, Sampling(), [], 5, active=active)
    assert new.tolist() == same.tolist()
    assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_what_a_decision_says_of_a_silent_row(backend: str) -> None:
    """It kept all its tokens."""
    policy = Merging(budget=5, interval=2)
    calls = [(prompts(LENGTHS), {})]
    for step in range(4):
        tokens = column(step, LENGTHS)
        tokens[1] = -1 if step == 3 else tokens[1]
        calls.append((tokens, {}))
    expected, right = run(hybrid("reference"), hybrid("reference").cache(policy, batch=3), calls)
    found, own = run(hybrid(backend), hybrid(backend).cache(policy, batch=3), calls)
    assert_same(found, expected)
    for ours, theirs in zip(own, right, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            for place in np.ndindex(3, KV_HEADS):
                assert held(one.kept[place]) == held(other.kept[place])
    assert len(held(right[-1][0].kept[1, 0])) == 6


@dataclass(frozen=True, kw_only=True)
class Mismerging(Merging):
    """`merge` gives what this names."""

    gives: str = "one"

    @property
    def memory(self) -> Mapping[str, float]:
        return {"mass": 0.0}

    def merge(self, view: View, index: Any) -> Any:
        keys, values, memory = super().merge(view, index)
        return {
            "one": keys,
            "pair": (keys, values),
            "slots": (view.keys, view.values, memory),
            "neither": 7,
            "list": (keys, values, [memory["gone"]]),
            "other": (keys, values, {"went": memory["gone"]}),
            "shape": (keys, values, {"gone": memory["gone"][..., 0]}),
            "per slot": (keys, values, {"mass": view.memory["mass"]}),
            "number": (keys, values, {"gone": 7}),
        }[self.gives]


WRONG = ["one", "pair", "slots", "neither", "list", "other", "shape", "per slot", "number"]


@pytest.mark.parametrize("gives", WRONG)
def test_merges_of_another_kind_are_refused(gives: str) -> None:
    words = r"merge returned .*expected keys and values of shape .* head memory \{'gone': \(\d, 2, 2\)"
    for backend in ("reference", "torch"):
        with pytest.raises(KvtwinError, match=words):
            begun(backend, Mismerging(budget=5, gives=gives))


@dataclass(frozen=True, kw_only=True)
class Merger(Wrapper):
    """Remembers, beside what is inside, whether it did; the memory of those inside goes on."""

    own = ("outer",)

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {**self.policy.head_memory(layer), "outer": ()}

    def merge(self, view: View, index: Any) -> Any:
        keys, values, memory = super().merge(view, index)
        return keys, values, {**memory, "outer": view.memory["outer"] + 1.0}


@flax_later
def test_what_merging_remembers_is_passed_on_and_carried(backend: str, tmp_path: Path) -> None:
    """Through a wrapper and policies side by side; forked, saved and restored; a row alone is what it is in a batch."""
    turns = PrefillDecode(prefill=Merging(), decode=Merger(policy=Merging()), budget=5)
    plain = begun(backend, Merging(budget=5), 3)
    cache = begun(backend, turns, 3)
    for one, other in zip(cache.snapshot().layers, plain.snapshot().layers, strict=True):
        assert drift(one.streams["values"], other.streams["values"]) <= EXACT
        first, then = one.heads["prefill_gone"], one.heads["decode_gone"]
        assert (one.heads["decode_outer"] == 3).all()
        assert first[..., 1].tolist() == [[1.0] * KV_HEADS] * 3
        assert (then[..., 1] == 4 + 3 / 2 + 2 / 4).all()
        assert np.array_equal(other.heads["gone"], first / 8 + then)
    path = tmp_path / "cache"
    cache.save(path)
    forked, restored = cache.fork(), hybrid(backend).restore(path)
    assert_same(restored, forked)
    forked, restored = fed(backend, forked, [3, 4]), fed(backend, restored, [3, 4])
    assert_same(restored, forked)
    assert_same(cache, begun(backend, turns, 3))


# Second passes.


@dataclass(frozen=True, kw_only=True)
class Rereading(Policy):
    """Scores by the attention that passes gave; counts what was read in passes, what came otherwise, and calls."""

    free: bool = False

    @property
    def order_free(self) -> bool:
        return self.free

    @property
    def needs(self) -> Needs:
        return Needs(sums=True, queries=2, stream=True)

    @property
    def memory(self) -> Mapping[str, float]:
        return {"heard": 0.0}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"told": (), "read": (), "calls": ()}

    def stream(self, view: View, block: Block) -> Mapping[str, Any]:
        xp, key = view.xp, "read" if view.phase == "pass" else "told"
        count = xp.sum(xp.astype(block.positions >= 0, view.memory[key].dtype), axis=1)
        return {**view.memory, key: view.memory[key] + count[:, None]}

    def note(self, view: View) -> Mapping[str, Any]:
        counted = {**view.memory, "calls": view.memory["calls"] + 1.0}
        if view.phase != "pass":
            return counted
        return {**counted, "heard": view.memory["heard"] + view.sums}

    def score(self, view: View) -> Any:
        return view.memory["heard"]

    def passes(self, prompt: Sequence[int], encode: Callable[[str], list[int]]) -> list[list[int]]:
        assert all(type(token) is int for token in prompt)
        first = [*encode("ab"), *prompt[:3]]
        return [first, prompt[2:4]] if len(prompt) > 10 else [first[:2]]


def heard(prompt: list[int], read: list[list[int]]) -> np.ndarray:
    """What the prompt's tokens receive from the queries of each pass, [layers kv_heads tokens], by loops over taps."""
    result = np.zeros((2, KV_HEADS, len(prompt)))
    for part in read:
        taps = tapped(np.array([prompt + part], np.int32))
        for layer, window in enumerate((None, WINDOW)):
            queries, keys = (taps[f"layers.{layer}.attention.{key}_rotated"][0] for key in ("query", "key"))
            for head, query in np.ndindex(KV_HEADS * GROUP, len(part)):
                at, weights = len(prompt) + query, {}
                for position in range(at + 1):
                    if window is None or at - position < window:
                        logit = queries[at, head] @ keys[position, head // GROUP] * 8**-0.5
                        weights[position] = np.exp(logit)
                for position, weight in weights.items():
                    if position < len(prompt):
                        share = weight / sum(weights.values()) / GROUP
                        result[layer, head // GROUP, position] += share
    return result


@every_backend
def test_passes_are_read_before_the_prompt_is_evicted(backend: str) -> None:
    """They leave attention behind and nothing else; the last row has one pass where the others have two."""
    policy, model = Rereading(budget=5), hybrid(backend)
    rows = [texts(3)[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    encode = model.tokenizer.encode
    cache, logits = prefill(model, rows, None, policy, "full()", 3, None, "prompt")
    plain, _ = model.step(prompts(LENGTHS), model.cache(policy, batch=3))
    assert drift(logits, plain[:, 0]) == 0
    assert cache.seen.tolist() == list(LENGTHS)
    shot = cache.snapshot()
    for row, prompt in enumerate(rows):
        read = policy.passes(prompt, encode)
        assert len(read) == (1 if row == 2 else 2)
        right = heard(prompt, read)
        for index, window in enumerate((None, WINDOW)):
            layer = shot.layers[index]
            assert (layer.heads["read"][row] == sum(map(len, read))).all()
            assert (layer.heads["told"][row] == len(prompt)).all()
            assert (layer.heads["calls"][row] == 1 + len(read)).all()
            assert layer.query_positions[row].tolist() == [len(prompt) - 2, len(prompt) - 1]
            for head in range(KV_HEADS):
                living = [p for p in range(len(prompt)) if window is None or p > len(prompt) - window]
                best = sorted(sorted(living, key=lambda p: (right[index, head, p], p))[-5:])
                assert held(layer.positions[row, head]) == best
                assert drift(layer.memory["heard"][row, head], right[index, head, best]) <= EXACT
    assert_same(cache, prefill(hybrid("reference"), rows, None, policy, "full()", 3, None, "prompt")[0])
    with pytest.raises(
        KvtwinError, match=r"Rereading.* reads the whole prompt a second time; expected evict="
    ):
        prefill(model, rows, None, policy, "full()", 3, 4, "chunk")


@flax_later
def test_generate_goes_on_after_passes(backend: str) -> None:
    rows = [texts(3)[row, :length].tolist() for row, length in enumerate(LENGTHS)]
    found = hybrid(backend).generate(rows, policy=Rereading(budget=5), max_new_tokens=4, stop=[], chunk=6)
    expected = hybrid("reference").generate(
        rows, policy=Rereading(budget=5), max_new_tokens=4, stop=[], chunk=6
    )
    assert found.tokens == expected.tokens
    assert_same(found.cache, expected.cache, 1e-11)


@pytest.mark.parametrize(
    "policy",
    [Rereading(budget=5, interval=3), Rereading(budget=5, free=True)],
    ids=["interval", "overwriting"],
)
@every_backend
def test_what_is_read_leaves_no_tokens(backend: str, policy: Rereading) -> None:
    """In the midst of decode: tokens, keys, values and queries stay, and evictions fall due as before."""
    cache = begun(backend, policy, 4)
    assert cache.steps == (4 if policy.interval == 3 else 0)
    before, singles = cache.fork(), cache.singles
    part = np.array([[5, 6, 7], [8, -1, -1], [-1, -1, -1]], np.int32)
    after = hybrid(backend).read(part, cache)
    assert (after.steps, after.singles, after.pending) == (before.steps, singles, False)
    with pytest.raises(KvtwinError, match="consumed"):
        len(cache.seen)
    assert snapshot_drift(after.rows([2]), before.rows([2])) == 0
    for old, new in zip(before.snapshot().layers, after.snapshot().layers, strict=True):
        assert (old.positions == new.positions).all()
        assert (old.query_positions == new.query_positions).all()
        assert (old.queries == new.queries).all()
        assert all((old.streams[key] == new.streams[key]).all() for key in old.streams)
        for row, count in enumerate((3, 1, 0)):
            assert (new.heads["read"][row] == count).all()
            assert (new.heads["calls"][row] == old.heads["calls"][row] + (count > 0)).all()
            changed = new.memory["heard"][row] != old.memory["heard"][row]
            assert changed.any() == (count > 0)
    right = hybrid("reference").read(part, begun("reference", policy, 4))
    assert_same(fed(backend, after, range(4, 8)), fed("reference", right, range(4, 8)))


# Constants, the output projection, and rotations beyond the tokens seen.


@dataclass(frozen=True, kw_only=True)
class Weighted(Policy):
    """Scores by arrays of its own, which come in another precision than the model's."""

    broken: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(keys=True)

    def constants(self, spec: ModelSpec) -> Mapping[str, np.ndarray]:
        if self.broken:
            raise KvtwinError("no weights were trained for this model")
        weight = np.random.default_rng(8).standard_normal((len(spec.layers), KV_HEADS, 8))
        return {"weight": weight.astype(np.float32), "turn": np.array([3, 5])}

    def score(self, view: View) -> Any:
        xp, constants = view.xp, view.constants
        assert constants["weight"].dtype == constants["turn"].dtype == view.keys.dtype
        weight = constants["weight"][view.layer, ...][None, :, None, :]
        return xp.sum(view.keys * weight, axis=-1) * constants["turn"][view.layer]


@every_backend
def test_constants_reach_the_score(backend: str) -> None:
    policy, model, decisions = Weighted(budget=5), hybrid(backend), []
    taps = tapped(prompts(LENGTHS))
    _, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3), decisions=decisions)
    weight = np.random.default_rng(8).standard_normal((2, KV_HEADS, 8)).astype(np.float32)
    for decision in decisions:
        keys = taps[f"layers.{decision.layer}.attention.key_rotated"]
        for row, head in np.ndindex(3, KV_HEADS):
            for slot in range(LENGTHS[row]):
                right = float(keys[row, slot, head] @ weight[decision.layer, head]) * (3, 5)[decision.layer]
                assert decision.scores[row, head, slot] == pytest.approx(right, rel=1e-11, abs=1e-11)
    assert_same(fed(backend, cache, range(2)), begun("reference", policy, 2))
    assert_same(
        fed(backend, begun(backend, policy).rows([2, 0, 1]).rows([1, 2, 0]), range(2)),
        begun("reference", policy, 2),
    )
    with pytest.raises(KvtwinError, match="no weights were trained for this model"):
        model.cache(Weighted(budget=5, broken=True))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_constants_come_in_the_precision_of_the_view(backend: str) -> None:
    model = hybrid(backend, "float32")
    _, cache = model.step(prompts(LENGTHS), model.cache(Weighted(budget=5), batch=3))
    assert [one.shape for one in cache.kept] == [(3, 2, 5)] * 2


@dataclass(frozen=True, kw_only=True)
class Loud(Policy):
    """Scores by what a slot adds to the layer's output through the query heads of its group, the second twice."""

    @property
    def needs(self) -> Needs:
        return Needs(values=True, output=True)

    @property
    def order_free(self) -> bool:
        return True

    def score(self, view: View) -> Any:
        norms = view.output_norm(view.values)
        return view.xp.sum(norms, axis=2) + norms[:, :, 1, :]


@every_backend
def test_output_norms_go_through_the_layers_own_projection(backend: str) -> None:
    policy, model, decisions = Loud(budget=5), hybrid(backend), []
    taps, weights = tapped(prompts(LENGTHS)), hybrid_weights()
    _, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3), decisions=decisions)
    for decision in decisions:
        output = weights[f"layers.{decision.layer}.attention.output.weight"].astype(np.float64)
        values = taps[f"layers.{decision.layer}.attention.value"]
        for row, head in np.ndindex(3, KV_HEADS):
            for slot in range(LENGTHS[row]):
                right = 0.0
                for member in range(GROUP):
                    columns = slice((head * GROUP + member) * 8, (head * GROUP + member + 1) * 8)
                    norm = float(np.abs(output[:, columns] @ values[row, slot, head]).sum())
                    right += norm * (2 if member == 1 else 1)
                assert decision.scores[row, head, slot] == pytest.approx(right, rel=1e-11)
    assert_same(fed(backend, cache, range(2)), begun("reference", policy, 2))


@dataclass(frozen=True, kw_only=True)
class Ahead(Policy):
    """Scores by the sum of the key rotated to a place that no token has reached."""

    far: int = 4

    @property
    def needs(self) -> Needs:
        return Needs(keys=True, ahead=self.far)

    def score(self, view: View) -> Any:
        xp = view.xp
        place = xp.broadcast_to((view.seen + (self.far - 1))[:, None, None], tuple(view.positions.shape))
        return xp.sum(view.rotate(view.unrotated(), place), axis=-1)


@pytest.mark.parametrize(
    ("backend", "far"),
    [
        *((backend, far) for backend in BACKENDS[:2] for far in (4, 1500)),
        ("flax", 1500),
        pytest.param("flax", 4, marks=pytest.mark.slow),
    ],
)
def test_rotations_ahead_of_the_tokens_seen(backend: str, far: int) -> None:
    """The farther one is beyond the table that a short text has."""
    policy, model, decisions = Ahead(budget=5, far=far), hybrid(backend), []
    taps = tapped(prompts(LENGTHS))
    _, cache = model.step(prompts(LENGTHS), model.cache(policy, batch=3), decisions=decisions)
    for decision in decisions:
        keys = taps[f"layers.{decision.layer}.attention.key"]
        for row, head in np.ndindex(3, KV_HEADS):
            for slot in range(LENGTHS[row]):
                key, place, right = keys[row, slot, head], LENGTHS[row] + far - 1, 0.0
                for channel in range(4):
                    angle = place * 500.0 ** (-channel / 4)
                    right += key[channel] * np.cos(angle) - key[channel + 4] * np.sin(angle)
                    right += key[channel + 4] * np.cos(angle) + key[channel] * np.sin(angle)
                assert decision.scores[row, head, slot] == pytest.approx(right, rel=1e-9, abs=1e-9)
    if far > 1024:
        assert_same(fed(backend, cache, range(2)), begun("reference", policy, 2))


# Keys rotated by rank.


@dataclass(frozen=True, kw_only=True)
class Closing(Policy):
    """Closes positions up, and scores by the attention of the newest queries."""

    @property
    def repositions(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs(queries=3)

    def score(self, view: View) -> Any:
        return view.xp.mean(view.attention(), axis=(2, 3))


def turned(x: np.ndarray, place: int) -> np.ndarray:
    """A vector of 8 channels rotated to a place, theta 500."""
    result = x.copy()
    for channel in range(4):
        angle = place * 500.0 ** (-channel / 4)
        a, b = x[channel], x[channel + 4]
        result[channel] = a * np.cos(angle) - b * np.sin(angle)
        result[channel + 4] = b * np.cos(angle) + a * np.sin(angle)
    return result


@every_backend
def test_queries_and_keys_rotated_by_rank(backend: str) -> None:
    """Scores of decode steps from the un-rotated keys and queries that the cache held just before it evicted."""
    policy = Closing(budget=6)
    cache = begun(backend, policy)
    for step in range(3):
        if backend == "flax":
            cache = fed(backend, cache, [step])
            continue
        layers, cache, decisions = evicting(backend, cache, step)
        for decision, layer in zip(decisions, layers, strict=True):
            window = (None, WINDOW)[decision.layer]
            assert any((layer.positions[0, 0, 1:7] - layer.positions[0, 0, :6]) > 1)
            for row, head in np.ndindex(3, KV_HEADS):
                own, right = held(layer.positions[row, head]), {}
                keys = layer.streams["keys"][row, head]
                for member, asked in np.ndindex(GROUP, 3):
                    at = int(layer.query_positions[row, asked])
                    place = sum(position <= at for position in own) - 1
                    query = turned(layer.queries[row, head, member, asked], place)
                    weights = {
                        position: np.exp(turned(keys[rank], rank) @ query * 8**-0.5)
                        for rank, position in enumerate(own)
                        if position <= at and (window is None or at - position < window)
                    }
                    for position, weight in weights.items():
                        right[position] = right.get(position, 0) + weight / sum(weights.values()) / GROUP / 3
                for slot, position in enumerate(own):
                    assert decision.scores[row, head, slot] == pytest.approx(
                        right.get(position, 0), rel=1e-10
                    )
    assert_same(cache, begun("reference", policy, 3))


# What excludes each other.


@dataclass(frozen=True, kw_only=True)
class Clashing(Merging):
    """Promises what `flags` names."""

    flags: tuple[str, ...] = ()

    shared = property(lambda self: "shared" in self.flags)
    divides = property(lambda self: "divides" in self.flags)
    allocates = property(lambda self: "allocates" in self.flags)
    repositions = property(lambda self: "repositions" in self.flags)
    merges = property(lambda self: "merges" in self.flags or "blind" in self.flags)

    @property
    def needs(self) -> Needs:
        values = "blind" not in self.flags
        return Needs(
            keys=True, values=values, tokens="tokens" in self.flags, ahead=2 * ("ahead" in self.flags)
        )

    @property
    def memory(self) -> Mapping[str, float]:
        return {"tokens": 0.0} if "slot tokens" in self.flags else {"mass": 0.0}

    def head_memory(self, layer: Layer) -> Mapping[str, tuple[int, ...]]:
        return {"twice": {"mass": ()}, "head tokens": {"tokens": ()}}.get(self.flags[-1], {})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("shared", "divides"), "keeps one set for all heads and divides budgets among them"),
        (("allocates", "divides"), "allocates budgets to layers and divides them among heads"),
        (("repositions", "merges"), "repositions and merges keys"),
        (("repositions", "ahead"), "repositions and looks ahead of the tokens' own positions"),
        (("twice",), "has two memories called 'mass'"),
        (("tokens", "slot tokens"), "a memory called 'tokens'"),
        (("slot tokens",), "a memory called 'tokens'"),
        (("tokens", "head tokens"), "has two memories called 'tokens'"),
        (("blind",), "merges; expected its needs to name keys and values"),
    ],
)
def test_promises_that_exclude_each_other_are_refused(flags: tuple[str, ...], words: str) -> None:
    for backend in BACKENDS:
        with pytest.raises(KvtwinError, match=f"policy tests.test_hooks:Clashing.*{words}"):
            hybrid(backend).cache(Clashing(budget=5, flags=flags))


def test_a_budget_for_each_head_is_not_shared_among_layers() -> None:
    with pytest.raises(KvtwinError, match="allocates budgets to layers and has a budget for each head"):
        hybrid("reference").cache(Growing(budget=((3, 4), 5)))
