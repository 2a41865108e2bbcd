"""framework/architecture.py: names, bundled models and files of any config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from framework.architecture import architectures, open_architecture
from framework.checkpoint import BUNDLED, open_checkpoint
from framework.counting import counted
from framework.errors import KvtwinError

CONFIG = {"num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}


def shapes(name: Any) -> list[tuple[int, int, int | None]]:
    return [(each.kv_heads, each.head_dim, each.window) for each in open_architecture(name).spec.layers]


@pytest.mark.parametrize("name", ["bytes", "recall"])
def test_a_bundled_model_is_counted_as_it_is_loaded(name: str) -> None:
    expected = [(each.kv_heads, each.head_dim, each.window) for each in open_checkpoint(name).spec.layers]
    assert shapes(name) == shapes(BUNDLED / name) == shapes(str(BUNDLED / name / "config.json")) == expected


def test_names_are_lower_case_and_each_means_one_row() -> None:
    rows = json.loads((BUNDLED.parent / "architectures.json").read_text())
    names = [name for row in rows for name in row["names"]]
    assert len(set(names)) == len(names)
    assert names == [name.lower() for name in names]
    assert set(names) == set(architectures())
    assert all(row["source"] for row in rows)


@pytest.mark.parametrize("name", ["qwen2-7b", "Qwen2-7B", "qwen2.5-7b", "MiniCPM-V-2_6"])
def test_names_of_one_architecture(name: str) -> None:
    assert shapes(name) == [(4, 128, None)] * 28
    assert open_architecture(name).source


def test_the_kinds_of_layers_of_published_models() -> None:
    assert shapes("gpt-oss-20b") == [(8, 64, 128), (8, 64, None)] * 12
    assert [window for *_, window in shapes("gemma-3-4b")].count(None) == 5
    assert shapes("gemma-3-4b")[4:6] == [(4, 256, 1024), (4, 256, None)]
    assert shapes("mistral-7b-v0.1") == [(8, 128, 4096)] * 32
    hybrid = open_architecture("qwen3-next-80b-a3b")
    assert (len(hybrid.spec.layers), hybrid.without) == (12, 36)
    latent = open_architecture("deepseek-v3").spec.layers
    assert [each.streams["latent"].width for each in latent] == [576] * 61


@pytest.mark.parametrize(
    "name", [name for name, row in architectures().items() if "defaults of" in row["source"]]
)
def test_transformers_has_some_of_the_numbers_too(name: str) -> None:
    row = open_architecture(name)
    kind = row.source.rpartition("defaults of ")[2].partition(" ")[0]
    layers, without = counted(json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False)))
    found = [(each.kv_heads, each.head_dim, each.window, each.latent) for each in layers]
    expected = [(each.kv_heads, each.head_dim, each.window, each.latent) for each in row.spec.layers]
    assert (found, without) == (expected, row.without)


@pytest.mark.parametrize(
    ("more", "dtype"),
    [
        ({}, None),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": "float8_e4m3fn"}, None),
    ],
)
def test_the_dtype_is_that_of_the_config(more: dict[str, Any], dtype: str | None, tmp_path: Path) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(CONFIG | more))
    assert open_architecture(path).dtype == dtype
    path.write_text(json.dumps({"text_config": CONFIG | more, "model_type": "some_vl"}))
    assert open_architecture(path).dtype == dtype
    path.write_text(json.dumps({"text_config": CONFIG, "model_type": "some_vl"} | more))
    assert open_architecture(path).dtype == dtype


def test_a_folder_of_the_name_of_a_model_is_reached_by_its_path(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bytes", "qwen2-7b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        assert shapes(f"./{name}") == [(2, 10, None)] * 4
        assert shapes(name) != shapes(f"./{name}")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen2-7", "did you mean qwen2-7b"),
        ("Qwen/Qwen2-7B", "did you mean qwen2-7b"),
        ("byte", "did you mean bytes"),
        ("xyz", "no architecture 'xyz'\nexpected a config.json"),
        ("here.json", "here.json does not exist"),
        (".", "config.json does not exist"),
        ("list.json", "holds a JSON list"),
        ("broken.json", "not readable JSON"),
        ("silent.json", "config.json of silent.json: num_hidden_layers is absent"),
    ],
)
def test_what_cannot_be_read(name: str, says: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in {
        "list.json": "[1]",
        "broken.json": '{"a":',
        "silent.json": '{"model_type": "new"}',
    }.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(KvtwinError) as caught:
        open_architecture(name)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
