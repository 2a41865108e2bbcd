"""Layers whose heads differ: they hold what they say and no more, and everything a cache can do works on them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from backends import backends
from backends.flax.attention import paged_attention as flax_attention
from backends.flax.convert import precision
from backends.flax.decode import interned
from backends.flax.pages import PagedState
from backends.torch.attention import paged_attention as torch_attention
from backends.torch.pages import PagedLayer
from experiments.compare import free_run, run, same_sets
from framework.backend import Model
from framework.cache import Cache
from framework.compare import TOLERANCE, drift, token_agreement
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.policies.adakv import AdaKV
from framework.policies.snapkv import SnapKV
from framework.spec import Layer, ModelSpec, Rope
from framework.weights import random_weights
from tests.twins import compilations, snapshot_drift, unchecked

FULL = Layer(heads=10, kv_heads=5, head_dim=4, scale=0.5, rope=Rope(theta=300.0, dim=4))
SPEC = ModelSpec(family="llama", vocab=97, dim=22, ffn=26, layers=(FULL, FULL), norm_eps=1e-5, positions=512)
PROMPT = np.random.default_rng(1).integers(0, 97, (3, 61), dtype=np.int32)
PROMPT[0, 50:] = PROMPT[1, :4] = PROMPT[1, 6] = -1
STEPS = 9
EXACT = TOLERANCE["float64"]
ADAKV = "adakv(budget=16, policy=snapkv(window=3, kernel=3))"
INTERVAL = "adakv(budget=16, policy=h2o(), interval=3)"
STATIC = "h2o(budget=((40, 6, 5, 4, 9), (7, 5, 9, 4, 30)))"
POLICIES = [
    ADAKV,
    INTERVAL,
    STATIC,
    "keydiff(budget=((40, 6, 5, 4, 9), (7, 5, 9, 4, 30)), interval=2)",
    "reposition(budget=16, policy=adakv(policy=h2o()))",
    "merge(budget=16, policy=adakv(policy=snapkv(window=3, kernel=3)))",
]
TWINS = ("torch", "flax")


def pairs(policies: list[str], flax_now: list[str]) -> list[Any]:
    """(backend, policy); flax compiles each anew, so that most of it waits for make test-slow."""
    slow = [pytest.mark.slow]
    return [
        pytest.param(backend, policy, marks=slow if backend == "flax" and policy not in flax_now else [])
        for backend in TWINS
        for policy in policies
    ]


slow_on_flax = pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])


def build(backend: str, spec: ModelSpec = SPEC, dtype: str = "float64") -> Model:
    return backends.get(backend).build(spec, random_weights(spec, 2), dtype)


MODELS = {name: build(name) for name in ("reference", *TWINS)}


def layers(cache: Cache) -> list[Any]:
    inside: Any = getattr(cache, "state", cache)
    return getattr(inside, "layers", [])


def in_pages(cache: Cache) -> list[bool]:
    return [isinstance(layer, PagedLayer | PagedState) for layer in layers(cache)]


def prefilled(backend: str, policy: str) -> Cache:
    model = MODELS[backend]
    return model.step(PROMPT, model.cache(policy, batch=3), logits=None)[1]


@pytest.mark.parametrize(("backend", "policy"), pairs(POLICIES, flax_now=[ADAKV]))
def test_a_free_run_is_that_of_the_reference(backend: str, policy: str) -> None:
    assert all(in_pages(prefilled(backend, policy))), "the test would show nothing"
    right = run(MODELS["reference"], PROMPT, policy, STEPS)
    tokens, logits, held = free_run(MODELS[backend], PROMPT, policy, STEPS)
    same, total = same_sets(held, right.kept)
    assert same == total
    assert token_agreement(tokens, right.fed, np.stack(right.logits[:-1], axis=1)).within(EXACT)
    assert drift(logits, right.logits[-1]) <= EXACT


@pytest.mark.parametrize(
    ("policy", "tokens"),
    [
        ("adakv(budget=48, policy=snapkv(window=3, kernel=3))", 3 * 5 * 48),
        ("h2o(budget=((200, 20, 20, 20, 20), 56))", 3 * 280),
    ],
)
@pytest.mark.parametrize("backend", TWINS)
def test_memory_is_freed(backend: str, policy: str, tokens: int) -> None:
    """Bytes as the library counts them: what is kept and its pages, not every head as long as the longest."""
    model = MODELS[backend]
    text = np.random.default_rng(8).integers(0, 97, (3, 300), dtype=np.int32)
    _, cache = model.step(text, model.cache(policy, batch=3), logits=None)
    layer, kept = layers(cache)[0], cache.kept[0]
    assert in_pages(cache)[0]
    assert (kept >= 0).sum() == tokens
    assert sum(x.nbytes for x in layer.stored["payload"]) <= 1.25 * tokens * 2 * 4 * 8
    payload = sum(int((kept >= 0).sum()) for kept in cache.kept) * 2 * 4 * 8
    assert cache.bytes.payload == payload
    everything = [x for layer in layers(cache) for group in layer.stored.values() for x in group]
    stored = sum(x.nbytes for x in everything)
    tables = sum(in_pages(cache)) * 2 * 3 * 5 * 4  # first and count of each head
    assert cache.bytes.capacity - cache.bytes.queries == stored + tables


def test_budgets_that_move_between_heads_compile_nothing() -> None:
    """The heads of another text ask for other shares; the pages are the same."""
    interned.cache_clear()  # what other tests have compiled does not count
    model = build("flax", dtype="float32")
    random = np.random.default_rng(3)
    with unchecked():
        caches = []
        with compilations() as seen:
            for _ in range(4):
                text = random.integers(0, 97, (1, 61), dtype=np.int32)
                logits, cache = model.step(text, model.cache(ADAKV))
                caches.append(model.decode(cache, logits[:, 0], Sampling(), (), 5)[2])
        assert len(seen) == 2, seen
        shares = {tuple((cache.kept[0] >= 0).sum(-1).flatten().tolist()) for cache in caches}
        assert len(shares) == 4, shares


@pytest.mark.parametrize(("backend", "policy"), pairs([ADAKV, INTERVAL, STATIC], flax_now=[]))
def test_rows_that_are_silent_at_evictions_lose_nothing(backend: str, policy: str) -> None:
    """Under an interval, rows that take part only between evictions gather more than their share."""
    random = np.random.default_rng(4)
    feed = random.integers(0, 97, (3, 14), dtype=np.int32)
    feed[1, 2::3] = -1
    feed[2, 5:12] = -1
    found = {}
    for name in ("reference", backend):
        cache = prefilled(name, policy)
        for step in range(feed.shape[1]):
            logits, cache = MODELS[name].step(feed[:, step : step + 1], cache)
        found[name] = logits, cache
    assert snapshot_drift(found[backend][1], found["reference"][1]) <= EXACT
    assert drift(found[backend][0], found["reference"][0]) <= EXACT
    assert all(in_pages(found[backend][1]))


@pytest.mark.parametrize(("backend", "policy"), pairs([INTERVAL], flax_now=[]))
def test_rows_that_are_given_less_between_evictions_lose_nothing(backend: str, policy: str) -> None:
    """A call of several tokens leaves holes in the rows with fewer; the next token goes behind the last one."""
    some = np.array([[7, -1, -1], [31, 2, -1], [3, 40, 5]], np.int32)
    found = []
    for name in ("reference", backend):
        _, cache = MODELS[name].step(some, prefilled(name, policy), phase="decode")
        assert name == "reference" or all(in_pages(cache))
        _, cache = MODELS[name].step(some[:, :1] + 1, cache)
        assert (cache.last_eviction < cache.seen).all(), "the test would show nothing"
        found.append(MODELS[name].step(some[:, :1], cache))
    assert drift(found[1][0], found[0][0]) <= EXACT
    assert snapshot_drift(found[1][1], found[0][1]) <= EXACT


@pytest.mark.parametrize(("backend", "policy"), pairs([ADAKV, STATIC], flax_now=[ADAKV]))
def test_fork_rows_save_and_go_on(backend: str, policy: str, tmp_path: Any) -> None:
    """A fork, reordered rows, a restored file and the other backend go on as the cache itself does."""
    model, other = MODELS[backend], MODELS[TWINS[1 - TWINS.index(backend)]]
    cache = prefilled(backend, policy)
    feed = np.array([[3], [8], [90]], np.int32)
    cache.save(tmp_path / "cache.safetensors")
    fork, turned = cache.fork(), cache.rows([2, 0])
    before = snapshot_drift(fork, cache)
    right, after = model.step(feed, cache)
    assert before == 0.0
    assert snapshot_drift(fork, prefilled(backend, policy)) == 0.0
    for again in (
        fork,
        model.restore(tmp_path / "cache.safetensors"),
        other.restore(tmp_path / "cache.safetensors"),
    ):
        assert all(in_pages(again))
        logits, later = (other if type(again) is not type(fork) else model).step(feed, again)
        assert drift(logits, right) <= EXACT
        assert snapshot_drift(later, after) <= EXACT
    logits, turned = model.step(feed[[2, 0]], turned)
    assert drift(logits, right[[2, 0]]) <= EXACT
    assert snapshot_drift(turned, after.rows([2, 0])) <= EXACT


@slow_on_flax
def test_a_later_prompt_opens_the_pages_and_fills_them_again(backend: str) -> None:
    """A second turn, a call of several tokens that evicts, and one that holds back."""
    turn = np.random.default_rng(6).integers(0, 97, (3, 7), dtype=np.int32)
    found = []
    for name in ("reference", backend):
        cache = prefilled(name, ADAKV)
        _, cache = MODELS[name].step(turn, cache, phase="prefill")
        _, cache = MODELS[name].step(turn[:, :3], cache, phase="decode")
        assert name == "reference" or all(in_pages(cache))
        _, cache = MODELS[name].step(turn[:, :4], cache, phase="prefill", evict=False)
        assert not any(in_pages(cache))
        logits, cache = MODELS[name].step(turn[:, :1], cache)
        found.append((logits, cache))
    assert drift(found[1][0], found[0][0]) <= EXACT
    assert snapshot_drift(found[1][1], found[0][1]) <= EXACT


@slow_on_flax
def test_rolling_back_a_step_that_evicted_nothing(backend: str) -> None:
    """A prompt shorter than every head's share leaves room: what came last can be taken back."""
    policy, short = "window(budget=((40, 36, 5, 34, 29), 40), sinks=1)", PROMPT[:1, :4]
    model = MODELS[backend]
    _, cache = model.step(short, model.cache(policy, batch=1), logits=None)
    assert in_pages(cache)[0]
    _, cache = model.step(PROMPT[:1, 4:5], cache)
    before = cache.fork()
    with pytest.raises(KvtwinError, match="evicted within"):
        model.step(PROMPT[:1, 5:6], cache.fork())[1].roll_back(1)
    taken = cache.roll_back(1)
    _, again = model.step(PROMPT[:1, 4:5], taken)
    assert snapshot_drift(again, before) == 0.0


