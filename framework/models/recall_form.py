"""What the bundled model `recall` computes, in closed form, and the prompts that it answers.

`recall` is a two-layer induction circuit over bytes, set by formula and not trained. After `... K V ... K`, where the
byte K came once before, it predicts V; a byte that never came before is answered by byte 0. Every prompt begins with
byte 0, the sink.

The code of a byte. Its four base-4 digits, times the octacode, through the Gray map, give 16 signs, `codes()[byte]`.
With g(a, b) = code[a] . code[b]: g(a, a) = 16, g(a, a ^ 128) = -16, any other pair has g in {4, 0, -4}. `code[0]` is
all ones.

The attention. Query i, key j <= i, distance d = i - j, x the bytes, p(j) = x[j - 1] and p(0) = x[0]. The weight is the
softmax over j of these scores; heads 0 and 1 read kv head 0, heads 2 and 3 read kv head 1.

    layer 0  head 0  previous byte   sum_m AMPLITUDES[m] cos(FREQUENCIES[m] (d - 1))   attends to i - 1
             head 1  the one before  the same with d - 2                               attends to i - 2
             head 2  uniform         0                                                 weight 1 / (i + 1)
             head 3  sink            48 if x[j] = 0, else 0                            attends to byte 0
    layer 1  head 0  match           48 if x[j] = 0,                                   attends to j with p(j) = x[i],
                                     else 4.5 (g(x[i], p(j)) - g(x[i], x[j]) / 2)      or else to byte 0
             head 1  soft match      a quarter of head 0                               as head 0, spread out
             head 2  uniform         0                                                 weight 1 / (i + 1)
             head 3  same byte       4.5 g(x[i], x[j])                                 attends to j with x[j] = x[i]

A byte 0 that is not the first scores 48 + 4.5 (g(x[i], p(j)) - g(x[i], 0)) in the match head.

Only heads 0 write to the residual: layer 0 the code of the previous byte, layer 1 the code of the byte attended to. So
layer 1 reads K off the slot of V, and it is the slot of V, not that of K, which recall needs. Among bytes below 128
the match head scores 63 or more on that slot, 48 on the sink, 36 on a slot whose byte and previous byte are both x[i],
and 27 or less elsewhere. With the slot of V evicted from kv head 0 of layer 1 the answer is therefore byte 0; with the
sink gone too it is arbitrary, and `predict` gives it. The half of g(x[i], x[j]) is there for a query whose predecessor
was evicted from layer 0: it may then read itself as the byte before, and would match itself as well as V.

Exact but for three small terms: head 0 of layer 0 leaves 2e-7 of its weight to other distances (2e-5 at 8192
positions); the cosine by which rope turns the codes is within 8e-6 of 1 at distance 4096; and the queries of heads 0
and 1 of layer 0 are rounded to float16, which `phases` does too.
"""

from typing import NamedTuple

import numpy as np

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
ROPE_THETA = 2.0**40
LONGEST = 8192  # positions for which the previous-byte head is sharp
SINK = 0

# The amplitudes are a linear program's answer, rounded: they make the score at distance 1 exceed that at any other
# distance by 17.5 up to 4096 positions. The program's gap for real numbers summing to 80 is 18.3.
AMPLITUDES = np.array([38.0, 11, 5, 6, 7, 2, 4, 3, 4])
FREQUENCIES = ROPE_THETA ** (-np.arange(AMPLITUDES.size) / (HEAD_DIM // 2))
MATCH, SOFTEN, TO_SINK = 4.5, 0.25, 48.0

KEYS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8).astype(np.int64)
VALUES = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8).astype(np.int64)
NOISE = np.array([byte for byte in range(32, 127) if byte not in KEYS])


def codes() -> np.ndarray:
    """The signs of all bytes [256, 16]: the Nordstrom-Robinson code, as the Gray image of the octacode."""
    # a basis of the octacode whose last row makes opposite codes differ in the highest bit, so none are both ASCII
    rows = [[*np.roll([3, 1, 2, 1, 0, 0, 0], shift), 1] for shift in range(3)] + [[1] * 8]
    digits = np.arange(256)[:, None] // 4 ** np.arange(4) % 4
    words = digits @ np.array(rows) % 4
    gray = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]])
    return gray[words].reshape(256, 16).astype(np.float64)


def phases(head: int) -> np.ndarray:
    """The un-rotated query of layer 0's head 0 or 1 on its pairs, as float16 stores it: [pairs] complex."""
    wanted = AMPLITUDES / 2 * np.exp(-1j * FREQUENCIES * (head + 1))
    return 2 * (wanted.real.astype(np.float16) + 1j * wanted.imag.astype(np.float16).astype(np.float64))


