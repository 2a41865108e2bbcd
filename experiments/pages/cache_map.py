"""The cache map: one run again, with every eviction, as the call at which each token of each head went, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from experiments.compare import Trace, run
from experiments.history import History
from experiments.question import questions
from experiments.recall import Case, Recall
from experiments.text import held_out
from framework.backend import Model
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.policy import name, policies
from framework.tokenizer import Tokenizer

REASONS = ("score", "protected", "window")
STAYED = -1
STEPS = 96  # tokens after the prompt, at most
TEXT = (384, 64)  # tokens of held-out text, where no question gives one: prompt, and after it


@dataclass(frozen=True)
class Choice:
    """What is run again: a model, a policy with its budget, and the question and seed whose text it reads (None: held-
    out text)."""

    model: str
    policy: str
    question: str | None
    seed: int


@dataclass(frozen=True)
class CacheMap:
    """Rows are the kv heads of all layers, columns the tokens.

    `heads`: layer and head of each row. `pieces`: the text of each token; `answer`: whether it belongs to what is asked
    for. `came`: the call at which a token came, 0 being the prompt. `went` [rows, tokens]: the call at which it was
    evicted, or STAYED. `reason` (into REASONS), `score` and `threshold` [rows, tokens] are of that eviction, as
    `experiments.history.Eviction` says; NaN where there is none.
    """

    choice: Choice
    resolved: str
    calls: int
    heads: tuple[tuple[int, int], ...]
    pieces: tuple[str, ...]
    answer: np.ndarray
    came: np.ndarray
    went: np.ndarray
    reason: np.ndarray
    score: np.ndarray
    threshold: np.ndarray

    def kept(self, call: int) -> np.ndarray:
        """Which tokens each row holds after this call [rows, tokens]."""
        return (self.came <= call) & ((self.went == STAYED) | (self.went > call))

    def state(self, call: int) -> np.ndarray:
        """0 not come yet, 1 evicted before or at the end of the prompt, 2 evicted at this later call, 3 held."""
        gone = ((self.went != STAYED) & (self.went <= call)).astype(np.uint8)
        now = (self.went == call) & (call > 0)
        return np.where(self.kept(call), 3, gone + now).astype(np.uint8)

    @cached_property
    def evicted(self) -> int:
        """How many tokens went, over all rows."""
        return int((self.went != STAYED).sum())

    def frame(self) -> pd.DataFrame:
        """One row per head and token, for the CSV file."""
        rows, tokens = self.went.shape
        head = np.repeat(np.array(self.heads).reshape(rows, 2), tokens, axis=0)
        gone = self.went.ravel() != STAYED
        return pd.DataFrame(
            {
                "layer": head[:, 0],
                "head": head[:, 1],
                "position": np.tile(np.arange(tokens), rows),
                "token": np.tile(np.array(self.pieces, dtype=object), rows),
                "answer": np.tile(self.answer, rows),
                "came": np.tile(self.came, rows),
                "went": np.where(gone, self.went.ravel().astype(float), np.nan),
                "reason": np.where(gone, np.array(REASONS, dtype=object)[self.reason.ravel()], ""),
                "score": self.score.ravel(),
                "threshold": self.threshold.ravel(),
            }
        )


def choose(frame: pd.DataFrame, policy: str | None = None) -> Choice | None:
    """The evicting cell of smallest budget of the first Recall question, at its first seed; `policy` in its place where
    one is given. Without a Recall question, of all questions; None where nothing evicts and no policy is given."""
    usable = frame[frame["error"].fillna("") == ""]
    recall = next((one for one in dict.fromkeys(usable["question"]) if is_recall(one)), None)
    asked = usable if recall is None else usable[usable["question"] == recall]
    if policy is not None:
        first = (asked if len(asked) else frame).iloc[0]
        return Choice(str(first["model"]), policy, recall, int(first["seed"]))
    evicting = asked[asked["requested"].notna() & (asked["kept"] < asked["context"])]
    evicting = evicting[~evicting["method"].str.startswith("oracle")]
    if not len(evicting):
        return None
    least = evicting.sort_values(["requested", "seed"], kind="stable").iloc[0]
    seed = int(evicting.loc[evicting["policy"] == least["policy"], "seed"].min())
    return Choice(str(least["model"]), budgeted(least["policy"], least["budget"]), recall, seed)


def is_recall(question: str) -> bool:
    """Whether the question draws a context and turns."""
    try:
        return isinstance(questions.make(question), Recall)
    except KvtwinError:
        return False


def budgeted(policy: str, budget: float) -> str:
    """The spelling with the budget of the sweep: a share of the prompt below 1, tokens above."""
    if not np.isfinite(budget):
        return policy
    made = policies.make(policy)
    made = replace(made, fraction=float(budget)) if budget < 1 else replace(made, budget=int(budget))
    return policies.spelling(made)


def draw(model: Model, choice: Choice) -> tuple[list[int], list[int], tuple[str, ...]]:
    """The prompt, what follows it one token a call (the question and the right answer), and the answers."""
    tokenizer = model.tokenizer
    if choice.question is None:
        ids = tokenizer.encode(held_out())[: sum(TEXT)]
        return ids[: TEXT[0]], ids[TEXT[0] :], ()
    question = questions.make(choice.question)
    assert isinstance(question, Recall)
    case: Case = question.draw(tokenizer, choice.seed)
    following = [
        token
        for turn in case.turns
        for text in (turn.text, turn.wanted)
        for token in tokenizer.encode(text, opening=False)
    ]
    answers = tuple(answer for turn in case.turns for answer in turn.answers)
    return tokenizer.encode(case.context), following[:STEPS], answers


def lead(model: Model, prompt: Sequence[int], fed: Sequence[int], policy: str) -> History:
    """Read the prompt, evict, go on along the given tokens, and keep every decision."""
    spelled = name(resolved(policies.make(policy), len(prompt)))
    along = Trace(np.array([prompt], np.int32), np.array([fed], np.int32).reshape(1, len(fed)))
    along.decisions = [[] for _ in range(len(fed) + 1)]
    trace = run(model, along.prompt, spelled, len(fed), along=along, watch=False)
    windows = tuple(layer.window for layer in model.spec.layers)
    return History(spelled, trace.prompt, trace.fed, trace.decisions, windows)


def cache_map(model: Model, choice: Choice) -> CacheMap:
    """Run what was chosen, and note when and why each token went."""
    prompt, fed, answers = draw(model, choice)
    history = lead(model, prompt, fed, choice.policy)
    pieces = texts(model.tokenizer, [*prompt, *fed])
    heads = tuple(
        (index, head) for index, layer in enumerate(model.spec.layers) for head in range(layer.kv_heads)
    )
    return mapped(history, choice, heads, pieces, holds(pieces[: len(prompt)], answers, len(pieces)))


def mapped(
    history: History,
    choice: Choice,
    heads: tuple[tuple[int, int], ...],
    pieces: tuple[str, ...],
    answer: np.ndarray,
) -> CacheMap:
    """The first row of a history, as a map."""
    prompt, steps = int((history.prompt[0] >= 0).sum()), history.fed.shape[1]
    shape, row_of = (len(heads), prompt + steps), {head: row for row, head in enumerate(heads)}
    went, reason = np.full(shape, STAYED, np.int16), np.zeros(shape, np.uint8)
    score, threshold = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    for each in history.evictions():
        if each.row == 0:
            place = row_of[each.layer, each.head], each.position
            went[place], reason[place] = each.call, REASONS.index(each.reason)
            score[place] = each.score
            threshold[place] = np.nan if each.threshold is None else each.threshold
    came = np.maximum(np.arange(shape[1]) - prompt + 1, 0).astype(np.int16)
    return CacheMap(
        choice, history.policy, steps, heads, pieces, answer, came, went, reason, score, threshold
    )


def texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[str, ...]:
    """The text that each token adds; that of a character of several tokens stands with its last."""
    decoder = tokenizer.decoder()
    found = [decoder.push(token) for token in tokens]
    if found:
        found[-1] += decoder.finish()
    return tuple(found)


def holds(pieces: Sequence[str], answers: Sequence[str], count: int) -> np.ndarray:
    """Which of `count` tokens, of which the first have these texts, belong to an answer in them."""
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    found = np.zeros(count, bool)
    for answer in filter(None, answers):
        begin = text.find(answer)
        while begin >= 0:
            first, last = np.searchsorted(ends, [begin, begin + len(answer) - 1], side="right")
            found[first : last + 1] = True
            begin = text.find(answer, begin + 1)
    return found


def title(one: CacheMap) -> str:
    """What was run."""
    text = f"{one.choice.question}, seed {one.choice.seed}" if one.choice.question else "held-out text"
    return f"{one.resolved} on {one.choice.model}: {text}"
