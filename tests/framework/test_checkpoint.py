"""Checkpoints by name: bundled, on disk, and in a fake cache of the hub, offline."""

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from framework import checkpoint
from framework.checkpoint import bundled, locate, open_checkpoint
from framework.errors import KvtwinError
from framework.tokenizer import ByteTokenizer
from framework.weights import SINGLE, write
from tests.tiny import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "mine", *tiny_model("qwen3", 4, dtype=np.float16))
    return tmp_path / "mine"


@pytest.fixture
def shelf(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled models with one model in it."""
    shelf = folder.parent / "shelf"
    shelf.mkdir()
    folder.rename(shelf / "recall")
    monkeypatch.setattr(checkpoint, "BUNDLED", shelf)
    return shelf


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out, with acme/tiny in it, and no network."""
    cache = tmp_path / "hub"
    repository = cache / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_folder(folder: Path) -> None:
    spec, weights = tiny_model("qwen3", 4, dtype=np.float16)
    found = open_checkpoint(str(folder))
    assert (found.spec, found.folder, found.family.name) == (spec, folder, "qwen3")
    assert {value.dtype for value in found.weights.values()} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(found.weights["embed.weight"], weights["embed.weight"])
    assert isinstance(found.tokenizer, ByteTokenizer)
    assert found.tokenizer is found.tokenizer


def test_a_bundled_name(shelf: Path) -> None:
    assert bundled() == ("recall",)
    assert locate("recall") == shelf / "recall"
    assert open_checkpoint("recall").spec.family == "qwen3"


def test_a_repository_in_the_cache_of_the_hub(hub: Path) -> None:
    found = open_checkpoint("acme/tiny")
    assert found.folder == hub / "models--acme--tiny" / "snapshots" / "0123abcd"
    assert found.spec == tiny_model("qwen3", 4)[0]


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", ["acme/other", "a--b/c", "acme/-tiny"])
def test_a_repository_that_is_not_there(name: str) -> None:
    with pytest.raises(KvtwinError, match=f"no folder '{name}'.* does not come") as caught:
        locate(name)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.usefixtures("shelf")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("recal", "no model 'recal'; did you mean recall"),
        ("../nowhere", "no model '../nowhere'"),
        ("a/b/c", "no model 'a/b/c'"),
        ("", "config.json does not exist"),
    ],
)
def test_a_name_that_leads_nowhere(name: str, reason: str) -> None:
    with pytest.raises(KvtwinError, match=reason):
        open_checkpoint(name)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(KvtwinError, match=r"is a file; expected the folder"):
        locate(folder / SINGLE)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(KvtwinError, match=r"config.json does not exist"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(KvtwinError, match=r"config.json (is not readable JSON|holds a JSON list)"):
        open_checkpoint(folder)
