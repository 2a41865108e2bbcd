"""Generation: prompts to text on any backend. The loop is the backend's; what drives it is written once."""

import operator
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from framework.arrays import FAR
from framework.backend import Model
from framework.cache import Bytes, Cache
from framework.codec import Codec
from framework.decode import Sampling
from framework.errors import KvtwinError
from framework.eviction import resolved
from framework.policy import Policy, policies

Chat = Sequence[Mapping[str, str]]
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Chat | Sequence[Chat]
Question = str | Sequence[int] | Sequence[str | Sequence[int] | None] | None
PIECE = 16  # tokens between two updates of the progress bar


@dataclass(frozen=True)
class Generated:
    """What came out, one entry per prompt.

    `tokens`: new ids, the stop token included. `text`: their text, the stop token left out. `kept`: positions held in
    each layer at the end, [batch, kv_heads, kept], -1 padded. `bytes`: what the cache holds at the end. `seconds`:
    prefill and decode, compilation included. `cache`: to go on with; it has seen prompts and new tokens.
    """

    tokens: list[list[int]]
    text: list[str]
    kept: list[np.ndarray]
    bytes: Bytes
    seconds: float
    prefill_seconds: float
    cache: Cache


def generate(
    model: Model,
    prompts: Prompts,
    *,
    question: Question = None,
    policy: str | Policy = "full()",
    codec: str | Codec = "full()",
    cache: Cache | None = None,
    max_new_tokens: int = 64,
    temperature: float | int = 0.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    chunk: int | None = None,
    evict: Literal["prompt", "chunk"] = "prompt",
    length: int | None = None,
    progress: bool | None = None,
) -> Generated:
    """Continue prompts of any lengths, as one batch.

    `prompts`: texts, token ids, or chats (lists of messages) where the tokenizer has a template. `question`: a text or
    ids behind every prompt, or one for each (None: no question), marked as such for policies that ask what it is about;
    a chat has none. `cache`: goes on with this cache, under its policy, instead of a new one; a question of an earlier
    turn is none any more. `stop`: ids that end a row (default: the model's own). `chunk`:
    prefill that many tokens at a time, compressing at the end of the prompt, or with `evict="chunk"` after each.
    `length`: the final number of tokens, which dynamic rope scaling needs to know. `progress`: a bar on standard error
    (default: only on a terminal).
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    rows = read_prompts(model, prompts)
    asked = read_questions(model, prompts, len(rows), question)
    _check_count(max_new_tokens)
    begun = time.perf_counter()
    cache, logits = prefill(model, rows, cache, policy, codec, max_new_tokens, chunk, evict, length, asked)
    prefilled = time.perf_counter()
    ends = list(model.spec.stop if stop is None else stop)
    pieces = []
    shown = sys.stderr.isatty() if progress is None else progress
    with _bar(shown) as bar:
        task = bar.add_task("tokens", total=max_new_tokens)
        active, done = np.ones(len(rows), bool), 0
        while done < max_new_tokens and active.any():
            count = min(PIECE if shown else max_new_tokens, max_new_tokens - done)
            new, logits, cache = model.decode(cache, logits, sampling, ends, count, first=done, active=active)
            active &= ~np.isin(new, ends).any(1) & (new[:, -1] >= 0)
            done += count
            pieces.append(new)
            bar.update(task, completed=done)
    seconds = time.perf_counter() - begun
    tokens = [[int(token) for token in row if token >= 0] for row in np.concatenate(pieces, axis=1)]
    text = [model.tokenizer.decode([token for token in row if token not in ends]) for row in tokens]
    return Generated(tokens, text, cache.kept, cache.bytes, seconds, prefilled - begun, cache)


def stream(
    model: Model,
    prompt: str | Sequence[int] | Chat,
    *,
    question: Question = None,
    policy: str | Policy = "full()",
    codec: str | Codec = "full()",
    max_new_tokens: int = 64,
    stop: Sequence[int] | None = None,
    chunk: int | None = None,
    length: int | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt in pieces that never cut a character. Options as in `generate`."""
    rows = read_prompts(model, prompt)
    if len(rows) > 1:
        raise KvtwinError(f"{len(rows)} prompts came; expected one, since a stream is one text")
    asked = read_questions(model, prompt, 1, question)
    _check_count(max_new_tokens)
    settings = Sampling(**sampling)
    cache, logits = prefill(model, rows, None, policy, codec, max_new_tokens, chunk, "prompt", length, asked)
    ends = list(model.spec.stop if stop is None else stop)
    decoder = model.tokenizer.decoder()
    for number in range(max_new_tokens):
        new, logits, cache = model.decode(cache, logits, settings, ends, 1, first=number)
        token = int(new[0, 0])
        if token in ends:
            break
        if piece := decoder.push(token):
            yield piece
    if rest := decoder.finish():
        yield rest


def read_prompts(model: Model, prompts: Prompts) -> list[list[int]]:
    """Token ids of each prompt: texts, ids, or chats of `{"role": ..., "content": ...}`; empty ones are refused."""
    rows = [_ids(model, one) for one in _each(prompts)]
    if not rows:
        raise KvtwinError("no prompts; expected at least one")
    for index, row in enumerate(rows):
        if not row:
            raise KvtwinError(f"prompt {index} is empty; expected at least one token")
    return rows


