"""The bundled models: their files, the closed form of `recall`, and what `bytes` is worth on held-out text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

import framework
from framework.models import recall_form as form

MODELS = Path(next(iter(framework.__path__))) / "models"
NAMES = ("bytes", "recall")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights():
    return {
        name: array.astype(np.float64)
        for name, array in load_file(MODELS / "recall/model.safetensors").items()
    }


def forward(weights, tokens, hidden=()):
    """A two-layer Llama in float64, apart from everything else here.

    Returns attention [layers, heads, tokens, tokens] and the last logits [vocab]. The last token does not see `hidden`.
    """
    config = json.loads((MODELS / "recall/config.json").read_text())
    heads, kv_heads, head_dim = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    count, half = len(tokens), head_dim // 2
    angles = np.outer(np.arange(count), config["rope_parameters"]["rope_theta"] ** (-np.arange(half) / half))
    may = np.tril(np.ones((count, count), bool))
    may[-1, list(hidden)] = False

    def norm(x, weight):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config["rms_norm_eps"]) * weight

    def split(x, rows):
        return x.reshape(count, rows, head_dim).swapaxes(0, 1)

    def rotate(x):
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    x = weights["model.embed_tokens.weight"][tokens]
    measured = []
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, weights[at + "input_layernorm.weight"])
        query = rotate(split(h @ weights[at + "self_attn.q_proj.weight"].T, heads))
        key = rotate(split(h @ weights[at + "self_attn.k_proj.weight"].T, kv_heads))
        value = split(h @ weights[at + "self_attn.v_proj.weight"].T, kv_heads)
        group = np.arange(heads) // (heads // kv_heads)
        scores = np.where(may, query @ key[group].swapaxes(1, 2) / np.sqrt(head_dim), -np.inf)
        attention = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attention /= attention.sum(axis=-1, keepdims=True)
        mixed = (attention @ value[group]).swapaxes(0, 1).reshape(count, -1)
        x = x + mixed @ weights[at + "self_attn.o_proj.weight"].T
        h = norm(x, weights[at + "post_attention_layernorm.weight"])
        gate = h @ weights[at + "mlp.gate_proj.weight"].T
        up = h @ weights[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[at + "mlp.down_proj.weight"].T
        measured.append(attention)
    last = norm(x[-1], weights["model.norm.weight"]) @ weights["lm_head.weight"].T
    return np.stack(measured), last


def hugging_face(name):
    return LlamaForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32, attn_implementation="sdpa")


def test_the_models_are_small_and_float16():
    assert sum(path.stat().st_size for name in NAMES for path in (MODELS / name).iterdir()) <= 5_000_000
    for name in NAMES:
        tensors = load_file(MODELS / name / "model.safetensors")
        assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}
        assert all(np.isfinite(array).all() for array in tensors.values())


def test_the_held_out_text_is_small_and_carries_its_license():
    assert (MODELS / "text/held_out.txt").stat().st_size <= 100_000
    notice = (MODELS / "text/NOTICE").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notice
    assert "textwrap.py" in notice


def test_codes_are_far_apart():
    gram = form.codes() @ form.codes().T
    opposite = np.arange(256) ^ 128
    assert (np.diag(gram) == 16).all()
    assert (gram[np.arange(256), opposite] == -16).all()
    gram[np.arange(256), np.arange(256)] = gram[np.arange(256), opposite] = 0
    assert set(np.unique(gram)) == {-4, 0, 4}


@pytest.mark.parametrize(("count", "gap", "rest"), [(4097, 17.5, 3e-7), (form.LONGEST, 11.0, 3e-5)])
@pytest.mark.parametrize("head", [0, 1])
def test_the_distance_heads_are_sharp(head, count, gap, rest):
    scores = form.distance_scores(head, count)
    others = np.delete(scores, head + 1)
    assert scores[head + 1] - others.max() > gap
    assert np.exp(others - scores[head + 1]).sum() < rest


@pytest.mark.parametrize("head", range(form.HEADS))
@pytest.mark.parametrize("layer", range(form.LAYERS))
def test_the_closed_form_is_the_attention(weights, layer, head):
    prompt = form.prompt(np.random.default_rng(5), 131, pairs=7)
    measured, _ = forward(weights, prompt.tokens)
    np.testing.assert_allclose(measured[layer, head], form.attention(prompt.tokens, layer, head), atol=2e-5)


def test_the_closed_form_holds_for_any_ascii_text(weights):
    tokens = np.r_[0, np.random.default_rng(6).integers(1, 128, 97), 0, 3, 3, 3]
    measured, logits = forward(weights, tokens)
    for layer in range(form.LAYERS):
        for head in range(form.HEADS):
            np.testing.assert_allclose(measured[layer, head], form.attention(tokens, layer, head), atol=2e-5)
    assert logits.argmax() == form.predict(tokens)


def test_the_match_head_attends_to_the_value():
    prompt = form.prompt(np.random.default_rng(7), 300, pairs=4)
    weights = form.attention(prompt.tokens, 1, 0, np.array([299]))
    assert weights.shape == (1, 300)
    assert weights[0, prompt.value_position] > 0.999
    assert form.predict(prompt.tokens) == prompt.answer


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("case", "recalled"), [("value", False), ("key", True), ("sink", True), ("all but value", True)]
)
def test_recall_needs_the_slot_of_the_value(weights, seed, case, recalled):
    prompt = form.prompt(np.random.default_rng(seed), 91, pairs=5)
    value = prompt.value_position
    evicted = {
        "value": [value],
        "key": [value - 1],
        "sink": [0],
        "all but value": [position for position in range(90) if position != value],
    }[case]
    kept = np.setdiff1d(np.arange(91), evicted)
    _, logits = forward(weights, prompt.tokens, evicted)
    assert logits.argmax() == form.predict(prompt.tokens, kept) == (prompt.answer if recalled else form.SINK)


@pytest.mark.parametrize(("length", "prompts"), [(64, 9), (512, 5), (4096, 2)])
def test_recall_is_certain(length, prompts):
    model = hugging_face("recall")
    rng = np.random.default_rng(length)
    for _ in range(prompts):
        prompt = form.prompt(rng, length, pairs=11)
        with torch.no_grad():
            logits = model(torch.from_numpy(prompt.tokens)[None], use_cache=False, logits_to_keep=1).logits[
                0, -1
            ]
        best = logits.topk(2)
        assert best.indices[0] == prompt.answer == form.predict(prompt.tokens)
        assert best.values[0] - best.values[1] >= 2


def test_prompts_are_what_they_say():
    first, again = (form.prompt(np.random.default_rng(8), 73, pairs=13) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.tokens.shape == (73,)
    assert first.tokens[0] == form.SINK
    np.testing.assert_array_equal(first.tokens[first.value_positions], first.values)
    np.testing.assert_array_equal(first.tokens[first.value_positions - 1], first.keys)
    assert first.tokens[first.value_position] == first.answer
    assert first.tokens[first.value_position - 1] == first.tokens[-1]
    assert all((first.tokens[:-1] == key).sum() == 1 for key in first.keys)
    assert np.isin(first.tokens, form.KEYS).sum() == 14
    assert (first.tokens[1:] >= 32).all()


def test_the_tightest_prompt_fits():
    prompt = form.prompt(np.random.default_rng(9), 8, pairs=3)
    np.testing.assert_array_equal(prompt.value_positions, [2, 4, 6])


@pytest.mark.parametrize(
    ("length", "pairs", "message"),
    [(7, 3, "need at least 8"), (90, 0, "give 1 to 26"), (90, 27, "give 1 to 26")],
)
def test_prompts_that_do_not_fit_are_refused(length, pairs, message):
    with pytest.raises(ValueError, match=message):
        form.prompt(np.random.default_rng(0), length, pairs)


def test_bytes_predicts_held_out_text():
    model = hugging_face("bytes")
    text = np.frombuffer((MODELS / "text/held_out.txt").read_bytes(), np.uint8).astype(np.int64)
    starts = np.linspace(0, text.size - 513, 24).astype(int)
    windows = torch.from_numpy(np.stack([text[start : start + 513] for start in starts]))
    with torch.no_grad():
        logits = model(windows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert loss.exp() <= 3.5
