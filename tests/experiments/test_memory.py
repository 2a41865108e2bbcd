"""experiments/memory.py: the command, its one object, and its errors."""

import json
import sys
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from experiments import memory, run
from framework.architecture import open_architecture
from framework.codecs.full import Full
from framework.errors import KvtwinError
from framework.policy import policies
from framework.spec import Layer

BYTES = {"keys_and_values", "codes", "scales", "positions"}


def asked(*words: str) -> Any:
    """What --json prints."""
    result = CliRunner().invoke(run.app, ["memory", *words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.output)


def test_the_object_has_the_documented_fields() -> None:
    found = asked("gemma-3-4b", "--context", "1000", "--context", "5000", "--policy", "tova(fraction=0.25)")
    assert set(found) == {
        *(
            "model",
            "source",
            "dtype",
            "codec",
            "policy",
            "layers",
            "layers_without",
            "windows",
            "kib_per_token",
        ),
        *("per_token", "per_token_beyond_windows", "contexts", "notes"),
    }
    assert set(found["per_token"]) == set(found["per_token_beyond_windows"]) == BYTES
    assert all(
        set(row) == BYTES | {"tokens", "kept_least", "kept_most", "of_full"} for row in found["contexts"]
    )
    assert [row["tokens"] for row in found["contexts"]] == [1000, 5000]
    assert [(row["kept_least"], row["kept_most"]) for row in found["contexts"]] == [(250, 250), (1023, 1250)]
    assert (found["layers"], found["windows"], found["dtype"]) == (34, {"1024": 29}, "bfloat16")
    assert (found["codec"], found["policy"]) == ("full()", "tova(fraction=0.25)")


def test_the_figures_of_the_object() -> None:
    found = asked("qwen2-7b", "--context", "3000")
    assert (found["kib_per_token"], found["per_token"]["keys_and_values"]) == (56, 57344)
    assert found["per_token"]["positions"] == 28 * 4 * 4
    [row] = found["contexts"]
    assert (row["keys_and_values"], row["codes"], row["scales"]) == (3000 * 57344, 3000 * 57344, 0)
    assert (row["kept_least"], row["of_full"], row["positions"]) == (3000, 1, 3000 * 448)


def test_the_share_of_the_full_cache_counts_the_policy() -> None:
    [row] = asked("llama-3-8b", "--context", "4000", "--policy", "snapkv(budget=1000)")["contexts"]
    assert row["of_full"] == 0.25


@pytest.mark.parametrize(
    ("words", "itemsize"), [([], 2), (["--dtype", "float32"], 4), (["--dtype", "float16"], 2)]
)
def test_the_floats_of_the_model(words: list[str], itemsize: int) -> None:
    assert asked("gpt2", *words)["per_token"]["codes"] == 18432 * itemsize


def test_the_dtype_of_a_config_is_the_default() -> None:
    assert asked("bytes")["dtype"] == "float16"
    assert asked("bytes", "--dtype", "float64")["dtype"] == "float64"


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["qwen3-next-80b-a3b"], "36 layers keep no keys and values"),
        (["gpt-oss-20b"], "one token less"),
        (["deepseek-v3"], "one latent stream"),
        (["llama-3-8b", "--policy", "adakv(budget=64, policy=snapkv())"], "depends on the text"),
        (
            ["llama-3-8b", "--policy", "cake(budget=128, policy=snapkv())"],
            "divides the budget among the layers",
        ),
        (["llama-3-8b", "--policy", "h2o(budget=64, interval=9)"], "up to 8 tokens more"),
    ],
)
def test_what_a_reader_should_know(words: list[str], note: str) -> None:
    [said] = asked(*words)["notes"]
    assert note in said
    shown = CliRunner().invoke(run.app, ["memory", *words]).output
    assert said in shown


def test_nothing_is_said_where_there_is_nothing_to_know() -> None:
    assert asked("llama-3-8b", "--policy", "h2o(budget=64)")["notes"] == []


def test_the_table() -> None:
    words = ["memory", "gpt-oss-20b", "--context", "100", "--context", "131072"]
    result = CliRunner().invoke(run.app, words, catch_exceptions=False)
    lines = [line.split() for line in result.output.splitlines()]
    assert "gpt-oss-20b: 24 layers, 12 with a window of 128; bfloat16" in result.output
    assert ["1", "48", "48", "0", "0.75"] in lines
    assert ["1", "more,", "windows", "full", "24", "24", "0", "0.375"] in lines
    assert ["100", "100", "4,800", "4,800", "0", "1.000", "75"] in lines
    held = 24 * (131072 + 127)
    assert f"127-131,072 {held:,} {held:,} 0 1.000 49,199.625" in " ".join(sum(lines, []))
    assert "source: config.json as published" in result.output


class Wide(Full):
    """Cannot even say how large 96 channels would be."""

    exact: ClassVar[bool] = False

    def unfit(self, layer: Layer) -> str | None:
        return (
            None if layer.head_dim % 64 == 0 else f"head_dim is {layer.head_dim}; expected a multiple of 64"
        )

    def bits_of(self, width: int, side: str, itemsize: int) -> tuple[float, float]:
        assert width % 64 == 0
        return 4.0 * width, 0.0


def test_a_codec_that_does_not_fit_says_why() -> None:
    with pytest.raises(KvtwinError, match="cannot code layer 0: head_dim is 96; expected a multiple of 64"):
        memory.measured(open_architecture("phi-3-mini"), Wide(), policies.make("full()"), [9], "bfloat16")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lama-3-8b"], "did you mean llama-3-8b"),
        (["llama-3-8b", "--codec", "ful"], "near: full"),
        (["llama-3-8b", "--policy", "snapk(budget=4)"], "near: snapkv"),
        (["llama-3-8b", "--policy", "snapkv()"], "no budget"),
        (
            ["llama-3-8b", "--policy", "h2o(budget=(9, 8))"],
            "has 2 budgets; expected one, or one for each of 32",
        ),
        (["llama-3-8b", "--dtype", "int8"], "dtype is 'int8'; expected one of bfloat16"),
        (["gemma-2-9b", "--policy", "cake(budget=4, policy=snapkv())"], "expected at least"),
    ],
)
def test_errors_end_with_code_2_and_three_lines(
    words: list[str], says: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["kvtwin", "memory", *words])
    with pytest.raises(SystemExit) as end:
        run.main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert says in told
    assert 1 <= len(told.strip().splitlines()) <= 3


def test_a_context_without_tokens_is_refused() -> None:
    assert CliRunner().invoke(run.app, ["memory", "gpt2", "--context", "0"]).exit_code == 2
