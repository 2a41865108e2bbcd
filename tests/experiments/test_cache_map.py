"""experiments/pages/cache_map.py: what the map says each head holds, against the caches of a run of its own."""

import math

import numpy as np
import pytest

from backends import backends
from experiments.pages.cache_map import (
    REASONS,
    STAYED,
    Choice,
    budgeted,
    cache_map,
    choose,
    draw,
    holds,
    lead,
    mapped,
    texts,
)
from experiments.pages.palette import STATES
from framework.eviction import resolved
from framework.policy import policies
from framework.tokenizer import ByteTokenizer
from tests.results_frame import results
from tests.twins import hybrid
from tests.twins import texts as token_rows

PROMPT, FED = token_rows()[0, :19].tolist(), token_rows()[1, :8].tolist()
HEADS = ((0, 0), (0, 1), (1, 0), (1, 1))
QUESTION = "mqar(length=120, pairs=3)"


def held(model, policy, prompt, fed):
    """What the cache holds after the prompt and after each token: [call][layer][head] a set of positions."""
    _, cache = model.step([prompt], model.cache(policy), phase="prefill")
    found = [[[set(head.tolist()) - {-1} for head in layer[0]] for layer in cache.kept]]
    for token in fed:
        _, cache = model.step([[token]], cache)
        found.append([[set(head.tolist()) - {-1} for head in layer[0]] for layer in cache.kept])
    return found


@pytest.mark.parametrize(
    "policy",
    [
        "h2o(budget=6)",
        "window(budget=5, sinks=2, interval=3)",
        "adakv(budget=7, policy=snapkv(window=3))",
        "full()",
    ],
)
def test_the_map_holds_what_the_cache_holds_at_every_call(policy):
    model = hybrid("torch")
    history = lead(model, PROMPT, FED, policy)
    assert history.fed.tolist() == [FED]
    pieces = tuple(map(str, [*PROMPT, *FED]))
    one = mapped(history, Choice("m", policy, None, 0), HEADS, pieces, np.zeros(len(pieces), bool))
    real = held(hybrid("torch"), policy, PROMPT, FED)
    assert one.calls == len(FED) == len(real) - 1
    for call, layers in enumerate(real):
        for row, (layer, head) in enumerate(HEADS):
            assert set(np.flatnonzero(one.kept(call)[row]).tolist()) == layers[layer][head]


def test_the_states_and_reasons_are_those_of_the_evictions():
    one = mapped(
        lead(hybrid("torch"), PROMPT, FED, "h2o(budget=6)"),
        Choice("m", "", None, 0),
        HEADS,
        ("x",) * 27,
        np.zeros(27, bool),
    )
    assert list(STATES) == ["not come yet", "evicted", "evicted now", "held"]
    for call in range(one.calls + 1):
        state = one.state(call)
        assert ((state == 3) == one.kept(call)).all()
        assert ((state == 2) == ((one.went == call) & (call > 0))).all()
        assert ((state == 0) == (np.arange(27) >= len(PROMPT) + call)).all()
    gone = one.went != STAYED
    assert one.evicted == gone.sum() > 20
    assert set(np.array(REASONS)[one.reason[gone]]) >= {"score", "window"}
    scored = gone & (one.reason == REASONS.index("score"))
    assert (one.score[scored] <= one.threshold[scored]).all()
    assert np.isnan(one.score[~gone]).all()


def test_a_question_is_run_again_with_its_answer_marked():
    model = backends.get("torch").load("recall")
    choice = Choice("recall", "window(fraction=0.25, sinks=4)", QUESTION, 3)
    one = cache_map(model, choice)
    prompt, fed, answers = draw(model, choice)
    spelled = policies.spelling(resolved(policies.make(choice.policy), len(prompt)))
    assert one.resolved == spelled
    assert "".join(one.pieces).encode() == bytes([*prompt, *fed])
    assert (
        "".join(piece for piece, marked in zip(one.pieces, one.answer, strict=True) if marked) == answers[0]
    )
    assert not one.answer[len(prompt) :].any()
    assert "".join(one.pieces).endswith(answers[0])
    real = held(model, spelled, prompt, fed[:5])
    for call in range(6):
        for row, (layer, head) in enumerate(one.heads):
            assert set(np.flatnonzero(one.kept(call)[row]).tolist()) == real[call][layer][head]
    table = one.frame()
    assert len(table) == one.went.size
    assert int(table["went"].notna().sum()) == one.evicted
    layer, head = one.heads[2]
    mine = table[(table["layer"] == layer) & (table["head"] == head)]
    assert mine["token"].tolist() == list(one.pieces)
    assert mine["went"].fillna(STAYED).tolist() == one.went[2].tolist()


def test_held_out_text_stands_in_for_a_question():
    model = backends.get("torch").load("recall")
    prompt, fed, answers = draw(model, Choice("recall", "window(budget=9)", None, 0))
    assert (len(prompt), len(fed), answers) == (384, 64, ())


# What is chosen


def test_the_smallest_budget_of_the_first_recall_question_is_chosen():
    frame = results(
        questions=("gone(x=1)", QUESTION, "passkey()"), policies=("full()", "oracle_future()", "h2o()")
    )
    found = choose(frame)
    first = next(one for one in frame["question"] if one != "gone(x=1)")
    assert found == Choice("probe", "h2o(fraction=0.1)", first, 0)
    assert choose(frame, "tova(budget=5)") == Choice(
        "probe", "tova(budget=5)", first, int(frame[frame["question"] == first].iloc[0]["seed"])
    )


def test_a_budget_in_tokens_can_be_the_smallest():
    frame = results(questions=(QUESTION,), policies=("full()", "h2o()"), budgets=(0.5, 12.0), failures=0)
    assert choose(frame) == Choice("probe", "h2o(budget=12)", QUESTION, 0)


def test_without_a_recall_question_the_text_is_held_out():
    found = choose(results(questions=("gone(x=1)",), policies=("h2o()",), budgets=(0.5,)))
    assert found == Choice("probe", "h2o(fraction=0.5)", None, 0)


def test_nothing_is_chosen_where_nothing_evicts():
    assert choose(results(policies=("full()",))) is None


@pytest.mark.parametrize(
    ("policy", "budget", "spelled"),
    [
        ("h2o()", 0.25, "h2o(fraction=0.25)"),
        ("h2o()", 1.0, "h2o(budget=1)"),
        ("adakv(policy=snapkv(window=4))", 32.0, "adakv(budget=32, policy=snapkv(window=4))"),
        ("h2o(budget=7)", math.nan, "h2o(budget=7)"),
    ],
)
def test_a_budget_goes_into_the_spelling(policy, budget, spelled):
    assert policies.make(budgeted(policy, budget)) == policies.make(spelled)


# Texts


def test_pieces_join_to_the_text_however_characters_are_cut():
    text = "aé€😀 z"
    tokens = list(text.encode())
    pieces = texts(ByteTokenizer(), tokens)
    assert len(pieces) == len(tokens)
    assert "".join(pieces) == text
    assert texts(ByteTokenizer(), []) == ()


@pytest.mark.parametrize(
    ("pieces", "answers", "marked"),
    [
        (("ab", "cd", "ef"), ("cd",), [1]),
        (("ab", "cd", "ef"), ("bc",), [0, 1]),
        (("ab", "", "cd", "abcd"), ("a", "d"), [0, 2, 3]),
        (("aa", "a"), ("aa",), [0, 1]),
        (("ab",), ("x", ""), []),
    ],
)
def test_answers_are_found_in_the_pieces(pieces, answers, marked):
    assert np.flatnonzero(holds(pieces, answers, 7)).tolist() == marked