def read_questions(
    model: Model, prompts: Prompts, count: int, question: Question
) -> list[list[int] | None] | None:
    """Token ids of the question behind each of `count` prompts, or None where there is none; bad ones are refused."""
    if question is None:
        return None
    every = _each(question)
    if any(not isinstance(one, str) and _is_chat(one) for one in (*_each(prompts), *every)):
        raise KvtwinError(
            "a question came with a chat, whose template ends it; expected it in the chat's last message, or texts or "
            "ids as prompt and question"
        )
    alone = len(every) == 1 and every[0] is question
    if len(every) != count and not alone:
        raise KvtwinError(f"{len(every)} questions came; expected one, or one for each of {count} prompts")
    rows = [None if one is None else _ids(model, one, opening=False) for one in every]
    for index, row in enumerate(rows):
        if row is not None and not row:
            raise KvtwinError(
                f"question {index} is empty; expected at least one token, or None for no question"
            )
    return rows * count if alone else rows


def _each(prompts: Any) -> Sequence[Any]:
    """The prompts, one by one, where one alone may have come."""
    alone = isinstance(prompts, str) or (
        len(prompts) > 0 and isinstance(prompts[0], int | np.integer | Mapping)
    )
    return [prompts] if alone else prompts


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _check_count(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise KvtwinError(f"max_new_tokens is {count!r}; expected an integer >= 1")


def _ids(model: Model, prompt: Any, opening: bool = True) -> list[int]:
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt, opening)
    if _is_chat(prompt):
        return model.tokenizer.chat(prompt)
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise KvtwinError(f"a prompt came as {prompt!r}; expected a text, token ids or a chat") from error


def prefill(
    model: Model,
    rows: list[list[int]],
    cache: Cache | None,
    policy: str | Policy,
    codec: str | Codec,
    new_tokens: int,
    chunk: int | None,
    evict: Literal["prompt", "chunk"],
    length: int | None = None,
    questions: Sequence[list[int] | None] | None = None,
) -> tuple[Cache, np.ndarray]:
    """Feed the prompts, each with its question behind it, and compress; returns the cache and the logits after each
    row's last token [batch, vocab]."""
    if chunk is not None and chunk < 1:
        raise KvtwinError(f"chunk is {chunk}; expected at least 1 token")
    if evict not in ("prompt", "chunk"):
        raise KvtwinError(f'evict is {evict!r}; expected "prompt" or "chunk"')
    asked = list(questions or [None] * len(rows))
    marks = np.array([FAR if one is None else len(row) for row, one in zip(rows, asked, strict=True)])
    rows = [row + (one or []) for row, one in zip(rows, asked, strict=True)]
    longest = max(len(row) for row in rows)
    if cache is None:
        made = policies.make(policy) if isinstance(policy, str) else policy
        cache = model.cache(resolved(made, longest), codec, len(rows), length=length)
    if len(rows) != cache.batch:
        raise KvtwinError(f"prompts have {len(rows)} rows; expected {cache.batch}, the batch of the cache")
    padded, begins = _padded(rows), np.where(marks == FAR, FAR, cache.seen + marks)
    cache.mark(begins)
    cache.expect(new_tokens)
    again = [cache.policy.passes(row, partial(model.tokenizer.encode, opening=False)) for row in rows]
    if any(again) and evict == "chunk":
        raise KvtwinError(
            f'{policies.spelling(cache.policy)} reads the whole prompt a second time; expected evict="prompt"'
        )
    logits = np.zeros((len(rows), model.spec.vocab))
    size = chunk or longest
    for start in range(0, longest, size):
        part = padded[:, start : start + size]
        last = start + size >= longest and not any(again)
        ahead = evict == "chunk" and cache.policy.needs.question
        coming = [
            one if one and ahead and mark >= start + size else []
            for one, mark in zip(asked, marks, strict=True)
        ]
        now = (last or evict == "chunk") and not any(coming)
        out, cache = model.step(part, cache, phase="prefill", evict=now)
        came = (part >= 0).any(axis=1, keepdims=True)
        logits = np.where(came, out[:, 0], logits).astype(out.dtype)
        if any(coming):
            cache.mark(np.where([bool(one) for one in coming], cache.seen, begins))
            cache = read_again(model, cache, [[one] for one in coming])
            cache.mark(begins)
            cache = _evicted(model, cache)
    if any(again):
        cache = _evicted(model, read_again(model, cache, again))
    return cache, logits


def _evicted(model: Model, cache: Cache) -> Cache:
    """The cache after the eviction that it holds back."""
    return model.step(_padded([[]] * cache.batch), cache, logits=None, phase="prefill")[1]


def read_again(model: Model, cache: Cache, passes: Sequence[Sequence[Sequence[int]]]) -> Cache:
    """Let the policy see the passes of each row behind a prompt that no eviction has touched yet."""
    for number in range(max(map(len, passes))):
        parts = [row[number] if number < len(row) else [] for row in passes]
        cache = model.read(_padded(parts), cache)
    return cache


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids as one array, -1 on the right, at least one column."""
    wide = max(1, max(map(len, rows)))
    return np.array([[*row] + [-1] * (wide - len(row)) for row in rows], np.int32)


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shown)
