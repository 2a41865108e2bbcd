"""The experiment scripts, small: what they measure, print and leave behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends import backends
from experiments.scripts import (
    backend_comparison,
    eviction_vs_quantisation,
    new_policy,
    q4_collapse,
    standard,
)
from experiments.sweeps.grid import Asked, grid
from framework.checkpoint import open_checkpoint


def test_q4_collapse(capsys: pytest.CaptureFixture) -> None:
    cells = q4_collapse.main(codecs=("full()", "exl2_q4()"), strengths=(1, 300), rows=3, tokens=24)
    found = {(cell.codec, cell.strength): cell for cell in cells}
    assert list(found) == [("full()", 1), ("exl2_q4()", 1), ("full()", 300), ("exl2_q4()", 300)]
    exact, moved = found["full()", 1].perplexity, found["full()", 300].perplexity
    assert exact is not None
    assert moved == pytest.approx(exact, rel=1e-9)
    gentle, lost = found["exl2_q4()", 1].ratio, found["exl2_q4()", 300].ratio
    assert gentle is not None
    assert lost is not None
    assert abs(gentle - 1) < 0.1
    assert lost > 1.5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("s = 300, exl2_q4(): ")
    assert f"{lost:.3f} times that of full()" in lines[3]


def test_q4_collapse_says_why_a_cell_has_no_number(capsys: pytest.CaptureFixture) -> None:
    q4_collapse.main(codecs=("exl2_q4()",), strengths=(1e6,), rows=2, tokens=5)
    assert "too large for its scales" in capsys.readouterr().out.splitlines()[1]


@pytest.mark.parametrize("backend", ["torch", pytest.param("flax", marks=pytest.mark.slow)])
def test_backends_do_the_same(backend: str, capsys: pytest.CaptureFixture) -> None:
    found = backend_comparison.main(
        policies=("full()", "h2o(budget=9)"), backends=(backend,), tokens=20, steps=4
    )
    assert list(found) == [("full()", backend), ("h2o(budget=9)", backend)]
    assert all(verdict.failures == [] for verdict in found.values())
    kept = found["h2o(budget=9)", backend].kept
    assert kept is not None
    assert kept.decisions == 2 * 4 * 2 * 5  # rows, layers, kv heads, evictions
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["same", "same"]


def test_a_backend_that_does_something_else_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cast = backend_comparison.cast

    def moved(weights: Any, dtype: str) -> Any:
        return {name: array * 1.001 for name, array in cast(weights, dtype).items()}

    monkeypatch.setattr(backend_comparison, "cast", moved)
    found = backend_comparison.main(policies=("full()",), backends=("torch",), tokens=12, steps=3)
    assert found["full()", "torch"].failures
    assert "drift" in capsys.readouterr().out.splitlines()[0]
    assert "same" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("codec", "tokens"), [("fp16()", 16), ("int8()", 28), ("ggml_q4_0()", 56), ("turboquant(bits=2)", 102)]
)
def test_budgets_of_equal_bytes(codec: str, tokens: int) -> None:
    """By the formula, and measured: no codec takes more, and one more token would not fit."""
    model = backends.get("torch").load("bytes")
    spec = open_checkpoint("bytes").spec
    assert eviction_vs_quantisation.budget(spec, codec, 16) == tokens
    sizes = []
    for each, budget in (("fp16()", 16), (codec, tokens)):
        prompt = np.arange(120)[None] % 90 + 33
        _, cache = model.step(prompt, model.cache(f"window(budget={budget})", each))
        sizes.append(cache.bytes.payload + cache.bytes.scales)
    assert sizes[1] <= sizes[0] < sizes[1] * (tokens + 1) / tokens


def test_eviction_against_quantisation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame = eviction_vs_quantisation.main(
        model="bytes",
        question="passkey(length=256)",
        policy="snapkv(window=4)",
        tokens=(8, 12),
        codecs=("fp16()", "ggml_q4_0()"),
        seeds=3,
        out=str(tmp_path / "found.sqlite"),
    )
    assert len(frame) == 2 * 2 * 3
    assert set(zip(frame["size"], frame["codec"], frame["kept"], strict=True)) == {
        (8, "fp16()", 8.0),
        (8, "ggml_q4_0()", 28.0),
        (12, "fp16()", 12.0),
        (12, "ggml_q4_0()", 42.0),
    }
    payload = frame.groupby(["size", "codec"])["payload"].mean()
    assert payload[8, "fp16()"] == 8 * 4 * 2 * 2 * 32 * 2  # tokens, layers, kv heads, sides, head_dim, bytes
    assert 0.95 * payload[8, "fp16()"] < payload[8, "ggml_q4_0()"] <= payload[8, "fp16()"]
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "paired difference" in line]) == 2
    assert any(line.startswith("8 tokens in 16 bits, ggml_q4_0(): kept 28, ") for line in lines)


def test_a_new_policy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame = new_policy.main(
        model="recall",
        question="passkey(length=256)",
        others=("window()",),
        budgets=(16, 0.25),
        seeds=2,
        out=str(tmp_path / "found.sqlite"),
    )
    assert len(frame) == 2 * 2 * 2
    assert len(set(frame["policy"])) == 2
    assert any("new_policy" in policy for policy in frame["policy"])
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.splitlines()[0] == "checks that fail: none"


def test_the_standard_suite_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "few.sqlite"
    frame = standard.main(
        "bytes", ("mqar(length=200)",), ("window()",), (0.25, 0.5), 3, "torch", 1, out=str(out)
    )
    assert frame.groupby(["policy", "budget"], dropna=False).size().tolist() == [3, 3, 3]
    page = Path(capsys.readouterr().out.splitlines()[-1])
    assert page == tmp_path / "few" / "report.html"
    assert "mqar(length=200)" in page.read_text()


def test_the_standard_suite_is_of_the_size_it_says() -> None:
    assert [len(each) for each in (standard.QUESTIONS, standard.POLICIES, standard.BUDGETS)] == [8, 12, 4]
    grid(Asked(standard.QUESTIONS, ("bytes",), standard.POLICIES, standard.BUDGETS, backends=("flax",)))
