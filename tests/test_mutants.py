"""The suite's own teeth: deliberate faults in one backend, each with the check that must see it.

Every check passes without the fault. A fault is patched into one backend only, also where the rule is shared.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat.torch
import jax.numpy
import numpy as np
import pytest

import backends.flax.layer
import backends.torch.attention
import backends.torch.layer
import backends.torch.mixing
import backends.torch.model
import backends.torch.rope
from backends import backends as known
from backends.flax import decode as compiled
from backends.flax.cache import FlaxCache
from backends.torch.cache import TorchCache
from backends.torch.layer import LayerCache
from experiments.compare import Trace, free_run, run, same_sets
from framework import eviction as rule
from framework.backend import Model
from framework.cache import Cache
from framework.compare import SWAPS, TOLERANCE, drift, kept_agreement, tap_drifts, token_agreement
from framework.errors import KvtwinError
from framework.snapshot import Snapshot
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights

# 3 rows, 13 tokens with padding on the right, on the left and inside; 2 kv heads in 3 groups, head_dim 4, 5 steps.
PROMPT = np.random.default_rng(1).integers(0, 37, (3, 13), dtype=np.int32)
PROMPT[0, 10:] = PROMPT[1, :4] = PROMPT[1, 6] = -1
STEPS = 5
FULL = Layer(heads=6, kv_heads=2, head_dim=4, scale=0.5, rope=Rope(theta=300.0, dim=4))
SPEC = ModelSpec(
    family="mistral",
    vocab=37,
    dim=22,
    ffn=26,
    layers=(FULL, replace(FULL, window=8)),
    norm_eps=1e-5,
    positions=512,
)
EXACT = TOLERANCE["float64"]


def build(backend: str) -> Model:
    """A model of its own, so that nothing compiled or tabled outlives the patch."""
    compiled.interned.cache_clear()  # a fault is compiled, and forgotten, with its model
    return known.get(backend).build(SPEC, random_weights(SPEC, 2), dtype="float64")


@functools.cache
def reference(policy: str) -> Trace:
    """What is right."""
    return run(build("reference"), PROMPT, policy, STEPS)


# The checks: each gives "" where all is well, and otherwise what it saw.


def taps(backend: str, policy: str) -> str:
    """The first value inside the model that drifts, led along the reference's kept sets."""
    right = reference(policy)
    found = run(build(backend), PROMPT, policy, STEPS, along=right)
    for call, expected in right.taps.items():
        for tap in tap_drifts(found.taps[call], expected):
            if not tap.drift <= EXACT:
                return f"{call}: {tap.name}"
    return ""


def kept(backend: str, policy: str) -> str:
    """The backend's own decisions, led along the reference's."""
    right = reference(policy)
    try:
        found = run(build(backend), PROMPT, policy, STEPS, along=right, watch=False)
    except KvtwinError as error:  # the reference's sets do not fit into its cache
        return str(error)
    agreement = kept_agreement(found.decisions, right.decisions, EXACT)
    return "" if agreement.within(SWAPS["float64"]) else str(agreement.mismatches[0])


def scores(backend: str, policy: str) -> str:
    """The numbers behind the decisions."""
    right = reference(policy)
    found = run(build(backend), PROMPT, policy, STEPS, along=right, watch=False)
    apart = kept_agreement(found.decisions, right.decisions, EXACT).score_drift
    return "" if apart <= EXACT else f"scores drift by {apart:.1e}"


def free(backend: str, policy: str) -> str:
    """Tokens, kept sets and logits of the backend's own decode loop."""
    right = reference(policy)
    tokens, logits, held = free_run(build(backend), PROMPT, policy, STEPS)
    same, total = same_sets(held, right.kept)
    if same < total:
        return f"kept sets: {same} of {total} equal"
    if not token_agreement(tokens, right.fed, np.stack(right.logits[:-1], axis=1)).within(EXACT):
        return "tokens"
    return "" if drift(logits, right.logits[-1]) <= EXACT else "logits"


def prefilled(model: Model, policy: str) -> Cache:
    return model.step(PROMPT, model.cache(policy, batch=3), logits=None)[1]


def same_streams(found: Snapshot, expected: Snapshot) -> bool:
    pairs = zip(found.layers, expected.layers, strict=True)
    return all(np.array_equal(a.streams[key], b.streams[key]) for a, b in pairs for key in b.streams)


