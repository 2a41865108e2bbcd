"""framework/calibration.py and `kvtwin filters`: directions by SVD from the definition; files that are not right."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from backends import backends
from experiments.filters import TOKENS, filters_of
from framework.calibration import digest_of, read_filters, write_filters
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
    digest = write_filters(tmp_path / "f", some(), SPEC)
    assert digest == digest_of(tmp_path / "f")
    for wanted in ("", digest):
        read = read_filters(str(tmp_path / "f"), wanted, SPEC)
        assert {key: (value == read[key]).all() for key, value in some().items()} == dict.fromkeys(
            SHAPES, True
        )
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


@pytest.mark.parametrize("backend", ["reference", "torch", "flax"])
def test_the_kept_set_is_that_of_the_product_with_the_filter(backend: str, tmp_path: Path) -> None:
    write_filters(tmp_path / "f", some(), SPEC)
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
    write_filters(path, some(), SPEC)
    arrays = load_file(path)
    if kind == "other":
        write_filters(path, some(), hybrid_spec(ffn=29))
    elif kind == "plain":
        save_file(arrays, path)
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "shape":
        write_filters(path, arrays | {"layers.1": arrays["layers.1"][:1]}, SPEC)
    elif kind == "nan":
        write_filters(path, arrays | {"layers.1": arrays["layers.1"] * np.nan}, SPEC)
    elif kind == "absent":
        path.unlink()
    return str(path)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("other", "holds the filters of another model"),
        ("plain", "is not a file of filters"),
        ("cut", "is not a readable file of filters"),
        ("shape", "the file is damaged"),
        ("nan", "the file is damaged"),
        ("absent", "kvtwin filters MODEL TEXT --out"),
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
def test_other_refusals(
    path: str, digest: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_filters("f", some(), SPEC)
    with pytest.raises(KvtwinError, match=words):
        read_filters(path, digest, SPEC)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KvtwinError, match="cannot write the filters"):
        write_filters(tmp_path / "none" / "f", some(), SPEC)


def test_random_filters_are_unit_vectors_that_depend_on_the_seed() -> None:
    one, again, other = (read_filters(f"random:{seed}", "", SPEC) for seed in (4, 4, 5))
    for key in SHAPES:
        np.testing.assert_allclose(np.linalg.norm(one[key], axis=-1), 1)
        assert (one[key] == again[key]).all()
        assert (one[key] != other[key]).any()
