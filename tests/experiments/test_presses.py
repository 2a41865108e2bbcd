"""experiments/presses.py: presses in kvpress' form, written here, against the policies that they are ports of."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from backends import backends
from experiments.presses import kept, press_scores
from framework.errors import KvtwinError
from framework.rope import angles
from framework.weights import random_weights
from tests.kvpress.models import CONFIGS, model
from tests.twins import hybrid, hybrid_spec, hybrid_weights, texts

TOKENS = texts(2)[:, :27]
BUDGET = 9


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class ShortKeys:
    """The norm of a key, without anything else."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return -keys.norm(dim=-1)


class LastQueries:
    """Mean attention of the last 5 queries, pooled over 3: all from the module, as SnapKV's press does it."""

    window = 5

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        heads, kv_heads = module.config.num_attention_heads, module.config.num_key_value_heads
        batch, _, tokens, _ = keys.shape
        q = module.q_proj(hidden_states[:, -self.window :]).view(batch, -1, heads, module.head_dim)
        cos, sin = (x[:, -self.window :, None] for x in kwargs["position_embeddings"])
        q = turned(q, cos, sin).transpose(1, 2)
        k = keys.repeat_interleave(module.num_key_value_groups, 1)
        logits = q @ k.transpose(2, 3) / module.head_dim**0.5
        late = torch.arange(tokens) > torch.arange(tokens - self.window, tokens)[:, None]
        observed = logits.masked_fill(late, -torch.inf).softmax(-1).mean(2)
        observed[..., -self.window :] = 0
        pooled = torch.nn.functional.avg_pool1d(observed, 3, 1, 1)
        scores = pooled.view(batch, kv_heads, -1, tokens).mean(2)
        scores[..., -self.window :] = scores.max() + 1
        return scores


class Received:
    """The sum of the attention that a token received, over the queries and as mean of its heads."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert module.config._attn_implementation == "eager"
        return attentions.sum(2).unflatten(1, (keys.shape[1], -1)).mean(2)


class Written:
    """|W_o v|_1 of each head, by the weight of the output projection."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        heads = module.config.num_attention_heads
        weight = module.o_proj.weight.T.view(heads, module.config.head_dim, module.config.hidden_size)
        through = values.repeat_interleave(module.num_key_value_groups, 1) @ weight
        return through.abs().sum(-1).unflatten(1, (keys.shape[1], -1)).mean(2)


