"""Codecs in caches: what is read, what is exact, what moves, and what is refused, on three implementations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
import pytest
import torch

import backends.flax.attention
import backends.torch.attention
from backends import backends as every_backend_there_is
from framework.backend import Model
from framework.cache import Cache
from framework.codec import Codec, codecs
from framework.codecs.kvquant import Kvquant
from framework.codecs.unbias import Unbias
from framework.coding import SIDES, shown, stored
from framework.compare import TOLERANCE, drift
from framework.errors import KvtwinError
from framework.policy import policies
from framework.snapshot import Snapshot
from framework.spec import ModelSpec
from framework.weights import Weights, random_weights
from tests.twins import column, compilations, hybrid_spec, prompts, snapshot_drift, unchecked

LENGTHS = (13, 16, 9)  # one compiled shape: flax lays prompts out in steps of 16 tokens
STEPS = 9
EXACT = TOLERANCE["float64"]
slow_on_flax = pytest.mark.parametrize(
    "backend", ["reference", "torch", pytest.param("flax", marks=pytest.mark.slow)]
)


@dataclass(frozen=True, kw_only=True)
class Turned(Codec):
    """A codec with every part of the contract: a factor, a turn, a width of its own, and heads together if asked."""

    jointly: bool = False
    turning: bool = True

    def joint(self, layer: Any) -> bool:
        return self.jointly

    def encode(self, xp: Any, x: Any, side: Any) -> dict[str, Any]:
        if self.turning:
            x = xp.concat([x[..., 1:], -x[..., :1]], axis=-1)
        most, steps = xp.max(xp.abs(x), axis=-1, keepdims=True), 60 if side == "keys" else 50
        codes = xp.round(x / xp.where(most == 0, 1.0, most) * steps)
        return {"codes": xp.astype(codes, xp.int8), "scales": most * float(np.float32(1 / steps))}

    def read(self, xp: Any, parts: Any, side: Any) -> Any:
        return xp.astype(parts["codes"], xp.float32)

    def scale(self, xp: Any, parts: Any, side: Any) -> Any:
        return parts["scales"][..., 0]

    def turn(self, width: int, side: Any) -> np.ndarray | None:
        if not self.turning:
            return None
        back = np.roll(np.eye(width, dtype=np.float32), 1, axis=1)
        back[-1] *= -1
        return back

    def bits_of(self, width: int, side: Any, itemsize: int) -> tuple[float, float]:
        return 8.0 * width, 32.0


TOYS = [Turned(), Turned(turning=False), Unbias(codec=Turned())]
TOGETHER = Turned(jointly=True)
REAL = [each for name in codecs.names() for each in codecs.get(name).examples()]
CODED = [each for each in REAL if not each.exact]
# What flax compiles for another example of a codec, or for groups (tests/test_groups.py), shows nothing new.
COMPILED = [
    one for name in codecs.names() if not (one := codecs.get(name).examples()[0]).exact and not one.together
]


def wide_spec() -> ModelSpec:
    """`hybrid_spec` with heads of 64 channels, as most codecs want them, and biases."""
    small = hybrid_spec()
    layers = tuple(
        replace(layer, head_dim=64, scale=0.125, rope=replace(layer.rope, dim=64)) for layer in small.layers
    )
    return replace(small, layers=layers, qkv_bias=True)


@cache
def weights(seed: int = 3) -> Weights:
    return random_weights(wide_spec(), seed, np.float32)


@cache
def model(backend: str, dtype: str = "float64") -> Model:
    return every_backend_there_is.get(backend).build(wide_spec(), weights(), dtype)


def rolling(
    backend: str, policy: str, codec: Codec | str, steps: int = STEPS, lengths: Sequence[int] = LENGTHS,
    dtype: str = "float64",
) -> tuple[list[np.ndarray], Cache]:  # fmt: skip
    """Logits of a ragged prompt in two calls and of some steps, and the cache."""
    runner = model(backend, dtype)
    cache, text = runner.cache(policy, codec, len(lengths)), prompts(lengths)
    first, cache = runner.step(text[:, :7], cache, logits="all", phase="prefill", evict=False)
    second, cache = runner.step(text[:, 7:], cache, logits="all", phase="prefill")
    found = [first, second]
    for step in range(steps):
        logits, cache = runner.step(column(step, lengths), cache)
        found.append(logits)
    return found, cache


def key_bias(index: int, positions: np.ndarray) -> np.ndarray:
    """The bias of the key projection, each pair of channels turned by its own angle at these positions."""
    bias = weights()[f"layers.{index}.attention.key.bias"].astype(np.float64).reshape(1, 2, 1, 64)
    result = np.zeros((*positions.shape, 64))
    for pair in range(32):
        angle = np.maximum(positions, 0) * 500.0 ** (-2 * pair / 64)
        one, other = bias[..., pair], bias[..., pair + 32]
        result[..., pair] = one * np.cos(angle) - other * np.sin(angle)
        result[..., pair + 32] = other * np.cos(angle) + one * np.sin(angle)
    return result


def with_new_ones_coded(held: Snapshot, before: np.ndarray, codec: Codec) -> Snapshot:
    """An exact cache in which the tokens from position `before` on are what a codec gives back."""
    layers = []
    for index, (spec, layer) in enumerate(zip(held.spec.layers, held.layers, strict=True)):
        left = {"keys": key_bias(index, layer.positions) * codec.unbiased, "values": 0}
        made = stored(codec, xp, spec, {key: x - left[key] for key, x in layer.streams.items()})
        new = (layer.positions >= before[:, None, None])[..., None]
        read = {side: shown(codec, xp, spec, made, side, np.float64) + left[side] for side in SIDES}
        streams = {key: np.where(new, read[key], x) for key, x in layer.streams.items()}
        layers.append(replace(layer, streams=streams))
    return replace(held, layers=tuple(layers))


# What these policies choose does not depend on whether keys and values of the call itself are coded already.
SIMPLE = ["full()", "h2o(budget=9)", "window(budget=7, sinks=2, interval=3)"]
SHARED = ["full()", "tova(budget=9)"]


@pytest.mark.parametrize("policy", SIMPLE)
@pytest.mark.parametrize("codec", TOYS, ids=str)
@slow_on_flax
def test_a_call_is_exact_for_itself_and_coded_for_the_next(
    backend: str, codec: Codec | str, policy: str
) -> None:
    """An exact cache whose newest tokens are coded by hand after every call gives the same logits."""
    found, _ = rolling(backend, policy, codec)
    runner, text = model("reference"), prompts(LENGTHS)
    cache = runner.cache(policy, batch=3)
    calls = [
        (text[:, :7], False),
        (text[:, 7:], True),
        *((column(step, LENGTHS), True) for step in range(STEPS)),
    ]
    for number, (tokens, evict) in enumerate(calls):
        before, phase = cache.seen, "prefill" if number < 2 else "decode"
        logits, cache = runner.step(
            tokens, cache, logits="all" if number < 2 else "last", phase=phase, evict=evict
        )
        assert drift(found[number], logits) <= EXACT
        cache = runner.restore(with_new_ones_coded(cache.snapshot(), before, codec))


EVERY = [
    *SIMPLE,
    "snapkv(budget=9, window=3, kernel=3)",
    "tova(budget=9)",
    "adakv(budget=9, interval=3, policy=snapkv(window=3, kernel=3))",
    "adakv(budget=20, floor=0.1, policy=h2o())",
    "reposition(budget=8, interval=3, policy=h2o())",
]
FEW = ["h2o(budget=9)", "adakv(budget=9, interval=3, policy=snapkv(window=3, kernel=3))"]


AGREE = [
    *((policy, codec) for codec in (TOYS[0], TOYS[2]) for policy in EVERY),
    *(("tova(budget=9)", codec) for codec in CODED),
]
FAST = [(FEW[0], TOYS[0]), (FEW[1], TOYS[2])]  # of the compiled ones


@pytest.mark.parametrize(
    ("backend", "policy", "codec"),
    [("torch", *each) for each in AGREE]
    + [
        pytest.param("flax", policy, codec, marks=[] if (policy, codec) in FAST else [pytest.mark.slow])
        for policy, codec in AGREE
        if codec in TOYS or codec in COMPILED
    ],
    ids=str,
)
def test_backends_agree_with_the_reference(backend: str, policy: str, codec: Codec | str) -> None:
    """Logits at every step, kept positions, and the codes themselves; ragged rows, a window, chunks."""
    expected, theirs = rolling("reference", policy, codec)
    found, ours = rolling(backend, policy, codec)
    assert max(drift(one, other) for one, other in zip(found, expected, strict=True)) <= EXACT
    assert snapshot_drift(ours, theirs) <= EXACT
    assert all(
        one.dtype == layer.streams[key].dtype
        for saved, layer in zip(ours.snapshot().layers, theirs.snapshot().layers, strict=True)
        for key, one in saved.streams.items()
    )


@pytest.mark.parametrize("policy", SHARED)
@slow_on_flax
def test_heads_that_are_coded_together(backend: str, policy: str) -> None:
    expected, theirs = rolling("reference", policy, TOGETHER)
    found, ours = rolling(backend, policy, TOGETHER)
    apart, _ = rolling("reference", policy, TOYS[0])
    assert max(drift(one, other) for one, other in zip(found, expected, strict=True)) <= EXACT
    assert snapshot_drift(ours, theirs) <= EXACT
    assert [x.shape[1] for x in ours.snapshot().layers[0].streams.values()] == [1] * 4
    assert (
        max(drift(one, other) for one, other in zip(found, apart, strict=True)) > 1e-4
    )  # one scale for both


@pytest.mark.parametrize("codec", [*TOYS[:1], *CODED], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_bytes_are_what_the_codec_says(backend: str, codec: Codec) -> None:
    """Payload and scales per token and per group, and what is exact as well, by the formula."""
    _, cache = rolling(backend, "full()", codec, 2)
    held, itemsize = 0, 8
    expected = np.zeros(2)
    for layer, kept in zip(cache.spec.layers, cache.kept, strict=True):
        held = int((kept >= 0).sum()) // layer.kv_heads
        heads, width = (1, layer.kv_heads * 64) if codec.joint(layer) else (layer.kv_heads, 64)
        for side in SIDES:
            expected += held * heads * np.array(codec.bits_of(width, side, itemsize)) / 8
        newest = (kept >= 0) & (kept >= cache.seen[:, None, None] - codec.recent)
        expected += (
            newest.sum() * 2 * 64 * itemsize * (codec.recent > 0),
            codec.regroups * kept[..., 0].size * 4,
        )
    expected[1] += sum(one.groups for one in cache.groups) * codec.group_bits(64, itemsize) / 8
    assert (cache.bytes.payload, cache.bytes.scales) == tuple(expected)


@pytest.mark.parametrize("policy", ["h2o(budget=9)", FEW[1], "tova(budget=9)"])
@slow_on_flax
def test_a_cache_lives_on_as_another(backend: str, policy: str, tmp_path: Path) -> None:
    """Forks, picked rows, and files read by the same and by another backend go on with the same logits and codes."""
    codec = TOGETHER if "tova" in policy else TOYS[0]
    runner = model(backend)
    _, cache = rolling(backend, policy, codec, 2)
    cache.save(tmp_path / "cache.safetensors")
    restored = runner.restore(tmp_path / "cache.safetensors")
    foreign = model("reference").restore(tmp_path / "cache.safetensors")
    assert snapshot_drift(restored, cache) == 0.0
    assert snapshot_drift(foreign, cache) == 0.0
    forked, picked = cache.fork(), cache.rows([2, 0])
    tokens = column(2, LENGTHS)
    expected, after = runner.step(tokens, cache)
    for each in (forked, restored, foreign):
        found, each = (model("reference") if each is foreign else runner).step(tokens, each)
        assert drift(found, expected) <= EXACT
        assert snapshot_drift(each, after) <= EXACT
    assert drift(runner.step(tokens[[2, 0]], picked)[0], expected[[2, 0]]) <= EXACT


@pytest.mark.parametrize("codec", [TOYS[0], TOGETHER], ids=str)
@slow_on_flax
def test_tokens_are_taken_back(backend: str, codec: Codec) -> None:
    """As if they had never come; the window is longer than these texts."""
    lengths, runner = (6, 8, 5), model(backend)
    _, cache = rolling(backend, "full()", codec, 2, lengths)
    straight = cache.fork()
    _, longer = runner.step(column(2, lengths), cache)
    assert snapshot_drift(longer.roll_back(1), straight) == 0.0


@pytest.mark.parametrize(
    ("backend", "policy", "codec"),
    [
        ("torch", "full()", TOYS[0]),
        ("torch", "h2o(budget=24)", TOYS[0]),
        ("torch", "full()", "quanto()"),
        ("torch", "h2o(budget=24)", Kvquant(group=4, residual=8)),
        ("flax", "h2o(budget=55)", "full()"),
        pytest.param("flax", "full()", "full()", marks=pytest.mark.slow),
        pytest.param("flax", "full()", TOYS[0], marks=pytest.mark.slow),
        pytest.param("flax", "h2o(budget=24)", TOYS[0], marks=pytest.mark.slow),
        pytest.param("flax", "full()", "quanto()", marks=pytest.mark.slow),
        pytest.param("flax", "h2o(budget=24)", Kvquant(group=4, residual=8), marks=pytest.mark.slow),
    ],
)
def test_blocks_of_slots_and_queries_mean_nothing(
    backend: str, policy: str, codec: Codec | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention in short blocks, some of them not full, gives what the reference gives."""
    lengths = (61, 80, 44)
    module = getattr(backends, backend).attention
    monkeypatch.setattr(module, "SPAN", 24)
    if backend == "torch":
        monkeypatch.setattr(module, "BLOCK", 32)
    else:
        monkeypatch.setattr(module, "ON_CPU", module.Way(32, True))
        monkeypatch.setattr(module, "STEP", 16)
        monkeypatch.setattr(module, "RUNG", 40)
    with unchecked():
        expected, theirs = rolling("reference", policy, codec, 3, lengths)
        found, ours = rolling(backend, policy, codec, 3, lengths)
    assert max(drift(one, other) for one, other in zip(found, expected, strict=True)) <= EXACT
    assert snapshot_drift(ours, theirs) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("codec", [TOYS[0], "unbias(codec=exl2_q4())", "kivi(group=2, residual=4)"], ids=str)
