"""experiments/formats.py: bits, errors and sizes of codecs that can be worked out by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from experiments import formats, run
from framework.codec import Codec, codecs
from framework.spec import Layer


@dataclass(frozen=True, kw_only=True)
class Shrunk(Codec):
    """Values at three quarters of their size."""

    def encode(self, xp: Any, x: Any, side: str) -> dict[str, Any]:
        return {"codes": x, "factor": xp.full(x.shape[:-1], 0.75 if side == "values" else 1.0, dtype=x.dtype)}

    def read(self, xp: Any, parts: Any, side: str) -> Any:
        return parts["codes"]

    def scale(self, xp: Any, parts: Any, side: str) -> Any:
        return parts["factor"]

    def bits_of(self, width: int, side: str, itemsize: int) -> tuple[float, float]:
        return (6.0 if side == "keys" else 3.5) * width, 64.0


class Picky(Shrunk):
    """For few heads."""

    def unfit(self, layer: Layer) -> str | None:
        return "too many heads" if layer.kv_heads > 8 else None


class Together(Shrunk):
    """All heads as one."""

    def joint(self, layer: Layer) -> bool:
        return True


def test_a_row_is_what_the_codec_does() -> None:
    found = formats.entry(Shrunk())
    assert (
        found.stores
        == "experiments/formats.py: bits, errors and sizes of codecs that can be worked out by hand"
    )
    assert found.bits == "6.5, 4"  # 64 bits beside 128 elements
    assert found.error == "0, 0.25"
    assert found.sizes == ("18.375", "42", "168")


def test_a_model_that_does_not_fit_has_a_dash() -> None:
    assert formats.entry(Picky()).sizes == ("18.375", "42", "-")


def test_heads_that_are_coded_as_one_share_what_stands_beside() -> None:
    found = formats.entry(Together())
    assert found.bits == "6.25, 3.75"
    assert found.sizes[0] == f"{28 * (4 * 128 * 9.5 + 2 * 64) / 8 / 1024:.10g}"


def test_every_listed_instance_of_every_codec_has_a_row() -> None:
    firsts = [codecs.spelling(codecs.get(name).listed()[0]) for name in codecs.names()]
    assert [each.name for each in formats.entries() if each.stores] == firsts
    names = [each.name for each in formats.entries()]
    assert names == [codecs.spelling(one) for name in codecs.names() for one in codecs.get(name).listed()]
    full = next(each for each in formats.entries() if each.name == "full()")
    assert full.cells == ("`full()`", "K and V in the model's own dtype", "16", "0", "56", "128", "512")


@pytest.mark.parametrize("words", [[], ["--markdown"]])
def test_the_command(words: list[str]) -> None:
    result = CliRunner().invoke(run.app, ["codecs", *words])
    assert result.exit_code == 0
    assert "full()" in result.output
    assert ("| --- |" in result.output) == bool(words)
