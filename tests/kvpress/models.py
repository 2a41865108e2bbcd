"""What kvpress is recorded on: `python -m tests.kvpress.models FOLDER` writes models and texts that record.py reads."""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from framework.family import family
from framework.policy import policies
from framework.random import normal
from framework.spec import ModelSpec
from framework.weights import Weights, random_weights, write

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 701,
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 733,
        "hidden_size": 27,
        "intermediate_size": 31,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}
# (model, tokens of the prompt, kvpress' compression ratio)
CASES = [("llama", 61, 0.5), ("llama", 150, 0.75), ("qwen3", 61, 0.75), ("qwen3", 150, 0.5)]
QUESTION = 9  # tokens at the end of a prompt, for presses that read it for a question
SKETCH = 48
SEED = 5


def model(name: str) -> tuple[ModelSpec, Weights]:
    """A spec and random weights that float32 holds."""
    spec = family(CONFIGS[name]).spec(CONFIGS[name])
    return spec, random_weights(spec, SEED, np.float32)


def text(name: str, length: int) -> np.ndarray:
    """Token ids [1, length + 1], a prompt and one token more, none twice: equal tokens have equal keys in layer 0."""
    random = np.random.default_rng([SEED, length])
    return random.permutation(CONFIGS[name]["vocab_size"])[: length + 1].astype(np.int32)[None]


def delimiter(name: str, length: int) -> int:
    """An id that the text does not have: FinchPress finds by it where the question begins, and takes it out."""
    return min(set(range(CONFIGS[name]["vocab_size"])) - set(text(name, length)[0].tolist()))


def sketches(name: str) -> list[np.ndarray]:
    """What the policy `leverage` multiplies the keys of each layer by, unscaled: [kv_heads, head_dim, sketch]."""
    spec, _ = model(name)
    return [
        normal((0, index), (layer.kv_heads, layer.head_dim, SKETCH))
        for index, layer in enumerate(spec.layers)
    ]


def filters(name: str) -> np.ndarray:
    """The control of the policy `q_filter`, random directions [layers, kv_heads, head_dim] in place of learned ones."""
    spec, _ = model(name)
    found = policies.make('q_filter(path="random:0")').constants(spec)
    return np.stack([found[f"layers.{index}"] for index in range(len(spec.layers))])


def print_of(name: str) -> int:
    """A checksum of the weights and texts, so that a recording of others is noticed."""
    _, weights = model(name)
    texts = [text(one, length) for one, length, _ in CASES if one == name]
    return zlib.crc32(
        b"".join(x.tobytes() for x in [*weights.values(), *texts, *sketches(name), filters(name)])
    )


def main(folder: Path) -> None:
    """Write everything below `folder`, which must not hold it yet."""
    for name in CONFIGS:
        spec, weights = model(name)
        write(folder / name, spec, weights)
        more = {f"text{length}": text(name, length) for one, length, _ in CASES if one == name}
        more |= {f"sketch{index}": each for index, each in enumerate(sketches(name))}
        more |= {f"delimiter{length}": delimiter(name, length) for one, length, _ in CASES if one == name}
        np.savez(folder / f"{name}.npz", filters=filters(name), **more)
    cases = {"cases": CASES, "question": QUESTION, "prints": {name: print_of(name) for name in CONFIGS}}
    (folder / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
