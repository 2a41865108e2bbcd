"""The step on buffers that stay: it gives what the eager loop gives, and it never asks the host."""

from typing import Any

import numpy as np
import pytest
import torch

from backends import backends
from backends.torch import decode as eager
from backends.torch import static
from backends.torch.decoder import RmsNorm
from backends.torch.recorded import Watch
from backends.torch.static import LOOK, Step
from framework.compare import drift
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.policy import Policy, name, policies
from framework.rope import ropes
from tests.tiny import tiny_model, tiny_tokens
from tests.twins import LENGTHS, hybrid, prompts, snapshot_drift, texts, unchecked

POLICIES = (
    "full()",
    "window(budget=9)",
    "h2o(budget=(20, 5))",
    "h2o(budget=60)",  # more than any row sees: slots stay empty
    "tova(budget=9)",
    "key_norm(budget=9)",
    "snapkv(budget=9, window=4, kernel=3)",
)
FAST = [pytest.param(one, marks=pytest.mark.slow) if one in POLICIES[4:6] else one for one in POLICIES]
STEPS = LOOK + 5
GREEDY = Sampling()
HOST = {"compactor", "fastgen", "leverage", "sink_recent"}  # make a tensor of the host's numbers in a hook


def prompted(policy: str | Policy, model: Any) -> tuple[Any, np.ndarray]:
    """A cache behind ragged prompts, and the logits of each row's last token."""
    logits, cache = model.step(prompts(), model.cache(policy, batch=len(LENGTHS)), phase="prefill")
    return cache, logits[:, -1]


def looped(
    loop: Any,
    policy: str | Policy,
    sampling: Sampling,
    stop: list[int],
    steps: int = STEPS,
    model: Any = None,
    **more: Any,
) -> tuple[np.ndarray, np.ndarray, Any]:
    """What `decode` of one of the two loops gives behind the prompts."""
    model = model or hybrid("torch")
    with unchecked():
        cache, logits = prompted(policy, model)
        assert static.qualifies(model, cache, steps)
        return inferred(loop, model, cache, logits, sampling, stop, steps, **more)


@torch.inference_mode()
def inferred(loop: Any, *given: Any, **more: Any) -> Any:
    return loop.decode(*given, **more)


def agree(expected: Any, found: Any, model: Any = None) -> None:
    """The same tokens, logits and state, and the same a few eager steps later."""
    model = model or hybrid("torch")
    assert counts(found[2]) == counts(expected[2])
    for steps in range(4):
        assert (found[0] == expected[0]).all()
        assert drift(found[1], expected[1]) <= 1e-12
        assert snapshot_drift(found[2], expected[2]) <= 1e-12
        for mine, theirs in zip(found[2].kept, expected[2].kept, strict=True):
            assert (mine == theirs).all()
        given = np.where(np.arange(3) == steps, -1, texts(seed=4)[:, steps])[:, None]
        found, expected = (
            (given, *model.step(given, cache, logits="all")) for _, _, cache in (found, expected)
        )


def counts(cache: Any) -> list[tuple[int, int]]:
    """What the host knows of each layer: tokens that a head may hold, and where the free slots begin."""
    return [(one.used, -1 if cache.overwrites(one) else one.fill) for one in cache.layers]


def stops(policy: str | Policy, sampling: Sampling) -> list[int]:
    """Tokens at which two of the three rows come to stop, in different looks of the host."""
    tokens, _, _ = looped(eager, policy, sampling, [])
    return [int(tokens[0, 5]), int(tokens[2, LOOK + 1])]


@pytest.mark.parametrize("policy", FAST)
def test_it_is_the_eager_loop(policy: str) -> None:
    stop = stops(policy, GREEDY)
    expected = looped(eager, policy, GREEDY, stop)
    found = looped(static, policy, GREEDY, stop)
    assert (expected[0][0, 6:] == -1).all()
    agree(expected, found)


@pytest.mark.parametrize("policy", ["full()", "snapkv(budget=9, window=4, kernel=3)"])
def test_steps_after_the_last_row_has_stopped_leave_nothing(policy: str) -> None:
    """The host looks later than that."""
    (tokens, _, _) = looped(eager, policy, GREEDY, [])
    stop = [int(row[3]) for row in tokens]
    expected, found = (looped(loop, policy, GREEDY, stop) for loop in (eager, static))
    assert (expected[0][:, 4:] == -1).all()
    agree(expected, found)


EVERY = [example for one in policies.names() for example in policies.get(one).examples()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [one for one in EVERY if one.interval == 1 and not one.repositions], ids=lambda one: name(one)
)
def test_it_is_the_eager_loop_for_every_policy(policy: Policy) -> None:
    stop = stops(policy, GREEDY)
    agree(looped(eager, policy, GREEDY, stop), looped(static, policy, GREEDY, stop))
    assert bool(asked(policy)) == (type(policy).__module__.rpartition(".")[2] in HOST)


