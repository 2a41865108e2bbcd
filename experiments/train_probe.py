"""Make `framework/models/probe`: a byte-level Llama that answers recall questions about contexts of up to 1,024 bytes.

    python -m experiments.train_probe

It begins with the weights of `bytes` (experiments/make_bytes.py), whose 1.7 million parameters know Python's source
text, and goes on with flax and optax on text, repeated segments and recall questions (experiments/probe_rows.py), first
short, then long. The text is every file of the running Python's standard library but the held-out ones. An interrupted
run goes on from its orbax checkpoint. The same seed on the same machine and versions gives the same weights.

Printed and written to `curve.csv` in the folder of checkpoints: the training loss, and on cases that training does not
draw the share of questions answered, and the perplexity of the held-out text.
"""

import csv
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from flax import nnx

from backends.flax.decoder import Decoder
from backends.flax.rope import rotate
from experiments.probe_rows import Batch, Mixture, draw
from experiments.question import questions
from experiments.recall import Recall
from experiments.text import held_out, library
from framework.checkpoint import open_checkpoint
from framework.fused import fused, parted
from framework.rope import angles
from framework.spec import ModelSpec
from framework.weights import write

MODELS = Path(__file__).resolve().parent.parent / "framework" / "models"
STAGES = (  # share of the steps, what is drawn
    (0.35, Mixture(tokens=320, rows=24, text=0.3, repeated=0.25)),
    (0.40, Mixture(tokens=576, rows=14, text=0.3, repeated=0.1)),
    (0.25, Mixture(tokens=1120, rows=8, text=0.3, repeated=0.1)),
)
PEAK, WARMUP, DECAY = 2e-3, 100, 0.4  # learning rate, its steps from 0, its last share down to 0
JUDGED = ("passkey(length=512)", "passkey(length=1024)", "mqar(length=512)", "mqar(length=1024)")
EVERY, KEEP = 250, 2  # steps between two judgements and checkpoints; checkpoints kept

State = tuple[Any, Any]


def logits_of(decoder: Decoder, spec: ModelSpec, tokens: jax.Array) -> jax.Array:
    """Logits [rows, tokens, vocab] of whole rows, without a cache: what is trained."""
    places = np.arange(tokens.shape[1])
    x = decoder.embed[...][tokens]
    for module, layer in zip(decoder.layers, spec.layers, strict=True):
        table = tuple(jnp.asarray(each, jnp.float32) for each in angles(layer.rope, places))
        joined = module.attention.query_key_value(module.attention_norm(x))
        heads = joined.reshape(*tokens.shape, layer.kv_heads, layer.group + 2, layer.head_dim)
        query, key, value = jnp.split(heads, [layer.group, layer.group + 1], axis=3)
        turn = partial(_turned, positions=jnp.asarray(places), table=table)
        query = query.reshape(*tokens.shape, layer.heads, layer.head_dim)
        mixed = jax.nn.dot_product_attention(
            turn(query), turn(key[:, :, :, 0]), value[:, :, :, 0], scale=layer.scale, is_causal=True
        )
        x = x + module.attention.output(mixed.reshape(*tokens.shape, -1))
        x = x + module.ffn(module.ffn_norm(x))
    return decoder.head(decoder.norm(x))


def _turned(x: jax.Array, positions: jax.Array, table: tuple) -> jax.Array:
    """Rotate [rows, tokens, heads, head_dim]."""
    rows = jnp.broadcast_to(positions, (x.shape[0], 1, x.shape[1]))
    return jnp.swapaxes(rotate(jnp.swapaxes(x, 1, 2), rows, table), 1, 2)


