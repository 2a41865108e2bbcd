"""What the harness passes: model arguments, generation arguments, and contexts that are too long."""

from typing import Any

import pytest

from experiments.harness.arguments import ROOM, Arguments, Writing, arguments, fitted, writing
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.policy import policies


def test_what_is_not_given_is_usual() -> None:
    assert arguments({"path": "bytes", "device": "cuda:0", "seed": None}) == Arguments(path="bytes")


def test_numbers_may_come_as_text_and_names_as_numbers() -> None:
    found = arguments(
        {"path": 7, "batch_size": "16", "max_length": "512", "chunk": 4, "add_bos_token": False}
    )
    assert found == Arguments(path="7", batch_size=16, max_length=512, chunk=4, add_bos_token=False)


def test_semicolons_stand_for_commas() -> None:
    found = arguments({"path": "bytes", "policy": "adakv(budget=64; policy=snapkv(window=8; kernel=5))"})
    made = policies.make(found.policy)
    assert policies.spelling(made) == "adakv(budget=64, policy=snapkv(window=8, kernel=5))"
    assert arguments({"path": "bytes", "codec": "exl3(k_bits=5;v_bits=2)"}).codec == "exl3(k_bits=5,v_bits=2)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "full()"}, "no model is named; expected path=NAME"),
        ({"path": "bytes", "polcy": "full()"}, "no model argument 'polcy'; expected some of path, policy"),
        (
            {"path": "bytes", "policy": "snapkv(budget=64", " window": "16)"},
            "no model argument ' window'.*\n.*semicol",
        ),
        ({"path": "bytes", "policy": "adakv(budget=64"}, "brackets that do not close\n.*semicolons"),
        ({"path": "bytes", "batch_size": "auto"}, "batch_size is 'auto'; expected a whole number"),
        ({"path": "bytes", "seed": True}, "seed is True; expected a whole number"),
        ({"path": "bytes", "batch_size": 0}, "batch_size=0, max_length=None; expected 1 or more"),
        ({"path": "bytes", "max_length": -1}, "max_length=-1; expected 1 or more"),
    ],
)
def test_bad_model_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        arguments(given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Writing((), ROOM, Sampling(seed=5))),
        ({"until": "\n", "max_gen_toks": 9}, Writing(("\n",), 9, Sampling(seed=5))),
        ({"until": ["a", "b"], "max_new_tokens": "7"}, Writing(("a", "b"), 7, Sampling(seed=5))),
        ({"do_sample": False, "temperature": 0.7}, Writing((), ROOM, Sampling(seed=5))),
        ({"do_sample": True}, Writing((), ROOM, Sampling(temperature=1.0, seed=5))),
        ({"temperature": 0.7, "top_k": 3}, Writing((), ROOM, Sampling(temperature=0.7, top_k=3, seed=5))),
        ({"temperature": 0.0, "do_sample": None, "until": None}, Writing((), ROOM, Sampling(seed=5))),
    ],
)
def test_generation_arguments(given: dict[str, Any], expected: Writing) -> None:
    assert writing(given, 5) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "no generation argument 'num_beams' in kvtwin"),
        ({"until": [3]}, r"until is \[3\]; expected a text or a list of texts"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'; expected a whole number"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_generation_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(KvtwinError, match=message):
        writing(given)


@pytest.mark.parametrize(
    ("context", "continuation", "most", "expected"),
    [
        ([1, 2, 3], [4, 5], 4, ([1, 2, 3], 0)),
        ([1, 2, 3], [4, 5], 3, ([2, 3], 1)),
        ([1, 2, 3], [4, 5], 2, ([3], 2)),
        ([1], [4, 5, 6], 3, ([1], 0)),
    ],
)
def test_a_context_is_cut_from_the_left(
    context: list[int], continuation: list[int], most: int, expected: tuple[list[int], int]
) -> None:
    assert fitted(context, continuation, most) == expected


def test_a_continuation_is_not_cut() -> None:
    with pytest.raises(KvtwinError, match="a continuation has 3 tokens; expected at most max_length=2"):
        fitted([1], [4, 5, 6], 2)