def test_budgets_of_a_bucket_share_what_is_compiled(codec: Codec | str) -> None:
    rolling("flax", "tova(budget=17)", codec, 2, dtype="float32")
    with compilations() as seen:
        rolling("flax", "tova(budget=19)", codec, 2, dtype="float32")
    assert not seen


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 0)])
@slow_on_flax
def test_what_cannot_be_coded_is_an_error(backend: str, layer: int, head: int) -> None:
    """It names the codec, the layer and the head."""
    bad = {key: value.copy() for key, value in weights().items()}
    bad[f"layers.{layer}.attention.value.weight"][64 * head + 5] = np.inf
    runner = every_backend_there_is.get(backend).build(wide_spec(), bad, "float64")
    with np.errstate(all="ignore"), pytest.raises(KvtwinError, match=rf"layer {layer}, head {head} made"):
        runner.step(prompts(LENGTHS), runner.cache("full()", TOYS[0], 3))


@cache
def spoiled(backend: str) -> Model:
    """The model, in which the last token has a key that is not finite."""
    bad = {key: value.copy() for key, value in weights().items()}
    bad["embed.weight"][-1] = np.inf
    return every_backend_there_is.get(backend).build(wide_spec(), bad, "float64")


@pytest.mark.parametrize(
    ("policy", "codec"),
    [
        ("h2o(budget=9)", TOYS[0]),
        ("h2o(budget=7, interval=2)", "kivi(group=2, residual=2)"),
        ("adakv(budget=9, policy=snapkv(window=2))", "int8()"),
        ("full()", "kvquant(group=4, residual=4)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [1, 3])
@slow_on_flax
def test_a_refused_call_leaves_its_cache_as_it_was(
    backend: str, policy: str, codec: Codec | str, wide: int
) -> None:
    """Its only trace is the error. A step of the compiled loop gave its buffers away, and says so."""
    runner = spoiled(backend)
    last = wide_spec().vocab - 1
    _, held = runner.step(np.minimum(prompts(LENGTHS), last - 1), runner.cache(policy, codec, 3))
    for step in range(5):
        _, held = runner.step(np.minimum(column(step), last - 1), held)
    before, other = held.snapshot(), held.fork()
    call = np.minimum(np.stack([column(5 + each)[:, 0] for each in range(wide)], axis=1), last - 1)
    bad = call.copy()
    bad[1, -1] = last
    with (
        np.errstate(all="ignore"),
        pytest.raises(KvtwinError, match="cannot code what layer 0, head 0 made") as found,
    ):
        runner.step(bad, held, phase="decode")
    if backend == "flax" and wide == 1:
        assert "its cache is spent: fork() before such calls" in str(found.value)
        with pytest.raises(KvtwinError, match="was consumed"):
            held.snapshot()
        return
    assert "its cache is as it was before the call" in str(found.value)
    for one, same in zip(held.snapshot().layers, before.layers, strict=True):
        for kind in ("streams", "memory", "heads", "tables"):
            ours, theirs = getattr(one, kind), getattr(same, kind)
            assert all((ours[key] == theirs[key]).all() for key in theirs)
        np.testing.assert_array_equal(one.positions, same.positions)
    logits, after = runner.step(call, held, phase="decode")
    expected, straight = runner.step(call, other, phase="decode")
    assert drift(logits, expected) == 0.0
    assert snapshot_drift(after, straight) == 0.0


@slow_on_flax
def test_padding_is_not_judged(backend: str) -> None:
    """Rows without the token whose key cannot be coded; padding is computed as some token."""
    bad = {key: value.copy() for key, value in weights().items()}
    bad["embed.weight"][1:, 0] = 0
    bad["layers.0.attention.key.weight"][:, 0] = 1e8
    runner = every_backend_there_is.get(backend).build(wide_spec(), bad, "float64")
    rows = [[5, 6, 7, 8], [9, 10]]
    with np.errstate(over="ignore"):
        logits, cache = runner.step(rows, runner.cache("full()", "fp16()", 2))
        assert np.isfinite(logits).all()
        with pytest.raises(KvtwinError, match="layer 0, head 0 made"):
            runner.step([[0], [3]], cache)


@pytest.mark.parametrize("codec", [each for each in CODED if not each.joint(wide_spec().layers[0])], ids=str)
def test_a_row_may_be_silent(codec: Codec) -> None:
    """Every codec meets a step that gives a row of the reference nothing."""
    runner = model("reference")
    _, cache = runner.step([[5, 6, 7], [9, 10]], runner.cache("full()", codec, 2))
    silent, cache = runner.step([[5], [-1]], cache)
    assert silent[0].any()
    assert not silent[1].any()
    assert runner.restore(runner.cache("full()", codec, 2).snapshot()).seen.tolist() == [0, 0]


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_forced_sets_of_heads_that_are_coded_together_agree(backend: str) -> None:
    runner, text = model(backend), prompts((16, 16, 16))
    forced = [np.stack([np.arange(6), np.arange(10, 16)])[None].repeat(3, axis=0)] * 2
    with pytest.raises(KvtwinError, match="a forced set differs between heads, and codec .*Turned"):
        runner.step(text, runner.cache("tova(budget=6)", TOGETHER, 3), forced=forced)


@pytest.mark.parametrize("codec", ["exl3()", TOGETHER], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_no_byte_is_lost_where_heads_share_theirs(backend: str, codec: Codec | str) -> None:
    """8 kv heads of 20 channels: 5 scales of a token do not divide by its heads."""
    layer = replace(wide_spec().layers[0], heads=8, kv_heads=8, head_dim=20, rope=None)
    spec = replace(wide_spec(), layers=(layer,) * 2)
    runner = every_backend_there_is.get(backend).build(spec, random_weights(spec, 1, np.float32), "float32")
    _, cache = runner.step(np.arange(51)[None].astype(np.int32), runner.cache("full()", codec))
    kept = [each for one in cache.snapshot().layers for each in one.streams.items()]
    scales = sum(x.nbytes for key, x in kept if not key.endswith("codes"))
    assert (cache.bytes.scales, cache.bytes.payload) == (scales, sum(x.nbytes for _, x in kept) - scales)


def test_a_long_call_behind_codes_keeps_no_weights_for_its_gradient() -> None:
    """Blocks are computed again: what is saved for the backward pass does not grow with tokens x slots."""
    runner, saved = model("torch", "float32"), []
    text = np.resize(np.arange(700), (1, 1024)).astype(np.int32)

    def count(x: Any) -> Any:
        saved.append(x.nbytes)
        return x

    for codec in ("full()", "int8()"):
        saved.append(0)
        _, cache = runner.step(text, runner.cache("full()", codec), logits=None)
        before = sum(saved)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), unchecked():
            runner.gradients(text, cache)
        saved[:] = [sum(saved) - before] if codec == "full()" else [saved[0], sum(saved) - before]
    assert saved[1] < 3 * saved[0]


@pytest.mark.parametrize("codec", [TOYS[0], TOYS[2]], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_gradients_behind_codes(backend: str, codec: Codec) -> None:
    """As the reference has them: keys and values of the call are exact, those before it are read from codes."""
    ahead = prompts((11, 14, 12))[:, ::-1].copy()
    held = {each: rolling(each, "h2o(budget=9)", codec, 1)[1] for each in ("reference", backend)}
    found, expected = (model(each).gradients(ahead, cache) for each, cache in reversed(held.items()))
    for one, other in zip(found, expected, strict=True):
        assert drift(one, other) <= 1e-9


@pytest.mark.parametrize("codec", [3, None, Turned])
@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_what_is_no_codec_is_refused(backend: str, codec: Any) -> None:
    with unchecked(), pytest.raises(KvtwinError, match="expected a codec or its spelling"):
        model(backend).cache("full()", codec)


@pytest.mark.parametrize(
    ("policy", "codec", "message"),
    [
        ("h2o(budget=9)", TOGETHER, "chooses for each head; expected a policy that keeps one set"),
        ("kvmerger(budget=9)", TOYS[0], "blends what it evicts into stored slots"),
        ("full()", "q4()", "no codec is called 'q4'"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_what_does_not_go_together_is_refused(
    backend: str, policy: str, codec: Codec | str, message: str
) -> None:
    with pytest.raises(KvtwinError, match=message):
        model(backend).cache(policy, codec)


def test_a_file_whose_codes_have_another_form_is_refused(tmp_path: Path) -> None:
    runner = model("torch")
    _, cache = rolling("torch", "full()", TOYS[0], 1)
    held = cache.snapshot()
    codes = held.layers[1].streams["keys.codes"].astype(np.int16)
    other = replace(held.layers[1], streams=held.layers[1].streams | {"keys.codes": codes})
    replace(held, layers=(held.layers[0], other)).save(tmp_path / "cache.safetensors")
    with pytest.raises(KvtwinError, match=r"1.stream.keys.codes has dtype int16; expected int8"):
        runner.restore(tmp_path / "cache.safetensors")


def test_a_policy_reads_what_the_model_will_read() -> None:
    """key_norm under a codec that halves the keys of one channel keeps what it would keep of such keys."""
    assert policies.make("key_norm(budget=9)").needs.keys
    _, cache = rolling("reference", "key_norm(budget=9)", TOYS[0], 0)
    held = cache.snapshot().layers[0]
    spec = wide_spec().layers[0]
    read = shown(TOYS[0], xp, spec, held.streams, "keys", np.float64)
    _, full = rolling("reference", "full()", TOYS[0], 0)
    every = full.snapshot().layers[0]
    norms = np.linalg.norm(shown(TOYS[0], xp, spec, every.streams, "keys", np.float64), axis=-1)
    for row in range(3):
        for head in range(2):
            lowest = np.argsort(norms[row, head, : LENGTHS[row]], kind="stable")[:9]
            assert set(held.positions[row, head]) == set(lowest)
    assert read.shape == (3, 2, 9, 64)
