"""framework/calibration.py and `kvtwin filters`: directions by SVD from the definition; files that are not right."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import backends
from experiments.filters import TOKENS, filters_of
from framework.calibration import digest_of, random_arrays, read_arrays, write_arrays
from framework.checkpoint import BUNDLED
from framework.errors import KvtwinError
from tests.twins import hybrid, hybrid_spec

SPEC = hybrid_spec()
SHAPES = {f"layers.{index}": (layer.kv_heads, layer.head_dim) for index, layer in enumerate(SPEC.layers)}


def some(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {key: random.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}


def test_filters_are_the_first_singular_vectors_of_the_queries() -> None:
    model = backends.get("torch").load("bytes")
    text = (BUNDLED / "text" / "held_out.txt").read_text()[: 3 * TOKENS + 7]
    found = filters_of(model, text, pieces=2)
    taps: list[dict[str, np.ndarray]] = [{}, {}]
    ids = model.tokenizer.encode(text)
    for number, tapped in enumerate(taps):
        model.step([ids[number * TOKENS : (number + 1) * TOKENS]], logits=None, taps=tapped)
    for index, layer in enumerate(model.spec.layers):
        name = f"layers.{index}.attention.query_rotated"
        for head in range(layer.kv_heads):
            group = [head * layer.group + one for one in range(layer.group)]
            queries = np.concatenate([tapped[name][0, :, one] for tapped in taps for one in group])
            right = np.linalg.svd(queries.astype(np.float64), full_matrices=False)[2][0]
            right = right * np.sign((queries @ right).mean())
            np.testing.assert_allclose(found[f"layers.{index}"][head], right, atol=1e-4)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(KvtwinError, match=f"has 3 tokens; expected at least {TOKENS}"):
        filters_of(backends.get("torch").load("bytes"), "abc", 4)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    digest = write_arrays(tmp_path / "f", "filters", some(), SPEC)
    assert digest == digest_of(tmp_path / "f")
    for wanted in ("", digest):
        read = read_arrays(str(tmp_path / "f"), wanted, "filters", SPEC)
        assert {key: (value == read[key]).all() for key, value in some().items()} == dict.fromkeys(
            SHAPES, True
        )
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_the_kept_set_is_that_of_the_product_with_the_filter(backend: str, tmp_path: Path) -> None:
    write_arrays(tmp_path / "f", "filters", some(), SPEC)
    model = hybrid(backend)
    tokens = np.random.default_rng(5).permutation(SPEC.vocab)[None, :23]
    taps: dict[str, np.ndarray] = {}
    model.step(tokens, logits=None, taps=taps)
    _, cache = model.step(tokens, model.cache(f"q_filter(budget=6, path={str(tmp_path / 'f')!r})"))
    keys = taps["layers.0.attention.key_rotated"][0]
    for head in range(SPEC.layers[0].kv_heads):
        products = [float(np.dot(key[head], some()["layers.0"][head])) for key in keys]
        best = sorted(sorted(range(23), key=lambda slot: products[slot])[-6:])
        assert cache.kept[0][0, head].tolist() == best


def spoiled(tmp_path: Path, kind: str) -> str:
    path = tmp_path / "f"
    write_arrays(path, "filters", some(), SPEC)
    arrays = load_file(path)
    if kind == "other":
        write_arrays(path, "filters", some(), hybrid_spec(ffn=29))
    elif kind == "gates":
        write_arrays(path, "gates", some(), SPEC)
    elif kind == "plain":
        save_file(arrays, path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "shape":
        write_arrays(path, "filters", arrays | {"layers.1": arrays["layers.1"][:1]}, SPEC)
    elif kind == "nan":
        write_arrays(path, "filters", arrays | {"layers.1": arrays["layers.1"] * np.nan}, SPEC)
    elif kind == "absent":
        path.unlink()
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("other", "holds the filters of another model"),
        ("plain", "is not a file of filters"),
        ("gates", "is not a file of filters"),
        ("cut", "is not a readable file of filters"),
        ("shape", "the file is damaged"),
        ("nan", "the file is damaged"),
        ("absent", "no filters at"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_files_that_are_not_right_are_refused_with_the_cache(
    backend: str, kind: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(KvtwinError, match=words):
        hybrid(backend).cache(f"q_filter(budget=6, path={spoiled(tmp_path, kind)!r})")


@pytest.mark.parametrize(
    ("path", "digest", "words"),
    [
        ("", "", "has no path"),
        ("random:x", "", "names no file and no seed"),
        ("f", "0" * 16, "has the digest"),
    ],
)
@pytest.mark.parametrize("name", ["q_filter", "gate"])
def test_other_refusals(
    name: str, path: str, digest: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_arrays("f", "filters", some(), SPEC)
    with pytest.raises(KvtwinError, match=words):
        hybrid("torch").cache(f"{name}(budget=6, path={path!r}, digest={digest!r})")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtwinError, match="cannot write the filters"):
        write_arrays(tmp_path / "none" / "f", "filters", some(), SPEC)


def test_random_filters_are_unit_vectors_that_depend_on_the_seed() -> None:
    one, again, other = (random_arrays(f"random:{seed}", SHAPES) for seed in (4, 4, 5))
    for key in SHAPES:
        np.testing.assert_allclose(np.linalg.norm(one[key], axis=-1), 1)
        assert (one[key] == again[key]).all()
        assert (one[key] != other[key]).any()


def gates(width: int | None) -> dict[str, np.ndarray]:
    random, result = np.random.default_rng(8), {}
    for index, layer in enumerate(SPEC.layers):
        result[f"layers.{index}.down"] = random.standard_normal((layer.kv_heads, width or SPEC.dim))
        result[f"layers.{index}.down_bias"] = random.standard_normal(layer.kv_heads)
        if width is not None:
            result[f"layers.{index}.up"] = random.standard_normal((width, SPEC.dim))
            result[f"layers.{index}.up_bias"] = random.standard_normal(width)
    return {key: value.astype(np.float32) for key, value in result.items()}


@pytest.mark.parametrize("width", [None, 7])
@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_a_gate_scores_each_token_by_the_network_on_its_hidden_state(
    backend: str, width: int | None, tmp_path: Path
) -> None:
    """By loops over the tokens, at prefill and after five steps; a token keeps the worth that it came with."""
    made = gates(width)
    write_arrays(tmp_path / "g", "gates", made, SPEC)
    model, tokens = hybrid(backend), np.random.default_rng(5).permutation(SPEC.vocab)[None, :28]
    taps: dict[str, np.ndarray] = {}
    model.step(tokens, logits=None, taps=taps)
    worth = []
    for hidden in taps["layers.0.attention_norm"][0]:
        x = hidden
        if width is not None:
            rows = zip(made["layers.0.up"], made["layers.0.up_bias"], strict=True)
            x = np.array([max(0.0, float(row @ hidden) + float(bias)) for row, bias in rows])
        heads = zip(made["layers.0.down"], made["layers.0.down_bias"], strict=True)
        worth.append([float(row @ x) + float(bias) for row, bias in heads])
    _, cache = model.step(tokens[:, :23], model.cache(f"gate(budget=6, path={str(tmp_path / 'g')!r})"))
    held: list[list[int]] = []
    for count in range(23, 29):
        for head in range(SPEC.layers[0].kv_heads):
            before = range(23) if count == 23 else [*held[head], count - 1]
            best = sorted(sorted(before, key=lambda place: worth[place][head])[-6:])
            assert cache.kept[0][0, head].tolist() == best
        held = cache.kept[0][0].tolist()
        if count < 28:
            _, cache = model.step(tokens[:, count : count + 1], cache)


@pytest.mark.parametrize("change", ["down", "up"])
def test_gates_of_another_shape_are_refused(change: str, tmp_path: Path) -> None:
    made = gates(7)
    made[f"layers.1.{change}"] = made[f"layers.1.{change}"][:, :-1]
    write_arrays(tmp_path / "g", "gates", made, SPEC)
    with pytest.raises(KvtwinError, match=f"layers.1.{change} has shape"):
        hybrid("torch").cache(f"gate(budget=6, path={str(tmp_path / 'g')!r})")
