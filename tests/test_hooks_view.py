"""Constants, output norms, rotations ahead of the text and by rank: what `score` sees, counted again by loops."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from framework.errors import KvtwinError
from framework.policy import Needs, Policy, View
from framework.spec import ModelSpec
from tests.hooked import (
    BACKENDS,
    GROUP,
    KV_HEADS,
    LENGTHS,
    assert_same,
    begun,
    every_backend,
    evicting,
    fed,
    held,
    tapped,
)
from tests.twins import WINDOW, hybrid, hybrid_weights, prompts

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
