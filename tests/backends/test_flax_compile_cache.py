"""Where flax keeps what XLA has compiled, and when it leaves jax's settings alone."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from backends import backends
from backends.flax.compile_cache import folder, keep_what_is_compiled
from framework.backend import Model
from tests.twins import hybrid_spec, hybrid_weights

PLACE, SWITCH = "jax_compilation_cache_dir", "jax_enable_compilation_cache"


@pytest.fixture(autouse=True)
def as_a_user_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Switched on, as jax has it, with a folder for caches of its own; nothing is compiled in these tests."""
    before = {name: getattr(jax.config, name) for name in (PLACE, SWITCH)}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(PLACE, None)
    jax.config.update(SWITCH, True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def build() -> Model:
    return backends.get("flax").build(hybrid_spec(), hybrid_weights(), "float32")


def test_a_model_switches_it_on(tmp_path: Path) -> None:
    build()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "kvtwin" / "jax")
    assert (tmp_path / "kvtwin" / "jax").is_dir()


def test_what_the_user_says_stays(tmp_path: Path) -> None:
    jax.config.update(PLACE, "elsewhere")
    build()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update(PLACE, None)
    jax.config.update(SWITCH, False)
    build()
    assert jax.config.jax_compilation_cache_dir is None
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_leaves_it_off(tmp_path: Path) -> None:
    (tmp_path / "kvtwin").write_text("a file")
    keep_what_is_compiled()
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("said", ["", "relative/path"])
def test_without_a_folder_for_caches_it_is_that_of_the_home(
    said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", said)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder() == tmp_path / ".cache" / "kvtwin" / "jax"
