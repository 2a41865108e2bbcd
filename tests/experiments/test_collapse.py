"""kvtwin collapse: its perplexity against one forward of Hugging Face, its verdicts, its table, plot and lines."""

import io
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from backends import backends
from experiments import collapse, collapse_report
from experiments.collapse import Cell, Question
from experiments.run import app
from framework.checkpoint import BUNDLED, open_checkpoint
from framework.errors import KvtwinError

HELD_OUT = np.frombuffer((BUNDLED / "text" / "held_out.txt").read_bytes(), np.uint8).astype(np.int32)
Q4, Q8 = "exl2_q4()", "exl2_q8()"


def cell(codec: str = "full()", strength: float = 1.0, backend: str = "torch", **changes: Any) -> Cell:
    """A cell that was not measured."""
    made = Cell(
        "bytes",
        "pair_rescale",
        strength,
        codec,
        backend,
        "float32",
        3,
        7,
        2.5,
        1.0,
        None,
        False,
        9.0,
        0.1,
        {},
    )
    return replace(made, **changes)


def question(**changes: Any) -> Question:
    """Three short stretches, on torch."""
    made = Question(
        "bytes", open_checkpoint("bytes"), collapse.stretches(HELD_OUT, 3, 14), backends=("torch",)
    )
    return replace(made, **changes)


def printed(cells: list[Cell]) -> str:
    console = Console(width=collapse_report.WIDTH, record=True, file=io.StringIO())
    console.print(collapse_report.table(cells))
    return console.export_text()


def test_the_stretches_are_those_of_the_training_script() -> None:
    text = np.arange(100)
    found = collapse.stretches(text, 9, 11)
    assert found.shape == (9, 12)
    assert found[:, 0].tolist() == list(range(0, 100 - 11, 11))
    assert (np.diff(found, axis=1) == 1).all()
    assert collapse.stretches(text, 3, 11)[:, 0].tolist() == [0, 44, 88]
    for count in (0, 10):
        with pytest.raises(
            KvtwinError, match=f"{count} stretches of 11 tokens were asked for; expected from 1 to 9"
        ):
            collapse.stretches(text, count, 11)


@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_the_perplexity_is_that_of_one_forward(backend: str) -> None:
    text = collapse.stretches(HELD_OUT, 3, 21)
    found, held = collapse.perplexity(backends.get(backend).load("bytes"), text, "full()")
    model = LlamaForCausalLM.from_pretrained(BUNDLED / "bytes", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(text[:, :-1].astype(np.int64)), use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), torch.from_numpy(text[:, 1:]).long().flatten()
    )
    assert found == pytest.approx(math.exp(nats), rel=1e-6)
    assert held == 4 * 2 * 2 * 32 * 4  # layers, keys and values, kv heads, head_dim, bytes


def test_the_surprise_of_large_and_of_lost_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4], [0.0, math.log(3), 0.0], [0.0, math.nan, 0.0], [0.0, 1.0, math.inf]])
    found = collapse.surprise(logits.astype(np.float32), np.array([1, 1, 0, 2]))
    assert found[0] == pytest.approx(1e4)
    assert found[1] == pytest.approx(math.log(5 / 3))
    assert np.isnan(found[2:]).all()


def test_the_cells_of_an_exact_cache_do_not_move() -> None:
    cells = list(collapse.ask(question(codecs=("full",), strengths=(1.0, 100.0, 1000.0))))
    assert [one.strength for one in cells] == [1.0, 100.0, 1000.0]
    assert collapse.agree(cells)
    assert {one.codec for one in cells} == {"full()"}
    assert all(one.ratio == 1 and one.error is None and not one.silent for one in cells)
    assert collapse.agree(
        [*cells, next(collapse.ask(question(codecs=(), strengths=(1.0,), backends=("reference",))))]
    )


@pytest.mark.parametrize("codec", ["kivi(bits=4, group=8, residual=8)", "kvquant(group=8, residual=8)"])
def test_a_codec_of_channels_does_not_move(codec: str) -> None:
    """Under a power of two its codes stay and its scales go with the keys; codes of whole vectors move."""
    asked = question(codecs=(codec, Q4), strengths=(1.0, 256.0), dtype="float64")
    found = {(each.codec, each.strength): each.perplexity for each in collapse.ask(asked)}
    lossless = found["full()", 1.0]
    assert lossless is not None
    assert found[codec, 1.0] != pytest.approx(lossless, rel=1e-6)  # something was coded
    assert found[codec, 256.0] == pytest.approx(found[codec, 1.0], rel=1e-9)
    assert found[Q4, 256.0] != pytest.approx(found[Q4, 1.0], rel=0.02)


def test_numbers_that_run_out_are_told() -> None:
    """Without an error of the cache they make a cell silent, with one they do not."""
    broken = dict(open_checkpoint("bytes").weights)
    broken["norm.weight"] = broken["norm.weight"] * np.nan
    (found,) = collapse.ask(
        question(checkpoint=replace(open_checkpoint("bytes"), weights=broken), codecs=(), strengths=(1.0,))
    )
    assert found.perplexity is None
    assert found.ratio is None
    assert found.silent
    assert found.error == "the perplexity is nan, and no error came"