def fork(backend: str, policy: str) -> str:
    """Two forks and their origin go on with different tokens; none sees another."""
    model = build(backend)
    origin = prefilled(model, policy)
    before = origin.snapshot()
    feed = [np.full((3, 1), token, np.int32) for token in (5, 9)]
    try:
        after = [model.step(tokens, origin.fork(), logits=None)[1] for tokens in feed]
        if not same_streams(origin.snapshot(), before):
            return "the origin changed"
        alone = model.step(feed[0], prefilled(model, policy), logits=None)[1]
        return "" if same_streams(after[0].snapshot(), alone.snapshot()) else "one fork wrote into the other"
    except (RuntimeError, ValueError) as error:
        return f"the buffers are gone: {error}"


def consumed(backend: str, policy: str) -> str:
    """A cache that a step has used up cannot be used again."""
    model = build(backend)
    cache = prefilled(model, policy)
    for _ in range(2):
        try:
            model.step(np.full((3, 1), 4, np.int32), cache, logits=None)
        except KvtwinError as error:
            return "" if "consumed" in str(error) else str(error)
    return "a consumed cache was used again"


def alone(backend: str, policy: str) -> str:
    """A row of a padded batch does what it does alone."""
    model = build(backend)
    cache = prefilled(model, policy)
    for row in range(3):
        real = PROMPT[row][PROMPT[row] >= 0]
        _, own = model.step(real[None], model.cache(policy), logits=None)
        if cache.seen[row] != own.seen[0]:
            return f"row {row} has seen {cache.seen[row]} tokens, alone {own.seen[0]}"
        if same_sets([one[row : row + 1] for one in cache.kept], own.kept)[0] < 4:
            return f"row {row} keeps other tokens than alone"
    return ""


def roll_back(backend: str, policy: str) -> str:
    """What was evicted cannot be rolled back over."""
    model = build(backend)
    _, cache = model.step(np.full((3, 1), 4, np.int32), prefilled(model, policy), logits=None)
    try:
        cache.roll_back(1)
    except KvtwinError:
        return ""
    return "rolled back over an eviction"


# The faults.


Patch = pytest.MonkeyPatch
TORCH, JAX = array_api_compat.torch, jax.numpy


