"""What a model writes behind contexts that a policy has compressed, up to a stop string.

As in continuations.py the last token of a context is read behind the compression, so that the first token
that is written comes of the compressed cache too. From there on the policy evicts as at every decode step.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from experiments.harness.continuations import Setting, Tokens, batches
from experiments.held import held_by
from experiments.question import Held
from framework.cache import Cache
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.generate import prefill
from framework.policy import policies

PIECE = 16  # tokens between two looks for stop strings


def written(
    setting: Setting,
    contexts: Sequence[Tokens],
    stops: Sequence[str],
    room: int,
    sampling: Sampling | None = None,
) -> Iterator[tuple[int, str, Held | None]]:
    """What comes behind each context, with its number, and what the cache held of it; None for a single token.

    A text ends before the first of the stop strings in it, at a stop token of the model, or after `room` tokens. Greedy
    unless `sampling` says otherwise; its noise depends on the place of a context among those of its batch.
    """
    if room < 1:
        raise KvtwinError(f"room for {room} tokens; expected at least 1")
    if not all(map(len, contexts)):
        raise KvtwinError("a context has no token; expected at least 1")
    waiting: dict[tuple[int, ...], list[int]] = {}
    for number, context in enumerate(contexts):
        waiting.setdefault(tuple(context), []).append(number)
    every = [context for context, numbers in waiting.items() for _ in numbers]
    for batch in batches(every, setting):
        cache, logits, held = _begun(setting, batch, room)
        texts = _texts(setting, cache, logits, stops, room, sampling)
        for context, text, one in zip(batch, texts, held, strict=True):
            yield waiting[context].pop(0), text, one


def _begun(
    setting: Setting, batch: Sequence[tuple[int, ...]], room: int
) -> tuple[Cache, np.ndarray, Sequence[Held | None]]:
    """The cache behind the contexts, the logits after them, and what was held of all but their last token."""
    read, last = [list(context[:-1]) for context in batch], [context[-1:] for context in batch]
    held: Sequence[Held | None] = [None] * len(batch)
    if all(read):
        cache, _ = prefill(setting.model, read, None, setting.policy, setting.codec, room + 1, None, "prompt")
        held = held_by(setting.model, cache, [len(row) for row in read])
    else:
        policy = resolved(policies.make(setting.policy), 1)
        cache = setting.model.cache(policy, setting.codec, len(batch))
    cache.expect(room)
    logits, cache = setting.model.step(last, cache)
    return cache, logits[:, 0], held


def _texts(
    setting: Setting,
    cache: Cache,
    logits: np.ndarray,
    stops: Sequence[str],
    room: int,
    sampling: Sampling | None,
) -> list[str]:
    """What is written, a piece at a time, until every row has met a stop or has no room."""
    model, ends = setting.model, list(setting.model.spec.stop)
    rows: list[list[int]] = [[] for _ in range(cache.batch)]
    active, done = np.ones(cache.batch, bool), 0
    while done < room and active.any():
        count = min(PIECE, room - done)
        new, logits, cache = model.decode(
            cache, logits, sampling or Sampling(), ends, count, first=done, active=active
        )
        done += count
        for row, tokens in enumerate(new.tolist()):
            if active[row]:
                rows[row] += [token for token in tokens if token >= 0 and token not in ends]
                ended = any(token < 0 or token in ends for token in tokens)
                active[row] = not ended and not _met(model.tokenizer.decode(rows[row]), stops)
    return [cut(model.tokenizer.decode(row), stops) for row in rows]


def _met(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops if stop)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the stop strings, cut at one after the other; an empty one stops nothing."""
    for stop in stops:
        text = text.partition(stop)[0] if stop else text
    return text