class Reads:
    """Keeps what it is given, to be looked at."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def score(self, *given):
        self.seen.append(given)
        return given[2][..., 0]


@pytest.mark.parametrize(
    ("press", "policy"),
    [
        (ShortKeys(), "key_norm(budget=9)"),
        (LastQueries(), 'snapkv(budget=9, window=5, kernel=3, pooling="mean")'),
    ],
)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_press_and_its_port_agree(name: str, press: Any, policy: str) -> None:
    """Scores where the policy protects nothing, and kept sets; with and without a norm of queries and keys."""
    spec, weights = model(name)
    torch_model, decisions = backends.get("torch").build(spec, weights, "float64"), []
    torch_model.step(TOKENS, torch_model.cache(policy, batch=2), logits=None, decisions=decisions)
    scores = press_scores(torch_model, press, TOKENS)
    assert len(scores) == len(spec.layers)
    for ours, theirs, positions in zip(decisions, scores, kept(scores, BUDGET), strict=True):
        free = ~ours.protected
        assert np.abs(ours.scores - theirs)[free].max() <= 1e-12
        assert (positions == ours.kept[..., :BUDGET]).all()


def test_attention_weights_are_the_models_own() -> None:
    """Those that h2o sums: a window in the second layer, and a soft-cap in both."""
    spec = hybrid_spec()
    spec = replace(spec, layers=tuple(replace(layer, softcap=1.5, scale=0.7) for layer in spec.layers))
    torch_model, decisions = backends.get("torch").build(spec, random_weights(spec, 4), "float64"), []
    torch_model.step(TOKENS, torch_model.cache("h2o(budget=9)", batch=2), logits=None, decisions=decisions)
    for ours, theirs in zip(decisions, press_scores(torch_model, Received(), TOKENS, True), strict=True):
        assert np.abs(ours.scores - theirs).max() <= 1e-12


def test_the_output_projection_has_its_heads_in_order() -> None:
    weights, taps = hybrid_weights(), {}
    hybrid("torch").step(TOKENS, logits=None, taps=taps)
    scores = press_scores(hybrid("torch"), Written(), TOKENS)
    output = weights["layers.1.attention.output.weight"].astype(np.float64)  # [dim, heads * head_dim]
    value = taps["layers.1.attention.value"][1, 20, 0]
    norms = [np.abs(output[:, head * 8 : head * 8 + 8] @ value).sum() for head in range(3)]
    assert scores[1][1, 0, 20] == pytest.approx(np.mean(norms), rel=1e-12)


def test_what_a_press_is_given() -> None:
    press, taps = Reads(), {}
    torch_model = hybrid("torch", "float32")
    torch_model.step(TOKENS, logits=None, taps=taps)
    press_scores(torch_model, press, TOKENS)
    assert [given[0].layer_idx for given in press.seen] == [0, 1]
    module, hidden, keys, values, attentions, kwargs = press.seen[1]
    assert (hidden.shape, keys.shape, values.shape) == ((2, 27, 20), (2, 2, 27, 8), (2, 2, 27, 8))
    assert hidden.dtype == keys.dtype == torch.float32
    assert attentions is None
    assert module.config._attn_implementation == "sdpa"
    assert kwargs["cache_position"].tolist() == list(range(27))
    assert (hidden.numpy() == taps["layers.1.attention_norm"]).all()
    raw = module.k_proj(hidden).unflatten(-1, (2, 8))
    cos, sin = (x[:, :, None] for x in kwargs["position_embeddings"])
    assert turned(raw, cos, sin).transpose(1, 2).numpy() == pytest.approx(keys.numpy(), abs=1e-5)
    assert module.v_proj(hidden).unflatten(-1, (2, 8)).transpose(1, 2).numpy() == pytest.approx(
        values.numpy()
    )
    ahead = module.rotary_emb(hidden, torch.tensor([[5, 900]]))
    for one, right in zip(ahead, angles(module.layer.rope, np.array([[5, 900]])), strict=True):
        assert one.numpy() == pytest.approx(np.concatenate([right, right], -1), abs=1e-6)


def test_kept_is_the_rule_of_eviction() -> None:
    """In order, the newer of equal scores, -1 where there are fewer."""
    scores = [np.array([[[3.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]]])]
    assert kept(scores, 3)[0].tolist() == [[[0, 2, 3], [1, 2, 3]]]
    assert kept(scores, 5)[0].tolist() == [[[0, 1, 2, 3, -1]] * 2]


def test_a_cache_goes_on_from_what_a_press_keeps() -> None:
    torch_model = hybrid("torch")
    positions = kept(press_scores(torch_model, LastQueries(), TOKENS), BUDGET)
    cached = torch_model.cache("random(budget=9)", batch=2)
    _, cached = torch_model.step(TOKENS, cached, forced=positions)
    assert (cached.kept[0] == positions[0]).all()
    logits, cached = torch_model.step(texts(2)[:, 27:28], cached)
    assert np.isfinite(logits).all()
    assert (cached.kept[0] >= 0).sum(-1).tolist() == [[BUDGET] * 2] * 2


@pytest.mark.parametrize(
    ("backend", "tokens", "press", "message"),
    [
        ("flax", TOKENS, ShortKeys(), "torch backend"),
        ("torch", np.where(TOKENS == TOKENS[0, 3], -1, TOKENS), ShortKeys(), "no padding"),
    ],
)
def test_what_cannot_be_scored_is_refused(backend: str, tokens: Any, press: Any, message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        press_scores(hybrid(backend), press, tokens)


def test_scores_of_another_shape_are_refused() -> None:
    class PerQueryHead:
        def score(self, module, hidden_states, keys, values, attentions, kwargs):
            return keys.norm(dim=-1).repeat_interleave(3, 1)

    with pytest.raises(
        KvtwinError, match=r"PerQueryHead scored \(2, 6, 27\) in layer 0; expected .*\(2, 2, 27\)"
    ):
        press_scores(hybrid("torch"), PerQueryHead(), TOKENS)