def loss_of(params: Any, graph: Any, spec: ModelSpec, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean nats of the bytes that count."""
    logits = logits_of(nnx.merge(graph, params), spec, tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return (nats * weights).sum() / weights.sum()


def trainer(graph: Any, spec: ModelSpec, optimizer: optax.GradientTransformation) -> Any:
    """The compiled step: state and batch to state and loss."""

    def step(state: State, tokens: jax.Array, weights: jax.Array) -> tuple[State, jax.Array]:
        params, moments = state
        loss, gradients = jax.value_and_grad(loss_of)(params, graph, spec, tokens, weights)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    return jax.jit(step, donate_argnums=0)


def rates(steps: int) -> optax.Schedule:
    """Up for WARMUP steps, flat, then down to 0 over the last share."""

    def at(step: Any) -> Any:
        return PEAK * jnp.minimum(1.0, jnp.minimum((step + 1) / WARMUP, (steps - step) / (DECAY * steps)))

    return at


def mixture_at(step: int, steps: int) -> Mixture:
    """What is drawn at a step."""
    passed = 0.0
    for share, mixture in STAGES:
        passed += share
        if step < passed * steps:
            return mixture
    return STAGES[-1][1]


def batches(text: np.ndarray, seed: int, first: int, steps: int) -> Iterator[Batch]:
    """The batches from step `first` on; the next one is drawn while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(draw, mixture_at(first, steps), text, seed, first)
        for step in range(first, steps):
            batch = coming.result()
            if step + 1 < steps:
                coming = pool.submit(draw, mixture_at(step + 1, steps), text, seed, step + 1)
            yield batch


class Judge:
    """Cases that training does not draw: by seeds, which training does not use."""

    def __init__(self, spec: ModelSpec, graph: Any, tokenizer: Any, cases: int):
        self.told = jax.jit(lambda params, tokens: logits_of(nnx.merge(graph, params), spec, tokens))
        self.tokenizer, self.cases = tokenizer, cases

    def answered(self, params: Any, spelled: str) -> float:
        """The share of cases whose every answer byte is the model's first choice: what greedy writing would score."""
        question = questions.make(spelled)
        assert isinstance(question, Recall)
        right = []
        for begin in range(0, self.cases, 8):
            drawn = [question.draw(self.tokenizer, seed) for seed in range(begin, begin + 8)]
            rows = [
                (list((case.context + case.turns[0].text).encode()), list(case.turns[0].wanted.encode()))
                for case in drawn
            ]
            tokens = np.zeros((8, question.length + 32), np.int32)
            for row, (asked, wanted) in enumerate(rows):
                tokens[row, : len(asked) + len(wanted)] = asked + wanted
            best = np.asarray(self.told(params, tokens)).argmax(-1)
            for row, (asked, wanted) in enumerate(rows):
                right.append((best[row, len(asked) - 1 :][: len(wanted)] == wanted).all())
        return float(np.mean(right))

    def perplexity(self, params: Any, context: int = 512) -> float:
        """exp of the mean nats a byte over whole windows of the held-out text, as experiments/make_bytes.py has it."""
        codes = np.frombuffer(held_out().encode(), np.uint8).astype(np.int32)
        starts = range(0, len(codes) - context, context)
        windows = np.stack([codes[start : start + context + 1] for start in starts])
        nats = []
        for part in np.array_split(windows, -(-len(windows) // 8)):
            padded = np.zeros((8, context + 1), np.int32)
            padded[: len(part)] = part
            logits = self.told(params, padded[:, :-1])
            each = optax.softmax_cross_entropy_with_integer_labels(logits, padded[:, 1:])
            nats += np.asarray(each)[: len(part)].mean(-1).tolist()
        return math.exp(np.mean(nats))


def main(
    steps: Annotated[int, typer.Option(help="training steps of about 8,000 bytes")] = 3000,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 1_000_003,
    out: Annotated[Path, typer.Option(help="folder for config.json and model.safetensors")] = MODELS
    / "probe",
    checkpoints: Annotated[Path, typer.Option(help="folder to go on from")] = Path("probe-checkpoints"),
    cases: Annotated[int, typer.Option(help="cases of each question at a judgement")] = 64,
    last: Annotated[int, typer.Option(help="cases of each question at the end")] = 200,
) -> None:
    begun = open_checkpoint("bytes")
    spec, tokenizer = begun.spec, begun.tokenizer
    weights = {name: jnp.asarray(x, jnp.float32) for name, x in fused(spec, begun.weights)}
    graph, params = nnx.split(Decoder(weights, spec))
    decays = jax.tree.map(lambda x: x.ndim > 1, params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rates(steps), b1=0.9, b2=0.95, weight_decay=0.1, mask=decays),
    )
    text = np.frombuffer(library()[0], np.uint8)
    state, first = (params, optimizer.init(params)), 0
    checkpoints = checkpoints.resolve()
    with ocp.CheckpointManager(
        checkpoints, options=ocp.CheckpointManagerOptions(max_to_keep=KEEP)
    ) as manager:
        if (saved := manager.latest_step()) is not None:
            state = manager.restore(saved, args=ocp.args.StandardRestore(state))
            first = saved
        step_of, judge = trainer(graph, spec, optimizer), Judge(spec, graph, tokenizer, cases)
        clock, losses = time.monotonic(), []
        for step, batch in enumerate(batches(text, seed, first, steps), start=first):
            state, loss = step_of(state, batch.tokens, batch.weights)
            losses.append(float(loss))
            if (step + 1) % EVERY and step + 1 < steps:
                continue
            manager.save(step + 1, args=ocp.args.StandardSave(state))
            found = {
                "step": step + 1,
                "seconds": round(time.monotonic() - clock),
                "loss": round(float(np.mean(losses)), 4),
                "perplexity": round(judge.perplexity(state[0]), 4),
            } | {spelled: judge.answered(state[0], spelled) for spelled in JUDGED}
            losses = []
            print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
            _append(checkpoints / "curve.csv", found)
    finished = {
        name: np.asarray(x) for name, x in _named(nnx.merge(graph, state[0]), fused(spec, begun.weights))
    }
    half = {name: x.astype(np.float16) for name, x in parted(spec, finished).items()}
    if out.exists():
        shutil.rmtree(out)
    write(out, spec, half)
    kept = {name: jnp.asarray(x, jnp.float32) for name, x in fused(spec, half)}
    params = nnx.state(Decoder(kept, spec))
    judge = Judge(spec, graph, tokenizer, last)
    print(f"held-out byte perplexity {judge.perplexity(params):.3f}")
    for spelled in JUDGED:
        print(f"{spelled} answered {judge.answered(params, spelled):.3f} of {last}")


def _named(decoder: Decoder, names: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, jax.Array]]:
    """The decoder's arrays by the names that they were made from."""
    for name, _ in names:
        at: Any = decoder
        for part in name.split("."):
            if isinstance(at, nnx.Param):
                break
            at = at[int(part)] if part.isdecimal() else getattr(at, part)
        yield name, at[...]


def _append(path: Path, found: dict[str, Any]) -> None:
    """One line more of the curve."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, found)
        if fresh:
            writer.writeheader()
        writer.writerow(found)


if __name__ == "__main__":
    typer.run(main)
