"""Weights on disk: bit-equal round trips in every dtype, shards, and every way in which a folder can be wrong."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from framework.errors import KvtwinError
from framework.family import families
from framework.spec import ModelSpec
from framework.weights import INDEX, SINGLE, Stored, Weights, check, random_weights, read, shapes, write
from tests.tiny import FAMILIES, huggingface, huggingface_logits, tiny_config, tiny_model, tiny_tokens

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
HEAD = "lm_head.weight"


def _assert_equal(found: Mapping[str, np.ndarray], expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name].view(np.uint8), value.view(np.uint8), err_msg=name)


def _read(folder: Path, spec: ModelSpec) -> Stored:
    return read(folder, spec, families.get(spec.family)())


@pytest.fixture
def untied() -> tuple[ModelSpec, Weights]:
    spec = replace(tiny_model("llama", 0)[0], tied=False, qkv_bias=True, output_bias=True)
    return spec, random_weights(spec, 5, np.float32)


@pytest.fixture
def folder(tmp_path: Path, untied: tuple[ModelSpec, Weights]) -> Path:
    write(tmp_path / "model", *untied)
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_round_trip_is_bit_equal(tmp_path: Path, model_type: str, dtype: Any) -> None:
    spec, weights = tiny_model(model_type, 1, dtype=dtype)
    write(tmp_path / "new" / "model", spec, weights)
    _assert_equal(_read(tmp_path / "new" / "model", spec), weights)
    assert (
        json.loads((tmp_path / "new" / "model" / "config.json").read_text())["dtype"] == np.dtype(dtype).name
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_hugging_face_reads_a_written_folder(tmp_path: Path, model_type: str) -> None:
    spec, weights = tiny_model(model_type, 2)
    write(tmp_path / "model", spec, weights)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, attn_implementation="eager"
    )
    tokens = tiny_tokens(spec, 2)
    expected = huggingface_logits(huggingface(tiny_config(model_type, 2), weights), tokens)
    np.testing.assert_array_equal(huggingface_logits(theirs, tokens), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_shards_that_hugging_face_writes(tmp_path: Path, model_type: str) -> None:
    spec, weights = tiny_model(model_type, 3)
    huggingface(tiny_config(model_type, 3), weights).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _assert_equal(_read(tmp_path, spec), weights)


def test_bytes_that_lie_out_of_order_are_written_right(
    tmp_path: Path, untied: tuple[ModelSpec, Weights]
) -> None:
    spec, weights = untied
    write(tmp_path / "model", spec, {name: np.asfortranarray(value) for name, value in weights.items()})
    _assert_equal(_read(tmp_path / "model", spec), weights)


# What check and read report.


def test_all_faults_at_once(folder: Path, untied: tuple[ModelSpec, Weights]) -> None:
    spec, weights = untied
    stored = load_file(folder / SINGLE)
    stored.pop("model.norm.weight")
    stored["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 2), np.float32)
    stored["model.layers.0.surprise"] = np.zeros(9, np.float32)
    save_file(stored, folder / SINGLE)
    with pytest.raises(KvtwinError) as caught:
        _read(folder, spec)
    assert str(caught.value).splitlines() == [
        f"the tensors do not fit the spec: 1 missing: norm.weight (model.norm.weight) [{spec.dim}]",
        "1 unexpected: model.layers.0.surprise [9]",
        "1 misshapen: layers.0.ffn.up.weight (model.layers.0.mlp.up_proj.weight) is [3, 2], "
        f"expected [{spec.ffn}, {spec.dim}]",
    ]


def test_long_lists_are_cut_with_a_count(untied: tuple[ModelSpec, Weights]) -> None:
    with pytest.raises(
        KvtwinError, match=rf"{len(shapes(untied[0]))} missing: .*; and {len(untied[1]) - 6} more$"
    ):
        check(untied[0], {})


def test_weights_that_fit_pass_the_check(untied: tuple[ModelSpec, Weights]) -> None:
    check(*untied)


def test_rotary_buffers_of_old_checkpoints_are_ignored(
    folder: Path, untied: tuple[ModelSpec, Weights]
) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.arange(4)}
    save_file(load_file(folder / SINGLE) | extra, folder / SINGLE)
    _assert_equal(_read(folder, untied[0]), untied[1])


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, ModelSpec, Weights]:
    spec = replace(tiny_model("llama", 0)[0], tied=True)
    weights = random_weights(spec, 6)
    write(tmp_path / "tied", spec, weights)
    return tmp_path / "tied", spec, weights


def test_a_tied_head_stored_anyway_is_accepted(tied: tuple[Path, ModelSpec, Weights]) -> None:
    folder, spec, weights = tied
    save_file(load_file(folder / SINGLE) | {HEAD: weights["embed.weight"]}, folder / SINGLE)
    _assert_equal(_read(folder, spec), weights)


def test_a_tied_head_that_differs_is_refused(tied: tuple[Path, ModelSpec, Weights]) -> None:
    folder, spec, weights = tied
    save_file(load_file(folder / SINGLE) | {HEAD: weights["embed.weight"] + 1}, folder / SINGLE)
    with pytest.raises(KvtwinError, match=r"lm_head.weight differs from the embeddings"):
        _read(folder, spec)


@pytest.mark.parametrize("dtype", [np.int8, np.complex64])
def test_other_dtypes_are_refused(folder: Path, untied: tuple[ModelSpec, Weights], dtype: Any) -> None:
    stored = load_file(folder / SINGLE)
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(dtype)
    save_file(stored, folder / SINGLE)
    with pytest.raises(
        KvtwinError, match=r"not implemented: model.norm.weight (I8|C64)\nexpected float64, float32"
    ):
        _read(folder, untied[0])
    wrong = untied[1] | {"norm.weight": untied[1]["norm.weight"].astype(dtype)}
    with pytest.raises(KvtwinError, match=r"cannot be written: norm.weight (int8|complex64)"):
        write(folder.parent / "other", untied[0], wrong)


# Damaged folders.


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data + b"more",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        lambda data: data[:8] + b"x" * (len(data) - 8),
    ],
    ids=["short by one", "half", "header only", "empty", "longer", "pointer", "no json"],
)
def test_a_damaged_file_is_named(folder: Path, untied: tuple[ModelSpec, Weights], damage: Any) -> None:
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    with pytest.raises(KvtwinError, match=r"model.safetensors is not a whole safetensors file") as caught:
        _read(folder, untied[0])
    assert len(str(caught.value).splitlines()) <= 3


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The folder with its file cut into two shards and an index."""
    stored = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = list(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: stored[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_two_shards(sharded: Path, untied: tuple[ModelSpec, Weights]) -> None:
    _assert_equal(_read(sharded, untied[0]), untied[1])


def test_a_missing_shard(sharded: Path, untied: tuple[ModelSpec, Weights]) -> None:
    (sharded / "b.safetensors").unlink()
    with pytest.raises(KvtwinError, match=r"names b.safetensors, which is not in"):
        _read(sharded, untied[0])


def test_a_damaged_shard(sharded: Path, untied: tuple[ModelSpec, Weights]) -> None:
    (sharded / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(KvtwinError, match=r"b.safetensors is not a whole safetensors file"):
        _read(sharded, untied[0])


def test_an_index_that_names_a_tensor_its_file_lacks(
    sharded: Path, untied: tuple[ModelSpec, Weights]
) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.ghost"] = "a.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(KvtwinError, match=r"do not hold: model.ghost in a.safetensors"):
        _read(sharded, untied[0])


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map(sharded: Path, untied: tuple[ModelSpec, Weights], text: str) -> None:
    (sharded / INDEX).write_text(text)
    with pytest.raises(KvtwinError, match="has no weight_map"):
        _read(sharded, untied[0])


def test_an_index_that_leaves_the_folder(sharded: Path, untied: tuple[ModelSpec, Weights]) -> None:
    (sharded / "a.safetensors").rename(sharded.parent / "a.safetensors")
    (sharded / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(KvtwinError, match="which is not in"):
        _read(sharded, untied[0])


def test_a_folder_with_another_format(folder: Path, untied: tuple[ModelSpec, Weights]) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(KvtwinError, match=r"it holds config.json; pytorch_model.bin\nexpected safetensors"):
        _read(folder, untied[0])


# The writer.


def test_an_existing_folder_is_not_overwritten(folder: Path, untied: tuple[ModelSpec, Weights]) -> None:
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(KvtwinError, match="exists and is not empty"):
        write(folder, *untied)
    assert (folder / SINGLE).read_bytes() == before


def test_an_empty_folder_is_filled(tmp_path: Path, untied: tuple[ModelSpec, Weights]) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", *untied)
    _assert_equal(_read(tmp_path / "empty", untied[0]), untied[1])


def test_a_written_folder_is_as_open_as_any(tmp_path: Path, untied: tuple[ModelSpec, Weights]) -> None:
    write(tmp_path / "model", *untied)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_nothing_half_written_is_left(
    tmp_path: Path, untied: tuple[ModelSpec, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("framework.weights.save_file", full)
    with pytest.raises(KvtwinError, match=r"model cannot be written: .*No space left"):
        write(tmp_path / "model", *untied)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_not_written(tmp_path: Path, untied: tuple[ModelSpec, Weights]) -> None:
    with pytest.raises(KvtwinError, match=r"1 missing: norm.weight \(model.norm.weight\)"):
        write(tmp_path / "model", untied[0], {k: v for k, v in untied[1].items() if k != "norm.weight"})
    assert list(tmp_path.iterdir()) == []


# Random weights.


def test_random_weights_have_the_promised_spread(untied: tuple[ModelSpec, Weights]) -> None:
    spec, weights = untied
    assert weights["embed.weight"].std() == pytest.approx(1, rel=0.1)
    assert weights["layers.0.ffn.down.weight"].std() == pytest.approx(spec.ffn**-0.5, rel=0.1)
    assert weights["norm.weight"].mean() == pytest.approx(1, abs=0.1)
    assert 0 < weights["norm.weight"].std() < 0.2


def test_random_weights_centre_on_the_norm_offset() -> None:
    spec, weights = tiny_model("gemma2", 0)
    assert weights["norm.weight"].mean() + spec.norm_offset == pytest.approx(1, abs=0.1)


def test_random_weights_follow_the_seed_and_not_the_dtype() -> None:
    spec, weights = tiny_model("qwen3", 0)
    _assert_equal(random_weights(spec, 0), weights)
    _assert_equal(
        random_weights(spec, 0, "bfloat16"),
        {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()},
    )
    assert (random_weights(spec, 1)["embed.weight"] != weights["embed.weight"]).all()


def test_what_is_stored_is_read_when_asked_for_and_not_held(
    folder: Path, untied: tuple[ModelSpec, Weights]
) -> None:
    spec, weights = untied
    stored = _read(folder, spec)
    name = "layers.0.ffn.up.weight"
    first = stored[name]
    first += 1
    np.testing.assert_array_equal(stored[name], weights[name])
    assert list(stored) == list(shapes(spec))
    assert stored.shapes == {key: value.shape for key, value in weights.items()}


def test_a_file_is_mapped_only_while_it_is_read(untied: tuple[ModelSpec, Weights], tmp_path: Path) -> None:
    spec, weights = untied
    write(tmp_path / "a", spec, weights)
    held = _read(tmp_path / "a", spec)
    np.testing.assert_array_equal(held["head.weight"], weights["head.weight"])
    maps = Path("/proc/self/maps")
    assert str(tmp_path) not in (maps.read_text() if maps.exists() else "")


def test_a_file_that_is_replaced_meanwhile_is_refused(
    untied: tuple[ModelSpec, Weights], tmp_path: Path
) -> None:
    spec, weights = untied
    other = replace(spec, vocab=spec.vocab + 3)
    write(tmp_path / "a", spec, weights)
    write(tmp_path / "b", other, random_weights(other, 6, np.float32))
    held = _read(tmp_path / "a", spec)
    (tmp_path / "b" / SINGLE).replace(tmp_path / "a" / SINGLE)
    shape = rf"has now the shape \({spec.vocab + 3}, {spec.dim}\); expected \({spec.vocab}, {spec.dim}\)"
    with pytest.raises(KvtwinError, match=shape):
        held["embed.weight"]
    (tmp_path / "a" / SINGLE).write_bytes(b"cut off")
    with pytest.raises(KvtwinError, match="is not a whole safetensors file"):
        held["embed.weight"]
    (tmp_path / "a" / SINGLE).unlink()
    with pytest.raises(KvtwinError, match="cannot be read"):
        held["embed.weight"]