def test_an_error_of_the_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise KvtwinError("layer 3, head 1: beyond float16")

    monkeypatch.setattr(collapse, "perplexity", refuse)
    (found,) = collapse.ask(question(codecs=(), strengths=(1000.0,)))
    assert (found.perplexity, found.silent, found.error) == (None, False, "layer 3, head 1: beyond float16")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (15.1600, 15.1605, True),
        (15.1600, 15.1610, False),
        (None, None, True),
        (None, 15.16, False),
    ],
)
def test_four_digits_decide(first: float | None, second: float | None, same: bool) -> None:
    pair = [cell(perplexity=first), cell(perplexity=second, backend="flax")]
    assert collapse.agree(pair) == same
    assert collapse.agree(pair[::-1]) == same


def test_the_table() -> None:
    gone = {"perplexity": None, "ratio": None}
    cells = [
        cell(perplexity=3.01, strength=10.0),
        cell(perplexity=3.01, strength=10.0, backend="flax"),
        cell(Q4, 10.0, perplexity=23.456, ratio=7.793),
        cell(Q4, 10.0, "flax", perplexity=23.4561, ratio=7.7931),
        cell(strength=1000.0, perplexity=3.01),
        cell(strength=1000.0, perplexity=3.02, backend="flax"),
        cell(Q4, 1000.0, error="layer 0 head 1", **gone),
        cell(Q4, 1000.0, "flax", error="the perplexity is nan", silent=True, **gone),
    ]
    lines = [line.split() for line in printed(cells).splitlines() if line.strip(" ─")]
    assert lines == [
        ["codec", "10", "1000", "Qwen2-7B"],
        ["full()", "3.010", "3.010|3.020", "15.16"],
        ["x1.000", "x1.000|x1.000", "x1.000"],
        ["exl2_q4()", "23.46", "refused|NaN", "40.72"],
        ["x7.793", "x2.686"],
    ]
    assert collapse_report.notes(cells) == [
        "exl2_q4() at 1000 on torch: layer 0 head 1",
        "exl2_q4() at 1000 on flax: the perplexity is nan",
    ]
    assert "torch|flax" in collapse_report.title(cells)


@pytest.mark.parametrize(
    ("value", "text"), [(2.8117, "2.812"), (40.72, "40.72"), (312.34, "312.3"), (12345.6, "12346")]
)
def test_four_digits(value: float, text: str) -> None:
    assert collapse_report.digits(value) == text


def test_the_plot(tmp_path: Any) -> None:
    cells = [
        cell(codec, strength, backend, ratio=None if strength > 500 else 1.5)
        for codec in ("full()", Q8, Q4, "other()")
        for strength in (0.0, 10.0, 1000.0)
        for backend in ("torch", "flax")
    ]
    cells = [replace(each, perplexity=None) if each.ratio is None else each for each in cells]
    collapse_report.plot(cells, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(tmp_path: Any) -> None:
    asked = ["collapse", "--codec", "full()", "--rows", "2", "--tokens", "9", "--out", str(tmp_path / "out")]
    asked += ["--rewrite", "key_bias", "--strength", "0", "--strength", "2000", "--pair", "0", "--layer", "0"]
    result = CliRunner().invoke(app, [*asked, "--backends", "torch,reference"])
    assert result.exit_code == 0, result.output
    assert "bytes, key_bias: perplexity of 2 stretches of 9 tokens" in result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "collapse.jsonl").read_text().splitlines()]
    assert [(line["strength"], line["backend"]) for line in lines] == [
        (0, "torch"), (0, "reference"), (2000, "torch"), (2000, "reference")
    ]  # fmt: skip
    first, _, second, _ = (line["perplexity"] for line in lines)
    assert second > 1.1 * first  # the fastest pair of the first layer: not preserved
    assert (tmp_path / "out" / "collapse.png").exists()


def test_the_command_tells_backends_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    other = iter((3.0, 3.1))
    monkeypatch.setattr(collapse, "perplexity", lambda *_: (next(other), 1.0))
    asked = ["collapse", "--codec", "full()", "--strength", "1", "--rows", "2", "--tokens", "9"]
    result = CliRunner().invoke(app, [*asked, "--backends", "torch,reference"])
    assert result.exit_code == 1
    assert "3.000|3.100" in result.output


def test_the_command_tells_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "perplexity", lambda *_: (math.nan, 1.0))
    asked = ["collapse", "--codec", "full()", "--strength", "1", "--rows", "2", "--tokens", "9"]
    result = CliRunner().invoke(app, [*asked, "--backends", "torch,reference"])
    assert result.exit_code == 1
    assert "NaN" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewrite", "magic"], "no rewrite 'magic'; expected pair_rescale or key_bias"),
        (["--tokens", "0"], "stretches of 0 tokens"),
        (["--rows", "9999"], "9999 stretches of 128 tokens"),
        (["--text", "nothere"], "cannot read the text nothere"),
        (["--codec", "exl9()"], "no codec is called 'exl9'"),
        (["--codec", "full()", "--strength", "0"], "a pair is rescaled by 0.0"),
        (["--codec", "full()", "--backends", "tensor"], "no backend 'tensor'"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        CliRunner().invoke(app, ["collapse", *arguments], catch_exceptions=False)