def wrapped(patch: Patch, where: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function by `change(original, *arguments)`."""
    patch.setattr(where, name, functools.partial(change, getattr(where, name)))


def method(patch: Patch, kind: type, name: str, change: Callable[..., Any]) -> None:
    """Replace a method by `change(original, self, *arguments)`."""
    original = getattr(kind, name)
    patch.setattr(kind, name, lambda self, *rest, **options: change(original, self, *rest, **options))


def budget_off_by_one(module: Any) -> Callable[[Patch], None]:
    def fault(
        survivors: Any, xp: Any, s: Any, protected: Any, living: Any, budget: Any, capacity: int
    ) -> Any:
        return survivors(xp, s, protected, living, budget - 1, capacity)

    return lambda patch: wrapped(patch, module, "survivors", fault)


def empty_slots_attended(patch: Patch) -> None:
    patch.setattr(
        backends.torch.attention,
        "attends",
        lambda query, key, window: (key <= query) & ((window is None) | (key > query - (window or 0))),
    )


def ties_flipped(patch: Patch) -> None:
    def fault(survivors: Any, xp: Any, s: Any, *rest: Any) -> Any:
        return survivors(xp, s * 1000 - xp.arange(s.shape[-1]), *rest)

    wrapped(patch, backends.torch.layer, "survivors", fault)


def ties_flipped_where_overwriting(module: Any) -> Callable[[Patch], None]:
    def fault(weakest: Any, xp: Any, s: Any, positions: Any, *rest: Any) -> Any:
        return weakest(xp, s * 1000 - positions, positions, *rest)

    return lambda patch: wrapped(patch, module, "weakest", fault)


def clock_stands(patch: Patch) -> None:
    method(patch, TorchCache, "admit", lambda admit, self, given: self.seen + given * (not self.seen.any()))


def memory_stays(patch: Patch) -> None:
    def fault(compact: Any, self: LayerCache, *rest: Any) -> Any:
        before = self.memory
        result = compact(self, *rest)
        self.memory = {key: before[key][..., : self.slots] for key in before}
        return result

    method(patch, LayerCache, "compact", fault)


def mask_by_slot(patch: Patch) -> None:
    def fault(query: Any, key: Any, window: int | None) -> Any:
        slot = TORCH.arange(key.shape[-1])
        own = slot[key.shape[-1] - query.shape[-2] :, None]
        seen = (key >= 0) & (query >= 0) & (slot <= own)
        return seen if window is None else seen & (slot > own - window)

    patch.setattr(backends.torch.attention, "attends", fault)


def window_off_by_one_in_attention(patch: Patch) -> None:
    def fault(attends: Any, query: Any, key: Any, window: int | None) -> Any:
        return attends(query, key, window and window - 1)

    wrapped(patch, backends.torch.attention, "attends", fault)


def window_off_by_one_in_eviction(patch: Patch) -> None:
    def fault(alive: Any, positions: Any, seen: Any, window: int | None) -> Any:
        return alive(positions, seen, window and window - 1)

    wrapped(patch, backends.torch.layer, "alive", fault)


def rope_off_by_one(patch: Patch) -> None:
    def fault(at: Any, self: Any, positions: Any, *rest: Any) -> Any:
        return at(self, positions + 1, *rest)

    method(patch, backends.torch.rope.Tables, "at", fault)


def rank_off_by_one(patch: Patch) -> None:
    def fault(rotate: Any, self: Any, x: Any, positions: Any, *rest: Any) -> Any:
        keys = x.ndim == 4  # queries come grouped, with one axis more
        return rotate(self, x, positions + keys, *rest)

    method(patch, backends.torch.rope.Tables, "rotate", fault)


def fork_shares_tensors(patch: Patch) -> None:
    method(
        patch,
        TorchCache,
        "_gather",
        lambda gather, self, index: replace(self, layers=[replace(layer) for layer in self.layers]),
    )


def fork_shares_donated_buffers(patch: Patch) -> None:
    method(patch, FlaxCache, "_gather", lambda gather, self, index: replace(self))


def nothing_is_consumed(patch: Patch) -> None:
    patch.setattr(TorchCache, "consume", lambda self: None)


def padding_counts(patch: Patch) -> None:
    method(
        patch, TorchCache, "admit", lambda admit, self, given: admit(self, np.full_like(given, given.max()))
    )


def protection_ignored(patch: Patch) -> None:
    wrapped(patch, backends.torch.layer, "judge", lambda judge, *rest: (judge(*rest)[0], None))


def budget_of_another_layer(patch: Patch) -> None:
    def fault(read_policy: Any, *rest: Any) -> Any:
        made, each = read_policy(*rest)
        return made, each[::-1]

    wrapped(patch, backends.torch.model, "read_policy", fault)


def sums_over_the_group(patch: Patch) -> None:
    def fault(attention: Any, queries: Any, *rest: Any) -> Any:
        mixed, sums = attention(queries, *rest)
        return mixed, None if sums is None else sums * queries.shape[2]

    wrapped(patch, backends.torch.mixing, "attention", fault)


def scale_forgotten(patch: Patch) -> None:
    def fault(
        attention: Any, queries: Any, keys: Any, values: Any, near: Any, far: Any, layer: Any, *rest: Any
    ) -> Any:
        return attention(queries, keys, values, near, far, replace(layer, scale=1.0), *rest)

    wrapped(patch, backends.torch.mixing, "attention", fault)


def slots_taken_for_whole(patch: Patch) -> None:
    wrapped(patch, backends.torch.mixing, "attention", lambda attention, *rest: attention(*rest[:-1], True))


def padding_pushes_queries_out(patch: Patch) -> None:
    def fault(observe: Any, self: LayerCache, queries: Any, positions: Any) -> None:
        if self.queries is None:
            return
        asked = self.query_positions.shape[1]
        self.query_positions = TORCH.concat([self.query_positions, positions], axis=1)[:, -asked:]
        self.queries = TORCH.concat([self.queries, queries], axis=3)[:, :, :, -asked:]

    method(patch, LayerCache, "observe", fault)


def eviction_not_recorded(patch: Patch) -> None:
    def fault(evict_one: Any, self: LayerCache, *rest: Any) -> Any:
        lost, bad = evict_one(self, *rest)
        return lost & False, bad

    method(patch, LayerCache, "evict_one", fault)


def interval_ignored(patch: Patch) -> None:
    method(patch, TorchCache, "counted", lambda counted, self, *rest: (0, 0))


@dataclass(frozen=True)
class Mutant:
    """A fault, the check that must see it, and words that its finding begins with or holds."""

    fault: Callable[[Patch], None]
    check: Callable[[str, str], str]
    policy: str
    sees: str = ""
    backend: str = "torch"


H2O, WINDOW, ODD = "h2o(budget=6)", "window(budget=6, sinks=2)", "keep_it_odd(budget=6)"
REPOSITION = "window(budget=7, sinks=2, reposition=True)"
T, F = backends.torch.layer, backends.flax.layer

MUTANTS = {
    "budget off by one": Mutant(budget_off_by_one(T), kept, H2O, "it kept 5 tokens, expected 6"),
    "budget off by one, flax": Mutant(budget_off_by_one(F), kept, H2O, "it kept 5 tokens", "flax"),
    "empty slots attended": Mutant(empty_slots_attended, taps, "full()", "prompt: layers.0.attention.mixed"),
    "tie rule flipped": Mutant(ties_flipped, kept, ODD, "against the rule on its own scores"),
    "tie rule flipped where overwriting": Mutant(ties_flipped_where_overwriting(T), free, ODD, "kept sets"),
    "tie rule flipped where overwriting, flax": Mutant(
        ties_flipped_where_overwriting(F), free, ODD, "kept sets", "flax"
    ),
    "clock not advanced": Mutant(
        clock_stands, kept, H2O, "step 1, layer 0, row 0, head 0: it protects others"
    ),
    "memory not moved with the keys": Mutant(memory_stays, kept, H2O, "step 1"),
    "mask by slot order": Mutant(mask_by_slot, taps, H2O, "prompt: layers.1.attention.mixed"),
    "window off by one in attention": Mutant(
        window_off_by_one_in_attention, taps, "full()", "prompt: layers.1.attention.mixed"
    ),
    "window off by one in eviction": Mutant(
        window_off_by_one_in_eviction, kept, "full()", "it kept 6 tokens, expected 7"
    ),
    "rope position off by one": Mutant(
        rope_off_by_one, taps, "full()", "prompt: layers.0.attention.query_rotated"
    ),
    "slots taken for whole": Mutant(
        slots_taken_for_whole, taps, "full()", "prompt: layers.0.attention.mixed"
    ),
    "reposition rank off by one": Mutant(
        rank_off_by_one, taps, REPOSITION, "prompt: layers.0.attention.mixed"
    ),
    "fork shares tensors": Mutant(fork_shares_tensors, fork, "full()", "the origin changed"),
    "donation of a live buffer, flax": Mutant(
        fork_shares_donated_buffers, fork, "full()", "the buffers are gone", "flax"
    ),
    "a consumed cache goes on": Mutant(nothing_is_consumed, consumed, "full()", "used again"),
    "padding counted as tokens": Mutant(
        padding_counts, alone, "full()", "row 0 has seen 13 tokens, alone 10"
    ),
    "protection ignored": Mutant(protection_ignored, kept, WINDOW, "it protects others"),
    "budget of another layer": Mutant(
        budget_of_another_layer,
        kept,
        "window(budget=(6, 4), sinks=2)",
        "a forced set has 6 tokens; expected at most 4",
    ),
    "sums not divided by the group": Mutant(sums_over_the_group, scores, H2O, "scores drift by"),
    "scale forgotten": Mutant(scale_forgotten, taps, "full()", "prompt: layers.0.attention.mixed"),
    "padding pushes queries out": Mutant(
        padding_pushes_queries_out, kept, "snapkv(budget=6, window=3, kernel=3)", "it kept"
    ),
    "eviction not recorded": Mutant(eviction_not_recorded, roll_back, WINDOW, "rolled back over an eviction"),
    "interval ignored": Mutant(interval_ignored, free, "window(budget=6, sinks=2, interval=4)", "kept sets"),
}
CONTROLS = sorted({(one.check.__name__, one.policy, one.backend) for one in MUTANTS.values()})


@pytest.mark.parametrize(("check", "policy", "backend"), CONTROLS)
def test_without_a_fault_the_check_passes(check: str, policy: str, backend: str) -> None:
    assert globals()[check](backend, policy) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_the_check_sees_the_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    reference(mutant.policy)
    mutant.fault(monkeypatch)
    seen = mutant.check(mutant.backend, mutant.policy)
    assert seen
    assert mutant.sees in seen


def test_a_fault_stays_in_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared rule that the other backends read is not the one that was patched."""
    before = rule.survivors
    budget_off_by_one(T)(monkeypatch)
    assert backends.flax.layer.survivors is rule.survivors is before
    assert backends.torch.layer.survivors is not before
