"""How probable given continuations are behind contexts that a policy has compressed.

All of a context but its last token is read and compressed at its end; that token and the continuation then come in one
call. The tokens of a call see the cache as it is and each other, and eviction comes after, so that every token of a
continuation is predicted from the compressed cache. Were the whole context read first, the first token of a
continuation, which is the only one of most multiple-choice answers, would be predicted from the full cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.held import held_by
from experiments.question import Held
from framework.backend import Model
from framework.cache import Cache
from framework.errors import KvtwinError
from framework.generate import prefill
from framework.policy import Policy, policies

Tokens = Sequence[int]
Pair = tuple[Tokens, Tokens]


@dataclass(frozen=True)
class Setting:
    """What reads and how: a policy and a codec in their spelling, and at most `rows` texts side by side."""

    model: Model
    policy: str = "full()"
    codec: str = "full()"
    rows: int = 8


@dataclass(frozen=True)
class Score:
    """Of a continuation: the sum of its log-probabilities in nats, and whether each token was the most probable."""

    nats: float
    greedy: bool


def scored(setting: Setting, pairs: Sequence[Pair]) -> Iterator[tuple[int, Score, Held | None]]:
    """The score of the second of each pair behind the first, with the number of the pair, as they come.

    Both have at least one token. A context that occurs several times is read once, and its cache copied. What the cache
    held of it comes with its first pair; None with others, and for a single token, which leaves nothing to compress.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        _check(context, continuation)
        by_context.setdefault(tuple(context), []).append(number)
    for contexts in batches(list(by_context), setting):
        numbers = [(row, number) for row, context in enumerate(contexts) for number in by_context[context]]
        longest = max(len(pairs[number][1]) for _, number in numbers)
        cache, entries = compressed(setting, contexts, longest)
        held = {by_context[context][0]: one for context, one in zip(contexts, entries, strict=True)}
        for start in range(0, len(numbers), setting.rows):
            part = numbers[start : start + setting.rows]
            fed = [[pairs[number][0][-1], *pairs[number][1][:-1]] for _, number in part]
            logits, _ = setting.model.step(
                fed, cache.rows([row for row, _ in part]), logits="all", evict=False
            )
            for (_, number), each in zip(part, logits, strict=True):
                yield number, score(each, pairs[number][1]), held.get(number)


def followed(
    setting: Setting, pairs: Sequence[Pair], chunk: int = 1
) -> Iterator[tuple[int, Score, Held | None]]:
    """The same for texts without a prompt: all is read `chunk` tokens a call, and the policy evicts as at decode.

    With one token a call each token is predicted from what the policy kept of those before it. What was held is that at
    the end of each text. Refused under a policy that asks for a prompt.
    """
    made = policies.make(setting.policy)
    if chunk < 1:
        raise KvtwinError(f"chunk is {chunk}; expected at least 1 token a call")
    if made.evicts and made.fraction is not None:
        raise KvtwinError(
            f"{setting.policy} takes a fraction of a prompt, and a text that is followed token by token has none; "
            "expected a budget in tokens"
        )
    order = sorted(range(len(pairs)), key=lambda number: -sum(map(len, pairs[number])))
    for start in range(0, len(order), setting.rows):
        numbers = order[start : start + setting.rows]
        for number in numbers:
            _check(*pairs[number])
        texts = [[*pairs[number][0], *pairs[number][1][:-1]] for number in numbers]
        encode = partial(setting.model.tokenizer.encode, opening=False)
        if any(made.passes(text, encode) for text in texts):
            raise KvtwinError(
                f"{setting.policy} reads a prompt a second time, and a text that is followed token by token has none; "
                "expected another policy"
            )
        scores, cache = _led(setting, made, texts, [pairs[number][1] for number in numbers], chunk)
        held = held_by(setting.model, cache, [len(text) for text in texts])
        yield from zip(numbers, scores, held, strict=True)


def _led(
    setting: Setting, policy: Policy, texts: Sequence[list[int]], wanted: Sequence[Tokens], chunk: int
) -> tuple[list[Score], Cache]:
    """The scores of what is wanted behind the last tokens of each text, and the cache at their end."""
    longest = max(map(len, texts))
    fed, due = (np.full((len(texts), longest), -1, np.int32) for _ in range(2))
    for row, (text, after) in enumerate(zip(texts, wanted, strict=True)):
        fed[row, : len(text)] = text
        due[row, len(text) - len(after) : len(text)] = list(after)
    nats, greedy = np.zeros(len(texts)), np.ones(len(texts), bool)
    cache = setting.model.cache(policy, setting.codec, len(texts))
    cache.expect(longest)
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        logits, cache = setting.model.step(fed[:, part], cache, logits="all")
        rows, places = np.nonzero(due[:, part] >= 0)
        one, best = predicted(logits[rows, places], due[:, part][rows, places])
        np.add.at(nats, rows, one)
        np.logical_and.at(greedy, rows, best)
    return [Score(float(one), bool(best)) for one, best in zip(nats, greedy, strict=True)], cache


def batches(contexts: Sequence[tuple[int, ...]], setting: Setting) -> Iterator[list[tuple[int, ...]]]:
    """The contexts in batches of at most `rows`, longest first.

    Under a policy with a fraction, which is one number for a batch, those of a batch have one length; and those with a
    single token, of which nothing is read before, are apart.
    """
    alike = policies.make(setting.policy).fraction is not None
    batch: list[tuple[int, ...]] = []
    for context in sorted(contexts, key=len, reverse=True):
        apart = batch and len(context) != len(batch[0]) and (alike or len(context) == 1)
        if len(batch) == setting.rows or apart:
            yield batch
            batch = []
        batch.append(context)
    if batch:
        yield batch


def compressed(
    setting: Setting, contexts: Sequence[Tokens], following: int
) -> tuple[Cache, Sequence[Held | None]]:
    """A cache of all but the last token of each context, compressed at its end, and what it holds of each.

    `following`: so many tokens will come. A cache of contexts with a single token is empty, and holds nothing of them.
    """
    read = [list(context[:-1]) for context in contexts]
    if not all(read):
        return setting.model.cache("full()", setting.codec, len(read)), [None] * len(read)
    cache, _ = prefill(setting.model, read, None, setting.policy, setting.codec, following, None, "prompt")
    return cache, held_by(setting.model, cache, [len(row) for row in read])


def score(logits: Float[np.ndarray, "tokens vocab"], continuation: Tokens) -> Score:
    """The score of a continuation, of which the logits predict one token each, and perhaps more behind them."""
    nats, greedy = predicted(logits[: len(continuation)], np.asarray(continuation, np.int32))
    return Score(float(nats.sum()), bool(greedy.all()))


def predicted(
    logits: Float[np.ndarray, "tokens vocab"], wanted: Int[np.ndarray, "tokens"]
) -> tuple[Float[np.ndarray, "tokens"], Bool[np.ndarray, "tokens"]]:
    """The log-probability of each token, in float64, and whether it is the most probable one, by lowest id."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    nats = wide[np.arange(len(wanted)), wanted] - np.log(np.exp(wide).sum(-1))
    return nats, wide.argmax(-1) == wanted


def _check(context: Tokens, continuation: Tokens) -> None:
    if not len(context) or not len(continuation):
        raise KvtwinError(
            f"a context of {len(context)} tokens and a continuation of {len(continuation)}; expected at least 1 of each"
        )
