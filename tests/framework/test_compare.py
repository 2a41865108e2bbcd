"""What counts as the same: drift, taps, kept sets with margins, tokens, distributions."""

from typing import Any

import numpy as np
import pytest

from framework.cache import Decision
from framework.compare import (
    as_record,
    distributions,
    drift,
    first_differing,
    kept_agreement,
    layer_drifts,
    tap_drifts,
    token_agreement,
)
from framework.errors import KvtwinError

RANDOM = np.random.default_rng(8)


def test_drift_is_relative_to_the_largest_expected_value() -> None:
    expected = np.array([[1.0, -8.0, 0.0]])
    assert drift(expected + np.array([0.5, 0.0, -2.0]), expected) == 0.25
    assert drift(expected, expected) == 0.0
    assert drift(np.zeros((2, 0)), np.zeros((2, 0))) == 0.0
    assert drift(np.full(3, 1e-3), np.zeros(3)) == 1e-3  # nothing to be relative to


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_drift_of_what_is_no_number_is_infinite(wrong: float) -> None:
    assert drift(np.array([1.0, wrong]), np.array([1.0, 2.0])) == np.inf


def test_drift_of_different_shapes_is_refused() -> None:
    with pytest.raises(KvtwinError, match=r"shape \(2, 3\) with the expected \(3, 2\)"):
        drift(np.zeros((2, 3)), np.zeros((3, 2)))


TAPS = {
    name: RANDOM.normal(size=(2, 5))
    for name in ("embed", "layers.0.ffn", "layers.0.output", "layers.1.output")
}


def test_the_first_tap_in_the_order_of_the_computation() -> None:
    found = {name: value.copy() for name, value in reversed(TAPS.items())}
    assert first_differing(found, TAPS, 0.0) is None
    found["layers.1.output"] += 1
    found["layers.0.ffn"][1, 4] += 1e-3
    first = first_differing(found, TAPS, 1e-5)
    assert first is not None
    assert first.name == "layers.0.ffn"
    assert first.drift == pytest.approx(1e-3 / np.abs(TAPS["layers.0.ffn"]).max())
    assert [tap.name for tap in tap_drifts(found, TAPS)] == list(TAPS)
    assert layer_drifts(found, TAPS)[0] == 0.0
    assert layer_drifts(found, TAPS)[1] > 0.1


def test_a_tap_of_nan_differs() -> None:
    first = first_differing(TAPS | {"embed": TAPS["embed"] * np.nan}, TAPS, 1.0)
    assert first is not None
    assert first.name == "embed"


def test_taps_of_other_names_are_refused() -> None:
    with pytest.raises(KvtwinError, match="embed"):
        tap_drifts({name: value for name, value in TAPS.items() if name != "embed"}, TAPS)


def decision(
    kept: list[int], scores: list[float], protected: tuple[int, ...] = (), layer: int = 0
) -> Decision:
    """One row, one head; a token at each position 3, 4, ..., and one empty slot."""
    positions = np.array([*range(3, 3 + len(scores)), -1], np.int32)
    return Decision(
        layer,
        positions[None, None],
        np.array([*scores, 0.0])[None, None],
        np.isin(positions, protected)[None, None],
        np.array([*kept, -1], np.int32)[None, None],
        np.array([[len(kept)]], np.int32),
    )


SCORES = [5.0, 2.0, 2.0 + 1e-6, 9.0]
NEAR = [5.0, 2.0 + 1e-6, 2.0, 9.0]


def test_equal_sets() -> None:
    found = kept_agreement([[decision([3, 6], SCORES)]], [[decision([3, 6], SCORES)]], 0.0)
    assert (found.equal, found.swapped, found.mismatches, found.overlap) == (1, 0, (), 1.0)
    assert found.within(0.0)


def test_a_swap_within_rounding_counts_as_equal() -> None:
    expected = decision([3, 5, 6], SCORES)
    found = kept_agreement([[decision([3, 4, 6], NEAR)]], [[expected]], 1e-5)
    assert (found.equal, found.swapped, found.mismatches) == (0, 1, ())
    assert found.gap == pytest.approx(1e-6 / 9)
    assert found.overlap == pytest.approx(2 / 3)
    assert found.score_drift == pytest.approx(1e-6 / 9)
    assert not found.within(1e-3)
    assert found.within(1.0)


