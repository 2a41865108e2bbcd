"""Policies that score by queries expected to come, against their formulas in plain loops from the papers."""

import numpy as np
import pytest

from tests.scored import (
    DIM,
    GROUP,
    SCALE,
    compare,
    cosine,
    every_seed,
    sinks,
    turn,
)

# Expected attention.


def mean_turn(positions):
    """The mean rotation, column by column."""
    eye = np.eye(DIM)
    return np.stack([np.mean([turn(eye[c], p) for p in positions], axis=0) for c in range(DIM)], axis=1)


def expected_attention(text, row, head, own, history, first, future, covariance, value_norm, epsilon):
    seen = int(history[-1][1][row])
    rotation = mean_turn(range(seen, seen + future))
    total = dict.fromkeys([p for p in own if p >= first], 0.0)
    for member in range(GROUP):
        queries = text.queries[row, head, member, first:seen]
        mean, weights = queries.mean(0), {}
        spread = sum(np.outer(q - mean, q - mean) for q in queries) / len(queries)
        for p in total:
            key = text.rotated(row, head, p)
            logit = SCALE * float(key @ rotation @ mean)
            if covariance:
                logit += SCALE**2 / 2 * float(key @ rotation @ spread @ rotation.T @ key)
            weights[p] = np.exp(logit)
        for p in total:
            total[p] += weights[p] / sum(weights.values()) / GROUP
    if not value_norm:
        return total
    return {p: (x + epsilon) * np.linalg.norm(text.values[row, head, p]) for p, x in total.items()}


@every_seed
@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ("sinks=3, future=11", (3, 11, True, True, 0)),
        ("sinks=0, future=4, covariance=False", (0, 4, False, True, 0)),
        ("sinks=2, future=7, value_norm=False", (2, 7, True, False, 0)),
        ("sinks=1, future=7, epsilon=0.02", (1, 7, True, True, 0.02)),
    ],
)
def test_expected_attention_is_that_of_normal_queries(fields, numbers, seed):
    def oracle(*where):
        return expected_attention(*where, *numbers)

    compare(f"expected_attention({fields})", seed, oracle, sinks(numbers[0]))


# Cap.


def cap(text, row, head, own, history, first, future, tau):
    seen = int(history[-1][1][row])
    rotation = mean_turn(range(seen, seen + future))
    rest = [p for p in own if p >= first]
    total = dict.fromkeys(rest, 0.0)
    for member in range(GROUP):
        anchor = rotation @ text.queries[row, head, member, first:seen].mean(0)
        near = {p: cosine(text.rotated(row, head, p), anchor) for p in rest}
        weight = {p: np.exp(tau * (near[p] - max(near.values()))) for p in rest}
        matrix = np.eye(DIM)
        for p in rest:
            value = text.values[row, head, p]
            matrix = matrix + (weight[p] + 1e-6) * np.outer(value, value)
        inverse = np.linalg.inv(matrix)
        for p in rest:
            value = text.values[row, head, p]
            total[p] += weight[p] * float(value @ inverse @ value) / GROUP
    return total


@every_seed
@pytest.mark.parametrize(("first", "future", "tau"), [(4, 9, 5), (0, 3, 1.5), (2, 20, 0)])
def test_cap_is_leverage_among_relevant_values(first, future, tau, seed):
    def oracle(*where):
        return cap(*where, first, future, tau)

    compare(f"cap(sinks={first}, future={future}, tau={tau})", seed, oracle, sinks(first))