@pytest.mark.parametrize("policy", ["full()", "h2o(budget=9)"])
def test_it_is_the_eager_loop_where_tokens_are_drawn(policy: str) -> None:
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.9, min_p=0.001, seed=3)
    stop = stops(policy, sampling)
    rest = {"first": 4, "active": np.array([True, False, True])}
    expected = looped(eager, policy, sampling, stop, **rest)
    assert (expected[0][1] == -1).all()
    assert len(np.unique(expected[0][2])) > 5
    agree(expected, looped(static, policy, sampling, stop, **rest))


@pytest.mark.parametrize("family", ["gemma2", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_it_is_the_eager_loop_in_other_families(family: str) -> None:
    """Soft-caps, post-norms, norms of queries, other ropes, windows."""
    spec, weights = tiny_model(family, 1)
    model, tokens = backends.get("torch").build(spec, weights, "float64"), tiny_tokens(spec, 5, 2, 17)
    found = []
    for loop in (eager, static):
        logits, cache = model.step(tokens, model.cache("h2o(budget=11)", batch=2))
        assert static.qualifies(model, cache, 20)
        found.append(inferred(loop, model, cache, logits[:, -1], GREEDY, (), 20))
    (ours, last, after), (theirs, expected, state) = found
    assert (ours == theirs).all()
    assert drift(last, expected) <= 1e-12
    assert snapshot_drift(after, state) <= 1e-12


def test_a_step_is_used_again_and_made_anew_where_buffers_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "ROOM", 16)
    model, loops = hybrid("torch"), []
    with unchecked():
        for loop in (eager, static):
            cache, logits = prompted("full()", model)
            pieces, steps = [], []
            for count in (3, 9, 11, 2):
                tokens, logits, cache = inferred(loop, model, cache, logits, GREEDY, (), count)
                pieces.append(tokens)
                steps.append(cache.step)
            loops.append((np.concatenate(pieces, axis=1), logits, cache))
    assert steps[0] is steps[1]
    assert steps[1] is not steps[2] is steps[3]
    assert steps[3].slots >= cache.layers[0].fill > steps[0].slots
    expected, found = loops
    assert (found[0] == expected[0]).all()
    assert drift(found[1], expected[1]) <= 1e-12
    assert snapshot_drift(found[2], expected[2]) <= 1e-12


@pytest.mark.parametrize("change", ["sampling", "stop", "fork", "step"])
def test_a_step_is_not_used_again_for_what_it_was_not_made_for(change: str) -> None:
    model, (sampling, stop) = hybrid("torch"), (GREEDY, (5,))
    cache, logits = prompted("full()", model)
    tokens, logits, cache = inferred(static, model, cache, logits, sampling, stop, 3)
    first = cache.step
    if change == "fork":
        cache = cache.fork()
    elif change == "step":
        _, cache = model.step(tokens[:, -1:], cache)
    elif change == "sampling":
        sampling = Sampling(temperature=0.7)
    else:
        stop = (5, 6)
    other = cache.fork()
    found = inferred(static, model, cache, logits, sampling, stop, 4)
    agree(inferred(eager, model, other, logits, sampling, stop, 4), found)
    assert found[2].step is not first


def made(policy: str | Policy, sampling: Sampling = GREEDY) -> Step:
    """A step behind the prompts, ready to run."""
    model = hybrid("torch")
    cache, logits = prompted(policy, model)
    for rope in ropes(model.spec):
        model.tables.grow(rope, cache.length, 200)
    step = Step(model, cache, sampling, (3, 4))
    step.begin(cache, torch.from_numpy(logits), np.ones(3, bool))
    return step


@torch.inference_mode()
def asked(policy: str | Policy, sampling: Sampling = GREEDY) -> list[str]:
    """What a step asks the host."""
    step = made(policy, sampling)
    with Watch() as watch:
        step.run()
    return watch.found


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01)])
@pytest.mark.parametrize("policy", ["full()", "h2o(budget=9)", "snapkv(budget=9, window=4, kernel=3)"])
def test_a_step_asks_the_host_nothing(policy: str, sampling: Sampling) -> None:
    assert asked(policy, sampling) == []