@pytest.mark.parametrize(
    ("kept", "scores", "protected", "tolerance", "reason"),
    [
        ([3, 4, 6], NEAR, (), 1e-8, "it kept 4 and not 5, 1.1e-07 of the largest score apart"),
        ([3, 4, 6], SCORES, (), 1e-5, "it kept 4 and not 5, against the rule on its own scores"),
        (
            [3, 4, 6],
            [5.0, 2.0, 2.0, 9.0],
            (),
            1e-5,
            "against the rule on its own scores",
        ),  # a tie keeps the newer
        ([3, 6], NEAR, (), 1e-5, "it kept 2 tokens, expected 3"),
        ([3, 4, 6], NEAR, (5,), 1e-5, "protected tokens swapped: 5 for 4"),
        ([4, 5, 6], NEAR, (), 1e-5, "against the rule"),
    ],
)
def test_what_is_no_rounding(
    kept: list[int], scores: list[float], protected: tuple[int, ...], tolerance: float, reason: str
) -> None:
    expected = decision([3, 5, 6], SCORES, protected)
    found = kept_agreement([[], [decision(kept, scores, protected)]], [[], [expected]], tolerance)
    assert [(one.step, one.layer, one.row, one.head) for one in found.mismatches] == [(1, 0, 0, 0)]
    assert reason in str(found.mismatches[0])
    assert not found.within(1.0)


def test_other_tokens_or_other_protection_is_no_rounding() -> None:
    expected = decision([3, 5, 6], SCORES)
    longer = kept_agreement([[decision([3, 5, 6], [*SCORES, 0.0])]], [[expected]], 1e-5)
    assert "it saw other tokens: positions 7 are in one only" in str(longer.mismatches[0])
    marked = kept_agreement([[decision([3, 5, 6], SCORES, (4,))]], [[expected]], 1e-5)
    assert "it protects others: 4 are in one only" in str(marked.mismatches[0])


def test_decisions_of_other_steps_or_layers_are_refused() -> None:
    one = decision([3], SCORES)
    with pytest.raises(KvtwinError, match="2 evictions came; expected 1"):
        kept_agreement([[one], [one]], [[one]], 0.0)
    with pytest.raises(KvtwinError, match="step 0: other layers"):
        kept_agreement([[decision([3], SCORES, layer=1)]], [[one]], 0.0)


def logits_of(rows: list[list[int]], vocab: int = 7) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array(rows, np.int32)
    return tokens, np.eye(vocab)[tokens] * 4.0


def test_tokens_up_to_the_first_divergence() -> None:
    expected, logits = logits_of([[1, 2, 3, 4], [5, 6, 0, 1]])
    logits[0, 2, 5] = 4.0 - 1e-6
    found = expected.copy()
    assert token_agreement(found, expected, logits).within(0.0)
    found[0, 2:] = [5, 0]
    part = token_agreement(found, expected, logits)
    assert (part.tokens, part.agreeing, part.row, part.step) == (8, 6, 0, 2)
    assert part.gap == pytest.approx(1e-6 / 4)
    assert part.within(1e-5)
    assert not part.within(1e-8)


def test_of_several_divergences_the_worst_is_reported() -> None:
    expected, logits = logits_of([[1, 2, 3, 4], [5, 6, 0, 1]])
    logits[0, 0, 5] = 4.0 - 1e-6
    found = expected.copy()
    found[0, 0], found[1, 3] = 5, 0
    part = token_agreement(found, expected, logits)
    assert (part.row, part.step, part.gap, part.agreeing) == (1, 3, 1.0, 3)


def test_distributions() -> None:
    expected = RANDOM.normal(size=(2, 3, 11))
    same = distributions(expected + 7.0, expected)
    assert same.kl == pytest.approx(0.0, abs=1e-12)
    assert same.overlap == 1.0
    assert same.within("float16")
    other = distributions(-expected, expected, top=3)
    assert other.kl > 0.5
    assert other.overlap == 0.0
    assert not other.within("bfloat16")
    two = distributions(np.array([[0.0, np.log(3.0)]]), np.zeros((1, 2)))
    assert two.kl == pytest.approx(0.5 * np.log(4 / 3))  # half of log(1/2 / 1/4), half of log(1/2 / 3/4)


def test_equal_logits_overlap_in_any_order() -> None:
    expected = np.array([[9.0, 1.0, 1.0, 1.0, 0.0]])
    found = np.array([[9.0, 1.0, 1.1, 1.2, 0.0]])
    assert distributions(found, expected, top=2).overlap == 1.0


def test_nan_is_no_distribution() -> None:
    expected = RANDOM.normal(size=(1, 5))
    assert not distributions(expected * np.nan, expected).within("bfloat16")


def test_a_result_as_plain_values() -> None:
    expected = decision([3, 5, 6], SCORES)
    found: Any = as_record(kept_agreement([[decision([3, 6], SCORES)]], [[expected]], 0.0))
    assert found["mismatches"] == ["step 0, layer 0, row 0, head 0: it kept 2 tokens, expected 3"]
    assert found["equal"] == 0