def distance_scores(head: int, count: int) -> np.ndarray:
    """Scores of layer 0's head 0 or 1 at distances 0 to count - 1: [count]."""
    turned = phases(head) * np.exp(1j * FREQUENCIES * np.arange(count)[:, None])
    return turned.real.sum(axis=1)


def scores(tokens: np.ndarray, layer: int, head: int, queries: np.ndarray | None = None) -> np.ndarray:
    """Scores before the softmax [queries, tokens] of one head; -inf at positions after the query.

    tokens: one prompt [tokens]. queries: the positions that ask; all by default.
    """
    tokens = np.asarray(tokens)
    positions = np.arange(tokens.size)
    queries = positions if queries is None else np.asarray(queries)
    distance = queries[:, None] - positions
    sink = tokens == SINK
    code = codes()
    asked = code[tokens[queries]]
    if head == 2:
        out = np.zeros(distance.shape)
    elif layer == 0 and head == 3:
        out = np.where(sink, TO_SINK, 0.0) + np.zeros(distance.shape)
    elif layer == 0:
        out = distance_scores(head, tokens.size)[np.maximum(distance, 0)]
    elif head == 3:
        out = MATCH * asked @ code[tokens].T
    else:
        previous = code[tokens[np.maximum(positions - 1, 0)]]
        content = previous - code[tokens] / 2 - sink[:, None] * code[SINK] / 2
        out = (MATCH * asked @ content.T + TO_SINK * sink) * (SOFTEN if head == 1 else 1.0)
    return np.where(distance >= 0, out, -np.inf)


def attention(
    tokens: np.ndarray,
    layer: int,
    head: int,
    queries: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """Attention weights [queries, tokens] of one head, each row summing to 1.

    kept: the positions still in the cache of this layer and kv head; all by default. A query always sees itself.
    """
    tokens = np.asarray(tokens)
    queries = np.arange(tokens.size) if queries is None else np.asarray(queries)
    out = scores(tokens, layer, head, queries)
    if kept is not None:
        seen = np.isin(np.arange(tokens.size), kept) | (np.arange(tokens.size) == queries[:, None])
        out = np.where(seen, out, -np.inf)
    weights = np.exp(out - out.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def predict(tokens: np.ndarray, kept: np.ndarray | None = None) -> int:
    """The byte that the model puts after `tokens`.

    kept: the positions still in the cache of kv head 0 of layer 1 when the last token asks, alone in its call; all by
    default. What the other caches keep by then does not matter, as long as the sink or the answer is kept: it changes
    only what the last token knows of its predecessor, and the match head asks for its byte.
    """
    tokens = np.asarray(tokens)
    weights = attention(tokens, 1, 0, np.array([tokens.size - 1]), kept)[0]
    code = codes()
    return int(np.argmax(code @ (weights @ code[tokens])))


class Prompt(NamedTuple):
    """A prompt whose last token asks for a planted pair."""

    tokens: np.ndarray  # [length]; the first is the sink, the last is the key asked for
    answer: int  # the byte to come
    value_position: int  # of the answer; recall needs this position in kv head 0 of layer 1
    keys: np.ndarray  # [pairs] all planted keys, in order of position
    values: np.ndarray  # [pairs]
    value_positions: np.ndarray  # [pairs]; each key lies one before its value


def prompt(rng: np.random.Generator, length: int, pairs: int = 1) -> Prompt:
    """A prompt of `length` bytes with `pairs` planted pairs at random places, asking for one of them.

    Keys are upper-case letters and come once before the query; values are lower-case letters, no two the same; the rest
    is printable noise without upper case. For a policy, feed tokens[:-1], let it evict, and then ask with
    tokens[-1:]. The same state of `rng` gives the same prompt. At most 26 pairs, and length >= 2 * pairs + 2.
    """
    if not 1 <= pairs <= KEYS.size:
        raise ValueError(f"recall prompt: pairs is {pairs}; give 1 to {KEYS.size}")
    if length < 2 * pairs + 2:
        raise ValueError(f"recall prompt: length is {length}; {pairs} pairs need at least {2 * pairs + 2}")
    tokens = rng.choice(NOISE, length)
    keys, values = rng.choice(KEYS, pairs, replace=False), rng.choice(VALUES, pairs, replace=False)
    # drawing in a line shorter by one place a pair, then spreading, keeps pairs from overlapping
    starts = 1 + np.sort(rng.choice(length - 2 - pairs, pairs, replace=False)) + np.arange(pairs)
    asked = int(rng.integers(pairs))
    tokens[0], tokens[starts], tokens[starts + 1], tokens[-1] = SINK, keys, values, keys[asked]
    return Prompt(tokens, int(values[asked]), int(starts[asked] + 1), keys, values, starts + 1)