@torch.inference_mode()
@pytest.mark.parametrize("policy", [*POLICIES, "d2o(budget=9)", "adakv(budget=9, policy=snapkv(window=3))"])
def test_what_a_step_changes_stays_where_it_is(policy: str) -> None:
    step = made(policy)

    def places() -> dict[str, int]:
        found = {key: value.data_ptr() for key, value in vars(step).items() if torch.is_tensor(value)}
        found["dropped"] = step.cache.dropped.data_ptr()
        for number, layer in enumerate(step.cache.layers):
            for key, value in vars(layer).items():
                inner = value.items() if isinstance(value, dict) and key != "buffers" else [("", value)]
                found |= {f"{number}.{key}.{at}": x.data_ptr() for at, x in inner if torch.is_tensor(x)}
        return found

    before, state = places(), [layer.positions.clone() for layer in step.cache.layers]
    assert len(before) > 20
    for _ in range(3):
        step.run()
    assert places() == before
    assert all((a.positions != b).any() for a, b in zip(step.cache.layers, state, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("item", lambda x: x.sum().item()),
        ("bool", lambda x: bool(x.any())),
        ("int", lambda x: int(x[0])),
        ("tolist", lambda x: [float(one) for one in x]),
        ("nonzero", lambda x: x.nonzero()),
        ("where", lambda x: torch.where(x > 1)),
        ("mask", lambda x: x[x > 1]),
        ("mask set", lambda x: x.__setitem__(x > 1, 0)),
        ("new", lambda x: x + torch.tensor([1.0, 2.0, 3.0])),
        ("unique", lambda x: torch.unique(x)),
        ("select", lambda x: torch.masked_select(x, x > 1)),
        ("equal", lambda x: torch.equal(x, x + 1)),
        ("elsewhere", lambda x: x.to("meta")),
    ],
)
def test_the_watch_sees_what_asks_the_host(what: str, act: Any) -> None:
    x = torch.arange(3.0)
    with Watch() as watch:
        act(x)
    assert watch.found


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("full()", {"codec": "int8()"}),
        ("window(budget=9, interval=3)", {}),
        ("window(budget=9, reposition=True)", {}),
        ("h2o(budget=((90, 3), (5, 80)))", {}),
        ("full()", {"capacity": 44}),
    ],
)
def test_other_caches_do_not_qualify(policy: str, more: dict[str, Any]) -> None:
    """Coded ones, those that wait, those in pages, and those that would overflow."""
    model = hybrid("torch")
    _, cache = model.step(prompts(), model.cache(policy, batch=3, **more))
    assert not static.qualifies(model, cache, 5)
    assert static.qualifies(model, prompted("full()", model)[0], 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_norm_of_a_gpu_is_the_norm_of_a_cpu(dtype: torch.dtype) -> None:
    norm = RmsNorm(37, 0.1, 0.0).to(dtype)
    random = torch.Generator().manual_seed(0)
    norm.weight.data.copy_(torch.randn(37, generator=random))
    x = torch.randn(3, 5, 37, generator=random).to(dtype)
    torch.testing.assert_close(norm.fused(x), norm(x), rtol=1e-12, atol=0)


def test_a_score_that_is_no_number_is_refused() -> None:
    with torch.inference_mode():
        model = hybrid("torch")
        cache, logits = prompted("h2o(budget=9)", model)
        for layer in cache.layers[1:]:
            layer.memory["mass"].fill_(float("nan"))
        with pytest.raises(KvtwinError, match=r"h2o\(budget=9\) scored NaN in layer 1"):
            static.decode(model, cache, logits, GREEDY, (), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_recorded_step_is_the_eager_loop(policy: str) -> None:
    """On a GPU: one row stops, and the cache goes on."""
    model = hybrid("torch", "float32")
    assert model.device.type == "cuda"
    stop = [int(looped(static, policy, GREEDY, [], model=model)[0][0, 5])]
    expected = looped(eager_on_gpu, policy, GREEDY, stop, model=model)
    found = looped(static, policy, GREEDY, stop, model=model)
    assert found[2].step.recorded.graph is not None
    assert (found[0] == expected[0]).all()
    assert drift(found[1], expected[1]) <= 1e-5
    assert snapshot_drift(found[2], expected[2]) <= 1e-5
    given = texts(seed=4)[:, :1]
    assert drift(model.step(given, found[2])[0], model.step(given, expected[2])[0]) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
def test_a_recorded_step_is_the_same_step_run_by_itself(policy: str) -> None:
    """In bfloat16, which no other loop has to agree with bit by bit."""
    model = hybrid("torch", "bfloat16")
    tokens, logits, cache = looped(static, policy, GREEDY, [], model=model)
    assert cache.step.recorded.graph is not None
    with torch.inference_mode():
        start, first = prompted(policy, model)
        step, written = Step(model, start, GREEDY, ()), []
        step.begin(start, torch.from_numpy(first).to(model.device), np.ones(3, bool))
        for _ in range(STEPS):
            step.turn.zero_()
            step.run()
            written.append(step.out[:, 0].cpu().numpy())
    assert (np.stack(written, axis=1) == tokens).all()
    assert drift(logits, step.logits.cpu().numpy()) <= 1e-3


class eager_on_gpu:
    """The eager loop, where `decode` would take the other one."""

    @staticmethod
    def decode(*given: Any, **more: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(static, "qualifies", lambda *_: False)
            return eager.decode(*given, **more)