class Greedy(AdaKV):
    """Promises the heads' budgets together, and gives each of them all."""

    def budgets(self, view: Any, scores: Any) -> Any:
        return view.budget * view.positions.shape[1]


@pytest.mark.parametrize("backend", ["reference", "flax"])
def test_more_than_the_total_is_refused(backend: str) -> None:
    """Pages that are not there cannot be given: nothing is lost in silence."""
    policy = Greedy(budget=16, policy=SnapKV(window=3, kernel=3))
    model = MODELS[backend]
    with pytest.raises(KvtwinError, match="layer 0 .*`total` says"):
        model.step(PROMPT, model.cache(policy, batch=3))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_over_pages(softcap: float | None, window: int | None) -> None:
    """Against a softmax over each head's own tokens, by loops; a silent row gives 0."""
    random = np.random.default_rng(2)
    batch, heads, group, head_dim, width, size = 3, 2, 3, 4, 5, 4
    owner = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 5], np.int32)
    keys = random.normal(size=(len(owner), size, head_dim))
    values = random.normal(size=(len(owner), size, width))
    queries = random.normal(size=(batch, heads, group, 1, head_dim))
    positions = random.integers(-1, 20, (len(owner), size)).astype(np.int32)
    query_position = np.array([[19], [-1], [11]], np.int32)
    layer = Layer(
        heads=heads * group,
        kv_heads=heads,
        head_dim=head_dim,
        scale=0.3,
        rope=None,
        window=window,
        softcap=softcap,
    )
    mixed, sums = np.zeros((batch, heads, group, 1, width)), np.zeros((len(owner), size))
    for row in range(batch):
        for head in range(heads):
            mine = [
                (page, slot)
                for page in np.flatnonzero(owner == row * heads + head)
                for slot in range(size)
                if 0 <= positions[page, slot] <= query_position[row, 0]
                and (window is None or positions[page, slot] > query_position[row, 0] - window)
            ]
            for one in range(group):
                logits = np.array([queries[row, head, one, 0] @ keys[place] * 0.3 for place in mine])
                logits = logits if softcap is None else np.tanh(logits / softcap) * softcap
                weights = np.exp(logits) / np.exp(logits).sum() if mine else logits
                for place, weight in zip(mine, weights, strict=True):
                    mixed[row, head, one, 0] += weight * values[place]
                    sums[place] += weight / group
    arrays = queries, keys, values, query_position, positions, owner
    found = torch_attention(*(torch.as_tensor(x) for x in arrays), layer, True)
    with precision("float64"):
        other = flax_attention(*(jnp.asarray(x) for x in arrays), layer, True)
        other = [np.asarray(x) for x in other]
    for mix, total in (found, other):
        np.testing.assert_allclose(np.asarray(mix), mixed, atol=1e-12)
        np.testing.assert_allclose(np.asarray(total).reshape(sums.shape), sums, atol=1e-12)
